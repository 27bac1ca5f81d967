"""One tiny UNet with attention, as a model directory and exported; and stand-ins for a GPU and for TensorRT.

The stand-in of an execution context reads and writes the addresses it was given, and computes with ONNX Runtime; the
stand-in of a CUDA graph replays what was recorded.
"""

import contextlib
import ctypes
import dataclasses
import inspect
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dpctl import artifact
from dpctl.recipe import EngineRecipe, to_dict
from dpctl.signature import Signature
from runtime import engine as engines
from runtime.backends import ort, trt


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8,),
            down_block_types=("AttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    directory = tmp_path_factory.mktemp("runtime") / "model"
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def exported_directory(model_directory: Path) -> Path:
    """Shared: copy it before changing a file."""
    from dpctl.models import load_model
    from dpctl.recipe import ExportRecipe
    from export import export_model

    directory = model_directory.with_name("exported")
    export_model(load_model(model_directory), directory, ExportRecipe(batch=(1, 2, 4)))
    return directory


@pytest.fixture
def copied(exported_directory: Path, tmp_path: Path) -> Path:
    """Return a copy of the exported directory, to be changed."""
    return Path(shutil.copytree(exported_directory, tmp_path / "copied"))


@pytest.fixture(scope="session")
def engine_directory(exported_directory: Path) -> Path:
    """The same with an engine for this machine's GPU; skips where there is none to build or run it."""
    import torch

    from dpctl.errors import DpctlError
    from dpctl.recipe import EngineRecipe
    from export import to_tensorrt
    from export.engines import export_engine

    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use: an engine cannot be run")
    try:
        to_tensorrt.check(EngineRecipe(), "fp32")
    except DpctlError as problem:
        pytest.skip(f"{problem.failed}: {problem.got}")
    directory = exported_directory.with_name("engine")
    export_engine(exported_directory, directory, EngineRecipe())
    return directory


@pytest.fixture(scope="session")
def rewrite_manifest() -> Callable[..., None]:
    """Return what makes the manifest fit the files as they are, as whoever changed them on purpose would."""

    def rewrite(directory: Path, **changed: Any) -> None:
        manifest = artifact.read_manifest(directory)
        assert manifest is not None
        manifest = dataclasses.replace(manifest, **{"files": artifact.hash_files(directory)} | changed)
        (directory / artifact.MANIFEST).write_text(manifest.to_json())

    return rewrite


@pytest.fixture(scope="session")
def move_a_weight() -> Callable[[Path, str], None]:
    """Return what moves a weight of a graph into a file: beside it, two folders above, by absolute path or a link."""

    def move(graph: Path, where: str) -> None:
        import onnx

        model = onnx.load(graph)
        weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        secret = graph.parent.parent.parent / "secret.bin"
        secret.write_bytes(weight.raw_data)
        (graph.parent / "beside.bin").write_bytes(weight.raw_data)
        (graph.parent / "link.bin").symlink_to(secret)
        places = {"beside": "beside.bin", "above": "../../secret.bin", "absolute": str(secret), "link": "link.bin"}
        length = len(weight.raw_data)
        weight.ClearField("raw_data")
        weight.data_location = onnx.TensorProto.EXTERNAL
        for key, value in {"location": places[where], "offset": "0", "length": str(length)}.items():
            entry = weight.external_data.add()
            entry.key, entry.value = key, value
        graph.write_bytes(model.SerializeToString())

    return move


# --- stand-ins --------------------------------------------------------------------------------------------------------

# What the GPU of the stand-ins is, and how much memory an engine asks for.
SCRATCH = 4096
GPU = {"capability": "8.9", "gpu": "NVIDIA L4"}


class Stream:
    """A CUDA stream as far as the backend uses it."""

    def __init__(self, machine: "Machine", name: str) -> None:
        self.machine, self.name, self.cuda_stream = machine, name, 7

    def wait_stream(self, other: "Stream") -> None:
        self.machine.log.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        self.machine.log.append(f"{self.name} is done")


class Machine:
    """What stands in for the GPU: it runs at once, or records for a CUDA graph."""

    def __init__(self, graph: Path) -> None:
        self.graph, self.log = graph, list[str]()
        self.recording: list[Callable[[], None]] | None = None
        self.contexts: list[Any] = []
        self.layers: list[tuple[str, float]] = []  # what a profiler is told of every run
        self.caller = Stream(self, "caller")

    def execute(self, context: "Context") -> bool:
        if self.recording is not None:
            self.recording.append(context.run)
        else:
            context.run()
        return True


class Context:
    """What an execution context does: remembers shapes and addresses, and computes from the one to the other."""

    def __init__(self, machine: Machine, signature: Signature) -> None:
        self.machine, self.signature = machine, signature
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.scratch: tuple[int, int] | None = None

    def run(self) -> None:
        self.machine.log.append("runs")
        inputs = {}
        for tensor in self.signature.inputs:
            shape, kind = self.shapes[tensor.name], ctypes.c_float if tensor.dtype == "float32" else ctypes.c_int64
            there = (kind * int(np.prod(shape))).from_address(self.addresses[tensor.name])
            inputs[tensor.name] = np.ctypeslib.as_array(there).reshape(shape).copy()
        output = self.signature.outputs[0].name
        (result,) = ort.run_graph(self.machine.graph, inputs, [output])
        ctypes.memmove(self.addresses[output], np.ascontiguousarray(result).ctypes.data, result.nbytes)


class Graph:
    """A CUDA graph: what was recorded, again."""

    def __init__(self) -> None:
        self.calls: list[Callable[[], None]] = []

    def replay(self) -> None:
        for call in self.calls:
            call()


@pytest.fixture
def machine(exported_directory: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Put a machine in the place of torch.cuda."""
    found = Machine(exported_directory / "unet" / "model.fp32.onnx")
    real = torch.cuda.graph

    @contextlib.contextmanager
    def capture(*args: Any, **kwargs: Any) -> Iterator[None]:
        inspect.signature(real).bind(*args, **kwargs)
        found.recording = []
        yield
        args[0].calls, found.recording = found.recording, None

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        yield

    stand_ins = {
        "Stream": lambda device=None: Stream(found, "ours"),
        "CUDAGraph": Graph,
        "current_stream": lambda device=None: found.caller,
        "stream": on,
        "device": lambda device: contextlib.nullcontext(),
        "graph": capture,
        "empty_cache": lambda: found.log.append("gives memory back"),
        "get_device_name": lambda device=None: GPU["gpu"],
    }
    for name, stand_in in stand_ins.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(trt, "find_gpu", lambda name: torch.device("cpu"))
    monkeypatch.setattr(trt, "capability_of", lambda device: GPU["capability"])
    return found


@pytest.fixture
def signature(exported_directory: Path) -> Signature:
    manifest = artifact.read_manifest(exported_directory)
    assert manifest is not None
    return Signature.from_json(manifest.signature)


@pytest.fixture
def make_context(checked: Any, machine: Machine, signature: Signature) -> Callable[..., Any]:
    """Return what makes the stand-in of an execution context of a library."""

    def make(library: Any) -> Any:
        state = Context(machine, signature)

        def execute(stream_handle: int) -> bool:
            done = machine.execute(state)
            profiler = context.__dict__["_does"].get("profiler")
            if profiler is not None:
                assert isinstance(profiler, library.IProfiler)
                assert machine.recording is None  # a CUDA graph would hide the layers
                for layer, milliseconds in machine.layers:
                    profiler.report_layer_time(layer, milliseconds)
            return done

        context = checked(
            library.IExecutionContext,
            set_input_shape=lambda name, shape: state.shapes.update({name: shape}) or True,
            set_tensor_address=lambda name, memory: state.addresses.update({name: memory}) or True,
            set_device_memory=lambda memory, size: setattr(state, "scratch", (memory, size)),
            execute_async_v3=execute,
        )
        context.__dict__["state"] = state
        machine.contexts.append(context)
        return context

    return make


@pytest.fixture
def make_engine(checked: Any, make_context: Callable[..., Any], signature: Signature) -> Callable[..., Any]:
    """Return what makes the stand-in of an engine of a library."""

    def make(library: Any, **changed: Any) -> Any:
        tensors = {tensor.name: tensor for tensor in (*signature.inputs, *signature.outputs)}
        names = list(tensors)
        modes = {tensor.name: library.TensorIOMode.INPUT for tensor in signature.inputs}
        does: dict[str, Any] = {
            "num_io_tensors": len(names),
            "get_tensor_name": lambda index: names[index],
            "get_tensor_mode": lambda name: modes.get(name, library.TensorIOMode.OUTPUT),
            "get_tensor_dtype": lambda name: library.float32,
            "get_tensor_shape": lambda name: library.Dims(trt.dynamic(tensors[name].shape)),
            "device_memory_size_v2": SCRATCH,
            "create_execution_context": lambda settings: make_context(library),
        }
        return checked(library.ICudaEngine, **does | changed)

    return make


@pytest.fixture
def with_engine(exported_directory: Path, tmp_path: Path) -> Path:
    """An exported directory with an engine of some bytes and a manifest that is true, as of TensorRT."""
    copied = Path(shutil.copytree(exported_directory, tmp_path / "copied"))
    _add_engine(copied, EngineRecipe(flavor="tensorrt"))
    return copied


@pytest.fixture(scope="session")
def add_engine() -> Callable[..., Path]:
    """Return what puts an engine of some bytes into a directory: `add_engine(directory, recipe, **changed)`."""
    return _add_engine


def _add_engine(directory: Path, recipe: EngineRecipe, **changed: Any) -> Path:
    targets = changed.get("targets", ["8.9"])
    engine = directory / "unet" / engines.name("fp32", recipe.flavor, targets)
    engine.write_bytes(b"an engine for " + recipe.flavor.encode())
    manifest = artifact.read_manifest(directory)
    assert manifest is not None
    values: dict[str, Any] = {
        "flavor": recipe.flavor,
        "version": _library(recipe.flavor).__version__,
        "targets": targets,
        "gpu": GPU["gpu"] if recipe.flavor == "tensorrt" else None,
        "precision": "fp32",
        "profile": engines.profile_of(Signature.from_json(manifest.signature)),
        "weights_bytes": None,
        "activation_bytes": None,
        "build_s": 1.0,
        "sha256": artifact.hash_file(engine),
        "size_bytes": engine.stat().st_size,
        "onnx": engines.graph_digests(engine.with_name("model.fp32.onnx")),
        "recipe": to_dict(recipe),
        "built_on": {},
    }
    engines.sidecar(engine).write_text(engines.EngineManifest(**values | changed).to_json())
    manifest = dataclasses.replace(manifest, files=artifact.hash_files(directory))
    (directory / artifact.MANIFEST).write_text(manifest.to_json())
    return engine


def _library(flavor: str) -> Any:
    """Return what has the real classes of a flavor."""
    name = "tensorrt_rtx" if flavor == "rtx" else "tensorrt_lean"
    return pytest.importorskip(name, reason=f"{name} is not installed: see [dev] in pyproject.toml")


@pytest.fixture
def opened(
    checked: Any, stand_in: Any, make_engine: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> SimpleNamespace:
    """Put stand-ins in the place of TensorRT (with the lean runtime's classes) and of TensorRT-RTX.

    `loaded` lists the bytes that were given to a runtime, `engines` the engines that it gave.
    """
    seen = SimpleNamespace(loaded=[], engines=[], changed={})
    lean, rtx = _library("tensorrt"), _library("rtx")
    for real, name in ((lean, "tensorrt"), (lean, "tensorrt_lean"), (rtx, "tensorrt_rtx")):

        def load(plan: bytes, real: Any = real) -> Any:
            seen.loaded.append(plan)
            made = make_engine(real, **seen.changed)
            seen.engines.append(weakref.ref(made))
            return made

        runtime = checked(real.Runtime, deserialize_cuda_engine=load)
        library = stand_in(real, name, Runtime=lambda logger, runtime=runtime: runtime)
        monkeypatch.setitem(sys.modules, name, library)
    return seen
