"""TensorRT and TensorRT-RTX engines of an exported directory, on an NVIDIA GPU, in memory that torch owns."""

import dataclasses
from collections import deque
from collections.abc import Collection, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from dpctl import artifact
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError
from dpctl.models import read_config
from dpctl.signature import Signature
from runtime import engine as engines
from runtime.backends._rtx import cache_path, keep, settings_of
from runtime.backends._trt_profile import named, profiler_of, read_layers
from runtime.backends.ort import TORCH, exported, refuse_failed
from runtime.denoiser import find_device, memory_used, synchronize
from runtime.engine import NAMES, EngineManifest
from runtime.layers import LayerTime, layer_times, random_inputs

RUNS_EXPORTED = True
EXTRAS = {"tensorrt": "gpu", "rtx": "rtx"}
# TensorRT asks for memory at multiples of this, and for some even where it needs none.
ALIGNMENT = 256


class Run:
    """One shape of the network: inputs and output at fixed addresses, since a CUDA graph replays addresses."""

    def __init__(self, context: Any, buffers: dict[str, Tensor], inputs: Collection[str]) -> None:
        self.context, self.buffers, self._inputs = context, buffers, inputs
        self.graph: torch.cuda.CUDAGraph | None = None

    def bind(self) -> None:
        """Tell the context this shape and where its tensors lie."""
        for name, buffer in self.buffers.items():
            if name in self._inputs and not self.context.set_input_shape(name, tuple(buffer.shape)):
                raise RuntimeError(f"TensorRT does not take the shape {list(buffer.shape)} for {name}")
            if not self.context.set_tensor_address(name, buffer.data_ptr()):
                raise RuntimeError(f"TensorRT does not take an address for {name}")

    def execute(self, stream: torch.cuda.Stream) -> None:
        """Hand the run to the stream: as a CUDA graph where there is one."""
        if self.graph is not None:
            self.graph.replay()
        elif not self.context.execute_async_v3(stream.cuda_stream):
            raise RuntimeError("TensorRT could not run the engine")

    def capture(self, stream: torch.cuda.Stream) -> None:
        """Record the run as a CUDA graph; one run before it lets TensorRT allocate what it will."""
        self.execute(stream)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            self.execute(stream)
        self.graph = graph


class TrtDenoiser:
    """A Denoiser over an engine, with a stream of its own.

    TensorRT: a context and a CUDA graph for every shape that occurs; all contexts share one scratch memory, since they
    run one after the other. TensorRT-RTX captures by itself: one context, and its compiled kernels are kept in the
    file `kept` for the next start.
    """

    precision = "fp32"  # as the engine was built: TF32 is one of its own
    layers: Path | None = None  # the engine's file of layers

    def __init__(
        self, library: ModuleType, engine: Any, signature: Signature, config: Any, device: torch.device, kept: Path
    ) -> None:
        self.device, self.dtype, self.config, self.signature = device, torch.float32, config, signature
        self.library, self._engine, self._kept = library, engine, kept
        self._stream = torch.cuda.Stream(device)
        self._runs: dict[tuple[int, ...], Run] = {}
        self._bound: Run | None = None
        self._scratch = self._shared = self._compiled = self._profiler = None
        if hasattr(library, "IRuntimeCache"):
            settings, self._compiled = settings_of(library, engine, kept)
            self._shared = _made(engine.create_execution_context(settings), library)
        else:
            size = max(ALIGNMENT, engine.device_memory_size_v2)
            self._scratch = torch.empty(size, dtype=torch.uint8, device=device)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.synchronize()
        if self._compiled is not None:
            keep(self._compiled, self._kept)
        # Graphs and contexts before the engine; then what torch holds of their memory goes back to the device.
        self._bound = None
        self._runs.clear()
        self._scratch = self._shared = self._compiled = None
        del self._engine
        torch.cuda.empty_cache()

    @torch.inference_mode()
    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        given = {"sample": sample, "timestep": timestep, **conditions}
        batch = self.signature.check({name: value.shape for name, value in given.items()})
        size = (sample.shape[2], sample.shape[3]) if self.signature.sizes else None
        with torch.cuda.device(self.device):
            run = self._run(batch, size)
            output = self.signature.outputs[0].name
            # The caller's own, made on the caller's stream and only written on ours, between two waits.
            result = torch.empty_like(run.buffers[output])
            caller = torch.cuda.current_stream()
            self._stream.wait_stream(caller)
            with torch.cuda.stream(self._stream):
                for wanted in self.signature.inputs:
                    run.buffers[wanted.name].copy_(given[wanted.name])
                run.execute(self._stream)
                result.copy_(run.buffers[output])
            caller.wait_stream(self._stream)
        return result

    def _run(self, batch: int, size: tuple[int, int] | None) -> Run:
        """Return what is ready to run at a batch size and a size (H, W), made ready the first time."""
        key = (batch, *(size or ()))
        if key not in self._runs:
            tensors = (*self.signature.inputs, *self.signature.outputs)
            buffers = {
                tensor.name: torch.zeros(tensor.at(batch, size), dtype=TORCH[tensor.dtype], device=self.device)
                for tensor in tensors
            }
            torch.cuda.current_stream().synchronize()
            names = {tensor.name for tensor in self.signature.inputs}
            self._runs[key] = Run(self._shared or self._context(), buffers, names)
            if self._shared is None:
                self._runs[key].bind()
                if self._profiler is None:
                    self._runs[key].capture(self._stream)
        run = self._runs[key]
        if self._shared is not None and run is not self._bound:
            run.bind()
            self._bound = run
        return run

    def _context(self) -> Any:
        """Return a new context that works in the shared scratch memory."""
        managed = self.library.ExecutionContextAllocationStrategy.USER_MANAGED
        context = _made(self._engine.create_execution_context(managed), self.library)
        assert self._scratch is not None
        context.set_device_memory(self._scratch.data_ptr(), self._scratch.numel())
        if self._profiler is not None:
            context.profiler = self._profiler
        return context

    def profile_with(self, profiler: Any) -> None:
        """Let a profiler see every run from now on, in new contexts and without CUDA graphs, which hide the layers."""
        self._bound, self._profiler = None, profiler
        self._runs.clear()
        if self._shared is not None:
            settings, self._compiled = settings_of(self.library, self._engine, self._kept, capture=False)
            self._shared = _made(self._engine.create_execution_context(settings), self.library)
            self._shared.profiler = profiler

    def synchronize(self) -> None:
        synchronize(self.device)

    def memory(self) -> dict[str, int]:
        return memory_used(self.device)


def open_denoiser(
    directory: Path, *, threads: int | None = None, device: str | None = None, failed: bool = False
) -> TrtDenoiser:
    """Open the engine of an exported directory that is for this GPU, after checking it against its manifest.

    `threads` is torch's setting for what else runs on the processor. Raises a DpctlError for a directory without such
    an engine, changed files, a missing GPU or library, another version of it, and another GPU.
    """
    from diffusers.configuration_utils import FrozenDict

    manifest = exported(directory, "trt")
    if not failed:
        refuse_failed(directory, manifest)
    target = find_gpu(device)
    found = _engines(directory, manifest)
    if threads is not None:
        torch.set_num_threads(threads)
    signature = Signature.from_json(manifest.signature)
    path, about, library = _choose(found, signature, target)
    # Its own digests were just compared; here the rest.
    seen = {f"unet/{name}" for name in (path.name, *about.onnx)}
    others = {name: sha256 for name, sha256 in manifest.files.items() if name not in seen}
    artifact.verify_files(directory, dataclasses.replace(manifest, files=others))
    with torch.cuda.device(target):
        loaded = load(library, path, about)
        _check_tensors(library, loaded, signature, path)
        config = FrozenDict(read_config(directory))
        denoiser = TrtDenoiser(library, loaded, signature, config, target, cache_path(about, name_of(target)))
        denoiser.precision, denoiser.layers = about.precision, engines.layers(path)
        return denoiser


def profile(
    directory: Path, *, threads: int | None = None, device: str | None = None, batch_size: int = 1, runs: int = 10
) -> tuple[LayerTime, ...]:
    """Return the time of every layer of the engine in one forward pass, as TensorRT's own profiler tells it.

    Where the engine's file of layers says which nodes a layer computes, its name has their modules; a layer whose
    nodes are not known has the name "".
    """
    with open_denoiser(directory, threads=threads, device=device) as denoiser:
        inputs = random_inputs(denoiser.signature, denoiser.config, batch_size)
        profiler, layers = profiler_of(denoiser.library), read_layers(denoiser.layers)
        denoiser.profile_with(profiler)
        passes = []
        for _ in range(runs + 1):
            profiler.told = []
            denoiser(**inputs)
            denoiser.synchronize()
            passes.append(named(profiler.told, layers))
    if not all(passes):
        raise DpctlError("TensorRT's profiler told of no layer", str(directory), "profile with the backend ort")
    return layer_times(passes[1:])


def find_gpu(name: str | None) -> torch.device:
    """Return the GPU called `name` (default: the first); a DpctlError where there is none."""
    device = find_device(name) if name is not None else torch.device("cuda")
    if device.type != "cuda" or not torch.cuda.is_available():
        got = f"the device {name}" if name is not None else "no GPU that torch can use"
        todo = "run it on a machine with one (`dpctl doctor`), or use the backend ort"
        raise DpctlError("an engine runs on an NVIDIA GPU", got, todo)
    return torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)


def capability_of(device: torch.device) -> str:
    """Return the compute capability of a GPU, e.g. 8.9."""
    return "{}.{}".format(*torch.cuda.get_device_capability(device))


def name_of(device: torch.device) -> str:
    """Return the name of a GPU, which says its model."""
    return str(torch.cuda.get_device_name(device))


def require(flavor: str, *, lean: bool = False) -> ModuleType:
    """Import the library of a flavor, or TensorRT's lean runtime; a DpctlError names what to install."""
    todo = f"pip install 'dpctl-diffusion[{EXTRAS[flavor]}]'"
    if lean:
        todo = (
            "pip install tensorrt-lean in the version that built the engine, or a later one of the same major version"
        )
    try:
        if lean:
            import tensorrt_lean as library
        elif flavor == "rtx":
            import tensorrt_rtx as library
        else:
            import tensorrt as library
    except Exception as problem:  # a shared library that is missing or does not fit raises anything
        got = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
        what = "TensorRT's lean runtime" if lean else NAMES[flavor]
        raise DpctlError(f"this needs {what}, which does not load", got, todo) from None
    return library


@cache
def log_of(library: ModuleType) -> Any:
    """Return the one logger of a library in this process: it keeps the first one that it is given."""

    class Log(library.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.lines: deque[tuple[str, str]] = deque(maxlen=1000)

        def log(self, severity: Any, message: str) -> None:
            if severity.name != "VERBOSE":
                self.lines.append((severity.name, message))

    return Log()


def errors_of(library: ModuleType) -> list[str]:
    """Return what the library has logged as errors since its lines were cleared, a line each."""
    errors = [message for severity, message in log_of(library).lines if "ERROR" in severity]
    return [" ".join(message.split()) for message in errors]


def _said(library: ModuleType) -> str:
    return (errors_of(library) or ["it does not say why"])[0]


def _made(context: Any, library: ModuleType) -> Any:
    """Return a context; a DpctlError where the library could not make one."""
    if context is None:
        raise DpctlError("the engine cannot be made ready to run", _said(library), "free memory of the GPU")
    return context


def load(library: ModuleType, path: Path, about: EngineManifest) -> Any:
    """Return the engine in memory; what this raises is about the engine, which `engines.check` has let pass."""
    log = log_of(library)
    log.lines.clear()
    loaded = library.Runtime(log).deserialize_cuda_engine(path.read_bytes())
    if loaded is None:
        todo = f"build it again here: {engines.rebuild(path, about.engine_recipe)}"
        raise DpctlError("the engine cannot be loaded", f"{path}: {_said(library)}", todo)
    return loaded


def _engines(directory: Path, manifest: Manifest) -> list[Path]:
    found = [directory / name for name in sorted(manifest.files) if name.endswith(".engine")]
    if not found:
        todo = f"run `dpctl export {directory} --out {directory} --force --trt` on it first"
        raise DpctlError("the trt backend runs engines", f"{directory} holds none", todo)
    return found


def _choose(found: list[Path], signature: Signature, device: torch.device) -> tuple[Path, EngineManifest, ModuleType]:
    """Return the most specific engine that runs here, with its manifest and library; a DpctlError why there is none.

    None is taken of several that differ in precision, or are equally specific.
    """
    chosen, refusals = [], []
    for path in found:
        try:
            about = engines.read(path)
            library = require(about.flavor, lean=about.engine_recipe.version_compatible)
            engines.check(
                path,
                about,
                version=library.__version__,
                capability=capability_of(device),
                gpu=name_of(device),
            )
            engines.check_profile(path, about, signature)
            chosen.append((path, about, library))
        except DpctlError as problem:
            refusals.append(problem)
    if not chosen:
        raise refusals[0]
    chosen.sort(key=lambda each: engines.precedence(each[1]))
    first, *others = [about for _, about, _ in chosen]
    if any(engines.precedence(about) == engines.precedence(first) for about in others) or any(
        about.precision != first.precision for about in others
    ):
        got = ", ".join(f"{path.name} ({about.precision})" for path, about, _ in chosen)
        todo = "keep one of them, or export into directories apart"
        raise DpctlError("several engines are for this GPU, and none before the others", got, todo)
    return chosen[0]


def _check_tensors(library: ModuleType, engine: Any, signature: Signature, path: Path) -> None:
    """Raise a DpctlError unless the engine declares the signature's tensors."""
    modes = {library.TensorIOMode.INPUT: signature.inputs, library.TensorIOMode.OUTPUT: signature.outputs}
    dtypes = {"float32": library.float32, "int64": library.int64}
    wanted = {
        (tensor.name, mode, dtypes[tensor.dtype], dynamic(tensor.shape))
        for mode, tensors in modes.items()
        for tensor in tensors
    }
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = {
        (name, engine.get_tensor_mode(name), engine.get_tensor_dtype(name), tuple(engine.get_tensor_shape(name)))
        for name in names
    }
    if found != wanted:
        odd = ", ".join(sorted({name for name, *_ in found ^ wanted}))
        raise DpctlError("the engine's tensors are not those of the signature", f"{path}: {odd}", "build it again")


def dynamic(shape: Sequence[str | int]) -> tuple[int, ...]:
    """Return a shape as TensorRT writes it: -1 for a dynamic axis."""
    return tuple(-1 if isinstance(axis, str) else axis for axis in shape)
