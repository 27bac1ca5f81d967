"""ONNX Runtime over an exported directory: the processor, or a CUDA GPU, never the one in place of the other."""

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from dpctl import artifact, recorded
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError
from dpctl.models import read_config
from dpctl.signature import OUTPUT, Signature
from runtime.denoiser import find_device, memory_used, synchronize
from runtime.layers import LayerTime, layer_times, module_of, random_inputs

RUNS_EXPORTED = True
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
EXTRAS = {"cpu": "cpu", "cuda": "gpu"}
GRAPH = re.compile(r"unet/model\.\w+\.onnx")
# What ONNX Runtime's profiler adds to the name of a node.
KERNEL = "_kernel_time"
# What a cast of its own, and a kernel that gives what is cast, have before it: it has few kernels in half precision.
CAST = re.compile(r"^Inserted(PrecisionFree)?Cast_")
# The module that gives a UNet's output, where that is a convolution: so in every family.
LAST = "conv_out"
# As the graph declares them, for numpy's names (IO binding) and torch's.
DECLARED = {"float32": "tensor(float)", "int64": "tensor(int64)"}
NUMPY = {"float32": np.float32, "int64": np.int64}
TORCH = {"float32": torch.float32, "int64": torch.int64}


class OrtDenoiser:
    """A Denoiser over an ONNX Runtime session; inputs and output are torch's own memory, bound and not copied."""

    precision = "fp32"  # as the graph has it: what the provider computes in may be wider

    def __init__(self, session: Any, signature: Signature, config: Any, device: torch.device) -> None:
        self.device, self.dtype, self.config, self.signature = device, torch.float32, config, signature
        self._session = session
        self._binding = session.io_binding()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._binding, self._session

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        given = {"sample": sample, "timestep": timestep, **conditions}
        batch = self.signature.check({name: value.shape for name, value in given.items()})
        # `bound` keeps converted inputs alive until the run is over; a fitting input is bound where it lies.
        bound = []
        for wanted in self.signature.inputs:
            value = given[wanted.name].to(self.device, TORCH[wanted.dtype]).contiguous()
            self._binding.bind_input(wanted.name, *self._place(value, wanted.dtype))
            bound.append(value)
        output = self.signature.outputs[0]
        size = (sample.shape[2], sample.shape[3]) if self.signature.sizes else None
        result = torch.empty(output.at(batch, size), device=self.device)
        self._binding.bind_output(output.name, *self._place(result, output.dtype))
        # ONNX Runtime's own CUDA stream does not wait for torch's; the run itself ends synchronised.
        synchronize(self.device)
        self._session.run_with_iobinding(self._binding)
        return result

    def _place(self, value: Tensor, dtype: str) -> tuple[str, int, Any, list[int], int]:
        return self.device.type, self.device.index or 0, NUMPY[dtype], list(value.shape), value.data_ptr()

    def synchronize(self) -> None:
        synchronize(self.device)

    def memory(self) -> dict[str, int]:
        return memory_used(self.device)

    def end_profiling(self) -> Path:
        """Stop ONNX Runtime's own profiler and return the file that it wrote."""
        return Path(self._session.end_profiling())


def open_denoiser(
    directory: Path, *, threads: int | None = None, device: str | None = None, failed: bool = False
) -> OrtDenoiser:
    """Open an exported directory after checking it against its manifest.

    Raises a DpctlError for a directory that was not exported, changed files, a missing library or provider, a graph
    that declares other tensors than the signature, and one that did not pass its parity check, unless it may have
    `failed`.
    """
    target = find_device(device)
    require(target.type)
    manifest = exported(directory)
    if not failed:
        refuse_failed(directory, manifest)
    artifact.verify_files(directory, manifest)
    return open_graph(directory, graph_of(directory, manifest), manifest, threads, target)


def profile(
    directory: Path, *, threads: int | None = None, device: str | None = None, batch_size: int = 1, runs: int = 10
) -> tuple[LayerTime, ...]:
    """Return the time of every module's kernels in one forward pass, as ONNX Runtime's own profiler tells it.

    Raises a DpctlError for a GPU: there the profiler times the launches, not the kernels.
    """
    target = find_device(device)
    if target.type != "cpu":
        todo = "profile on the processor, or with the backends eager or trt"
        raise DpctlError("ONNX Runtime's profiler does not time a GPU's kernels", str(target), todo)
    require()
    manifest = exported(directory)
    refuse_failed(directory, manifest)
    artifact.verify_files(directory, manifest)
    graph = graph_of(directory, manifest)
    with (
        tempfile.TemporaryDirectory() as folder,
        open_graph(directory, graph, manifest, threads, target, Path(folder) / "profile") as denoiser,
    ):
        inputs = random_inputs(denoiser.signature, denoiser.config, batch_size)
        for _ in range(runs + 1):
            denoiser(**inputs)
        told = denoiser.end_profiling().read_text(encoding="utf-8")
    return layer_times(_passes(json.loads(told))[1:])


def _passes(events: Sequence[Mapping[str, Any]]) -> list[list[LayerTime]]:
    """Return the kernels of every run, from the events of a profile (in microseconds)."""
    passes: list[list[LayerTime]] = [[]]
    for event in events:
        if event["name"] == "model_run":
            passes.append([])
        elif event["cat"] == "Node" and event["name"].endswith(KERNEL):
            node, kind = CAST.sub("", event["name"].removesuffix(KERNEL)), event["args"]["op_name"]
            # Kernels of its own layouts are named after what they give: the last layer, after the graph's output.
            last = kind == "Conv" and node.startswith(OUTPUT)
            passes[-1].append(LayerTime(LAST if last else module_of(node), kind, event["dur"] / 1e6))
    return passes[:-1]  # a run is told of after its kernels


def open_graph(
    directory: Path,
    graph: Path,
    manifest: Manifest,
    threads: int | None,
    device: torch.device,
    profile: Path | None = None,
) -> OrtDenoiser:
    """Open a graph in the place of an exported directory's own: one of the same signature.

    With `profile` every run is profiled, into a file whose name begins so.
    """
    from diffusers.configuration_utils import FrozenDict

    signature = Signature.from_json(manifest.signature)
    session = _session(require(device.type), graph, threads or torch.get_num_threads(), device, profile)
    _check_tensors(session, signature, directory)
    denoiser = OrtDenoiser(session, signature, FrozenDict(read_config(directory)), device)
    denoiser.precision = manifest.recipe.get("precision", denoiser.precision)
    return denoiser


def require(device: str = "cpu") -> ModuleType:
    """Import ONNX Runtime; a DpctlError names the extra to install where it or its provider is missing."""
    todo = f"pip install 'dpctl-diffusion[{EXTRAS[device]}]' (onnxruntime and onnxruntime-gpu exclude one another)"
    try:
        import onnxruntime
    except ImportError as problem:
        raise DpctlError("the ort backend needs ONNX Runtime", str(problem), todo) from None
    if PROVIDERS[device] not in onnxruntime.get_available_providers():
        got = ", ".join(onnxruntime.get_available_providers())
        raise DpctlError(f"this ONNX Runtime has no {PROVIDERS[device]}", got, todo)
    return onnxruntime


def run_graph(graph: Path, inputs: Mapping[str, Any], outputs: Sequence[str]) -> list[Any]:
    """Run a graph once on the processor, with arrays by name, and return the outputs asked for."""
    session = _session(require(), graph, torch.get_num_threads(), torch.device("cpu"))
    return list(session.run(list(outputs), dict(inputs)))


def refuse_failed(directory: Path, manifest: Manifest) -> None:
    """Raise a DpctlError for an export that was kept although it did not pass."""
    if (manifest.parity or {}).get("verdict") == "failed":
        raise DpctlError(
            "this export did not pass its parity check", str(directory), "see `dpctl verify`, and export again"
        )


def exported(directory: Path, backend: str = "ort") -> Manifest:
    """Return the manifest of an exported directory; a DpctlError for any other, and for one that records nonsense."""
    if not directory.is_dir():
        raise DpctlError("no such directory", str(directory), "give the directory that `dpctl export` wrote")
    manifest = artifact.read_manifest(directory)
    if manifest is None or manifest.kind != "exported" or manifest.signature is None:
        kind = f"a {manifest.kind} model" if manifest is not None else "no dpctl.json"
        raise DpctlError(
            f"the {backend} backend runs exported directories", f"{directory}: {kind}", "run `dpctl export` on it first"
        )
    recorded.check(manifest, directory)
    return manifest


def graph_of(directory: Path, manifest: Manifest) -> Path:
    """Return the one ONNX graph of an exported directory."""
    graphs = [name for name in manifest.files if GRAPH.fullmatch(name)]
    if len(graphs) != 1:
        got = f"{directory}: {', '.join(graphs) or 'none'}"
        raise DpctlError("an exported directory holds one ONNX graph", got, "export the model again")
    beside = f"{graphs[0]}.data"
    if (directory / beside).exists() and beside not in manifest.files:
        got = f"{directory / beside} has no digest in the manifest"
        raise DpctlError("nothing says that these weights are the graph's", got, "export the model again")
    return directory / graphs[0]


def _session(
    onnxruntime: ModuleType, graph: Path, threads: int, device: torch.device, profile: Path | None = None
) -> Any:
    provider = PROVIDERS[device.type]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    # Threads may spin inside a run, as in production, but not after it: an idle subject of a bench
    # must not disturb the one that is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    # float32 means float32: TF32 is a precision of its own.
    settings = {"device_id": str(device.index or 0), "use_tf32": "0"} if device.type == "cuda" else {}
    try:
        session = onnxruntime.InferenceSession(graph, options, providers=[(provider, settings)], enable_fallback=0)
    except Exception as problem:  # its errors have no class in common
        said = str(problem).strip().splitlines()[0]
        lacks = "NOT_IMPLEMENTED" in said  # the processor has next to nothing in bfloat16
        todo = f"run it on a GPU, or export with --precision fp32: the {device.type} lacks an operator"
        raise DpctlError(
            "ONNX Runtime cannot load the graph", f"{graph}: {said}", todo if lacks else "export the model again"
        ) from None
    _check_placement(session, provider)
    return session


def _check_placement(session: Any, provider: str) -> None:
    """Raise a DpctlError unless `provider` leads and, on a GPU, runs every convolution and product.

    A missing CUDA library makes ONNX Runtime use the processor without an error. (Nodes that compute shapes belong
    on the processor.)
    """
    todo = "mend the CUDA installation (`dpctl doctor`), or use the device cpu"
    if session.get_providers()[0] != provider:
        raise DpctlError(f"{provider} could not be used", f"providers {session.get_providers()}", todo)
    for part in session.get_provider_graph_assignment_info() if provider != PROVIDERS["cpu"] else ():
        heavy = [node.name for node in part.get_nodes() if node.op_type in ("Conv", "Gemm", "MatMul")]
        if heavy and part.ep_name != provider:
            raise DpctlError(
                f"{provider} does not run the whole graph", f"{heavy[0]} was given to {part.ep_name}", todo
            )


def _check_tensors(session: Any, signature: Signature, directory: Path) -> None:
    for declared, wanted in (
        (session.get_inputs(), signature.inputs),
        (session.get_outputs(), signature.outputs),
    ):
        found = [(tensor.name, tensor.type, tuple(tensor.shape)) for tensor in declared]
        if found != [(tensor.name, DECLARED[tensor.dtype], tensor.shape) for tensor in wanted]:
            got = f"{directory}: {found}"
            raise DpctlError("the graph's tensors are not those of the signature", got, "export the model again")
