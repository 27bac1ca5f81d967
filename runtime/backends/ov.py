"""OpenVINO over an exported directory, on the processor, in the precision of its graph."""

from pathlib import Path
from types import ModuleType
from typing import Any, Self

import torch
from torch import Tensor

from dpctl import artifact, environment
from dpctl.errors import DpctlError
from dpctl.models import read_config
from dpctl.signature import Signature
from runtime.backends.ort import TORCH, exported, graph_of, refuse_failed
from runtime.denoiser import find_device, memory_used
from runtime.layers import LayerTime, layer_times, module_of, random_inputs

RUNS_EXPORTED = True
# As OpenVINO names them.
DECLARED = {"float32": "f32", "int64": "i64"}


class OvDenoiser:
    """A Denoiser over an OpenVINO model; inputs and output are torch's own memory, shared and not copied.

    The first call of a shape compiles the graph for it: with a dynamic batch it runs slower.
    """

    precision = "fp32"  # as the graph has it: what the plugin computes in may be wider

    def __init__(
        self, library: ModuleType, model: Any, signature: Signature, config: Any, options: dict[str, Any]
    ) -> None:
        self.device, self.dtype, self.config, self.signature = torch.device("cpu"), torch.float32, config, signature
        self._library, self._model, self.options = library, model, options
        self._core = library.Core()
        self._requests: dict[tuple[int, ...], Any] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._requests.clear()
        del self._model, self._core

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        given = {"sample": sample, "timestep": timestep, **conditions}
        batch = self.signature.check({name: value.shape for name, value in given.items()})
        size = (sample.shape[2], sample.shape[3]) if self.signature.sizes else None
        request = self._request(batch, size)
        # `shared` keeps converted inputs alive until the run is over; a fitting input is used where it lies.
        shared = []
        for wanted in self.signature.inputs:
            value = given[wanted.name].to(self.device, TORCH[wanted.dtype]).contiguous()
            request.set_tensor(wanted.name, self._place(value))
            shared.append(value)
        output = self.signature.outputs[0]
        result = torch.empty(output.at(batch, size))
        request.set_tensor(output.name, self._place(result))
        request.infer()
        return result

    def _place(self, value: Tensor) -> Any:
        return self._library.Tensor(value.detach().numpy(), shared_memory=True)

    def _request(self, batch: int, size: tuple[int, int] | None) -> Any:
        """Return what runs a batch size and a size (H, W), compiled the first time."""
        key = (batch, *(size or ()))
        if key not in self._requests:
            self._model.reshape({wanted.name: list(wanted.at(batch, size)) for wanted in self.signature.inputs})
            self._requests[key] = _compiled(self._core, self._model, self.options).create_infer_request()
        return self._requests[key]

    def kernels(self) -> list[LayerTime]:
        """Return the kernels of the last run, of a denoiser that counts them and has run one shape."""
        (request,) = self._requests.values()
        # A change of layout is called after the node that wanted it, and no module asked for it.
        return [
            LayerTime(
                "" if part.node_type == "Reorder" else module_of(part.node_name),
                part.node_type,
                part.real_time.total_seconds(),
            )
            for part in request.get_profiling_info()
            if part.status == part.EXECUTED
        ]

    def synchronize(self) -> None: ...

    def memory(self) -> dict[str, int]:
        return memory_used(self.device)


def open_denoiser(
    directory: Path, *, threads: int | None = None, device: str | None = None, failed: bool = False
) -> OvDenoiser:
    """Open an exported directory after checking it against its manifest.

    Raises a DpctlError as the ort backend does, and for a device other than the processor. A graph in float16 is
    computed in float32, so that its weights are what is rounded; one in bfloat16 as it says, where the processor can.
    """
    from diffusers.configuration_utils import FrozenDict

    target = find_device(device)
    if target.type != "cpu":
        raise DpctlError("the ov backend runs on the processor", str(target), "use the device cpu, or the backend ort")
    library = require()
    manifest = exported(directory, "ov")
    if not failed:
        refuse_failed(directory, manifest)
    artifact.verify_files(directory, manifest)
    signature = Signature.from_json(manifest.signature)
    model = _read(library, graph_of(directory, manifest))
    _check_tensors(model, signature, directory)
    options = _options(threads or torch.get_num_threads())
    denoiser = OvDenoiser(library, model, signature, FrozenDict(read_config(directory)), options)
    denoiser.precision = manifest.recipe.get("precision", denoiser.precision)
    return denoiser


def profile(
    directory: Path, *, threads: int | None = None, device: str | None = None, batch_size: int = 1, runs: int = 10
) -> tuple[LayerTime, ...]:
    """Return the time of every module's kernels in one forward pass, as OpenVINO's own counters tell it."""
    with open_denoiser(directory, threads=threads, device=device) as denoiser:
        denoiser.options["PERF_COUNT"] = True  # read when the first call compiles
        inputs = random_inputs(denoiser.signature, denoiser.config, batch_size)
        passes = []
        for _ in range(runs + 1):
            denoiser(**inputs)
            passes.append(denoiser.kernels())
    return layer_times(passes[1:])


def require() -> ModuleType:
    """Import OpenVINO; a DpctlError names the extra to install where it is missing or does not load."""
    try:
        return environment.import_openvino()
    except Exception as problem:  # a shared library that does not fit raises anything
        got = f"{type(problem).__name__}: {(str(problem).splitlines() or [''])[0]}"
        todo = "pip install 'dpctl-diffusion[openvino]'"
        raise DpctlError("the ov backend needs OpenVINO, which does not load", got, todo) from None


def _options(threads: int) -> dict[str, Any]:
    return {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # Its own choice on processors that have it is bfloat16: float32 means float32.
        "INFERENCE_PRECISION_HINT": "f32",
        # By default every process pins its threads to the same first cores, whoever else runs there.
        "ENABLE_CPU_PINNING": False,
    }


def _read(library: ModuleType, graph: Path) -> Any:
    """Return the model of a graph; weights outside its directory are refused by OpenVINO itself."""
    try:
        return library.Core().read_model(graph)
    except RuntimeError as problem:
        raise DpctlError("OpenVINO cannot load the graph", f"{graph}: {_last(problem)}", "export it again") from None


def _compiled(core: Any, model: Any, options: dict[str, Any]) -> Any:
    try:
        return core.compile_model(model, "CPU", options)
    except RuntimeError as problem:
        todo = "use the backend ort, or export with --precision fp32"
        raise DpctlError("OpenVINO cannot compile the graph", _last(problem), todo) from None


def _last(problem: RuntimeError) -> str:
    """Return the last line of what OpenVINO says: the first ones are places in its source."""
    return ([line.strip() for line in str(problem).splitlines() if line.strip()] or ["it does not say why"])[-1]


def _check_tensors(model: Any, signature: Signature, directory: Path) -> None:
    """Raise a DpctlError unless the graph declares the signature's tensors; names of axes are lost in reading."""
    for declared, wanted in ((model.inputs, signature.inputs), (model.outputs, signature.outputs)):
        found = [(port.get_any_name(), port.get_element_type().to_string(), _axes(port)) for port in declared]
        asked = [
            (tensor.name, DECLARED[tensor.dtype], [-1 if isinstance(axis, str) else axis for axis in tensor.shape])
            for tensor in wanted
        ]
        if found != asked:
            got = f"{directory}: {found}"
            raise DpctlError("the graph's tensors are not those of the signature", got, "export the model again")


def _axes(port: Any) -> list[int]:
    """Return a shape with -1 for a dynamic axis."""
    return [-1 if axis.is_dynamic else axis.get_length() for axis in port.get_partial_shape()]
