"""The trt backend without a GPU: its calls go to stand-ins that have what TensorRT's real classes have, and no more.

With a GPU tests/runtime/test_backends.py and tests/export/test_engine_on_gpu.py do the rest.
"""

import gc
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpctl.errors import DpctlError
from dpctl.recipe import EngineRecipe
from dpctl.signature import Signature
from runtime import engine as engines
from runtime.backends import ort, trt

lean = pytest.importorskip(
    "tensorrt_lean", reason="TensorRT's lean runtime is not installed: pip install tensorrt-lean"
)
rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'dpctl-diffusion[rtx]'")
SCRATCH = 4096  # as the stand-in of an engine asks for


def inputs(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return torch.randn(batch, 1, 8, 8, generator=generator), torch.linspace(0.5, 99, batch)


# --- TensorRT ----------------------------------------------------------------------------------------------------


def test_it_gives_what_the_graph_gives_at_changing_batch_sizes(
    with_engine: Path, opened: SimpleNamespace, machine: Any
) -> None:
    with trt.open_denoiser(with_engine) as denoiser, ort.open_denoiser(with_engine) as reference:
        outputs = {}
        for batch in (1, 2, 4, 2, 1):
            found = denoiser(*inputs(batch))
            torch.testing.assert_close(found, reference(*inputs(batch)), rtol=0, atol=1e-6)
            outputs.setdefault(batch, (found, found.clone()))
        for found, kept in outputs.values():  # they belong to the caller
            assert torch.equal(found, kept)
    assert opened.loaded == [b"an engine for tensorrt"]
    assert len(machine.contexts) == 3  # one per shape


def test_a_shape_is_run_once_captured_once_and_then_replayed(
    with_engine: Path, opened: SimpleNamespace, machine: Any
) -> None:
    with trt.open_denoiser(with_engine) as denoiser:
        for _ in range(3):
            denoiser(*inputs(2))
        (context,) = machine.contexts
        executed = [name for name, *_ in context._calls if name == "execute_async_v3"]
        assert len(executed) == 2  # once by itself, once into the recording
        assert machine.log.count("runs") == 1 + 3  # and replayed for every call
        denoiser(*inputs(1))
    shared = {context.state.scratch for context in machine.contexts}
    assert len(shared) == 1
    assert shared.pop()[1] >= SCRATCH


def test_inputs_of_another_type_or_layout_are_converted(with_engine: Path, opened: SimpleNamespace) -> None:
    sample, _ = inputs(2)
    with trt.open_denoiser(with_engine) as denoiser:
        expected = denoiser(sample, torch.tensor([3.0, 70.0]))
        turned = sample.transpose(2, 3).contiguous().transpose(2, 3).double()
        assert torch.equal(denoiser(turned, torch.tensor([3, 70])), expected)
        with pytest.raises(DpctlError, match="exported for 1 to 4"):
            denoiser(*inputs(5))


def test_our_stream_works_between_two_waits(with_engine: Path, opened: SimpleNamespace, machine: Any) -> None:
    with trt.open_denoiser(with_engine) as denoiser:
        denoiser(*inputs(1))
        machine.log.clear()
        denoiser(*inputs(1))
        assert machine.log == ["ours waits for caller", "runs", "caller waits for ours"]


def test_what_it_holds_is_free_after_the_block(with_engine: Path, opened: SimpleNamespace, machine: Any) -> None:
    with trt.open_denoiser(with_engine) as denoiser:
        denoiser(*inputs(1))
        assert opened.engines[0]() is not None
    machine.contexts.clear()
    gc.collect()
    assert opened.engines[0]() is None
    assert machine.log[-1] == "gives memory back"


@pytest.mark.parametrize("call", ["set_input_shape", "set_tensor_address", "execute_async_v3"])
def test_a_call_that_fails_is_not_passed_over(
    with_engine: Path, opened: SimpleNamespace, make_context: Callable[..., Any], call: str
) -> None:
    def failing(settings: Any) -> Any:
        context = make_context(lean)
        context._does[call] = False
        return context

    opened.changed = {"create_execution_context": failing}
    with trt.open_denoiser(with_engine) as denoiser, pytest.raises(RuntimeError, match="TensorRT"):
        denoiser(*inputs(1))


def test_no_room_for_a_context_is_an_error(with_engine: Path, opened: SimpleNamespace) -> None:
    opened.changed = {"create_execution_context": lambda settings: None}
    with trt.open_denoiser(with_engine) as denoiser, pytest.raises(DpctlError, match="free memory of the GPU"):
        denoiser(*inputs(1))


# --- which engine, and whether it is loaded at all ---------------------------------------------------------------


def test_an_engine_with_other_tensors_is_refused(with_engine: Path, opened: SimpleNamespace) -> None:
    opened.changed = {"get_tensor_dtype": lambda name: lean.float16}
    with pytest.raises(DpctlError, match="not those of the signature"):
        trt.open_denoiser(with_engine)


def test_an_engine_that_does_not_load_is_refused_with_the_command(
    with_engine: Path, opened: SimpleNamespace, checked: Any, stand_in: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = checked(lean.Runtime, deserialize_cuda_engine=lambda plan: None)
    monkeypatch.setitem(sys.modules, "tensorrt", stand_in(lean, "tensorrt", Runtime=lambda logger: runtime))
    with pytest.raises(DpctlError, match="cannot be loaded") as caught:
        trt.open_denoiser(with_engine)
    assert "dpctl export" in caught.value.todo


@pytest.mark.parametrize("what", ["engine", "graph", "sidecar", "config", "version", "gpu"])
def test_what_does_not_fit_is_refused_before_any_byte_is_loaded(
    with_engine: Path, opened: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    engine = with_engine / "unet" / engines.name("fp32", "tensorrt", ["8.9"])
    paths = {
        "engine": engine,
        "graph": engine.with_name("model.fp32.onnx"),
        "sidecar": engines.sidecar(engine),
        "config": engine.with_name("config.json"),
    }
    if what == "version":
        sys.modules["tensorrt"].__dict__["__version__"] = "11.5.0"
    elif what == "gpu":
        monkeypatch.setattr(trt, "capability_of", lambda device: "9.0")
    else:
        with paths[what].open("ab") as stream:
            stream.write(b" ")
    with pytest.raises(DpctlError) as caught:
        trt.open_denoiser(with_engine)
    assert opened.loaded == []
    if what not in ("sidecar", "config"):  # whose digests are the directory's own
        assert "dpctl export" in caught.value.todo


RTX = EngineRecipe(flavor="rtx")


def test_of_several_engines_the_one_for_this_gpu_is_taken(
    with_engine: Path, opened: SimpleNamespace, add_engine: Callable[..., Path]
) -> None:
    add_engine(with_engine, EngineRecipe(flavor="tensorrt"), targets=["12.0"], gpu="another")
    with trt.open_denoiser(with_engine):
        pass
    assert opened.loaded == [b"an engine for tensorrt"]


@pytest.mark.parametrize(
    ("first", "other"),
    [
        pytest.param((RTX, ["8.9"]), (RTX, ["8.0+"]), id="this GPU before all later ones"),
        pytest.param((RTX, ["8.9"]), (RTX, ["8.9", "12.0"]), id="this GPU before two"),
        pytest.param((RTX, ["8.9", "12.0"]), (RTX, ["8.0+"]), id="two before all later ones"),
        pytest.param((EngineRecipe(flavor="tensorrt"), ["8.9"]), (RTX, ["8.9"]), id="TensorRT before TensorRT-RTX"),
        pytest.param(
            (RTX, ["8.9"]), (EngineRecipe(flavor="tensorrt", hardware_compatible=True), ["8.0+"]), id="target first"
        ),
    ],
)
def test_of_several_engines_for_this_gpu_the_most_specific_is_taken(
    exported_directory: Path,
    tmp_path: Path,
    opened: SimpleNamespace,
    add_engine: Callable[..., Path],
    machine: Any,
    first: Any,
    other: Any,
) -> None:
    directory = Path(shutil.copytree(exported_directory, tmp_path / "several"))
    paths = [add_engine(directory, recipe, targets=targets) for recipe, targets in (other, first)]
    manifest = ort.exported(directory)
    signature = Signature.from_json(manifest.signature)
    for found in (paths, paths[::-1]):
        assert trt._choose(found, signature, torch.device("cpu"))[0] == paths[1]
    paths[1].write_bytes(b"damaged")  # then the other one
    assert trt._choose(paths, signature, torch.device("cpu"))[0] == paths[0]
    assert opened.loaded == []


@pytest.mark.parametrize(
    "changed", [{"targets": ["8.6", "8.9"]}, {"targets": ["8.0+"], "precision": "tf32"}], ids=["equal", "precision"]
)
def test_nothing_chooses_between_equal_engines_or_two_precisions(
    exported_directory: Path,
    tmp_path: Path,
    opened: SimpleNamespace,
    add_engine: Callable[..., Path],
    machine: Any,
    changed: dict[str, Any],
) -> None:
    directory = Path(shutil.copytree(exported_directory, tmp_path / "several"))
    add_engine(directory, RTX, targets=["8.9", "12.0"])
    add_engine(directory, RTX, **changed)
    with pytest.raises(DpctlError, match="none before the others"):
        trt.open_denoiser(directory)
    assert opened.loaded == []


def test_an_engine_for_other_shapes_is_refused_with_the_command_before_any_byte_is_loaded(
    exported_directory: Path, tmp_path: Path, opened: SimpleNamespace, add_engine: Callable[..., Path], machine: Any
) -> None:
    directory = Path(shutil.copytree(exported_directory, tmp_path / "other"))
    add_engine(directory, RTX, profile={"sample": [[n, 1, 8, 8] for n in (1, 8, 64)], "timestep": [[1], [8], [64]]})
    with pytest.raises(DpctlError, match=r"other shapes than the signature\n.*sample \[\[1, 1, 8, 8\]") as caught:
        trt.open_denoiser(directory)
    assert f"dpctl export {directory} --out {directory} --force --trt --trt-flavor rtx" in caught.value.todo
    assert opened.loaded == []


def test_a_version_compatible_engine_runs_under_the_lean_runtime(
    with_engine: Path, opened: SimpleNamespace, add_engine: Callable[..., Path]
) -> None:
    recipe = EngineRecipe(flavor="tensorrt", version_compatible=True)
    add_engine(with_engine, recipe, version="11.0.0.1")
    del sys.modules["tensorrt"]  # not needed
    with trt.open_denoiser(with_engine) as denoiser:
        assert denoiser.library is sys.modules["tensorrt_lean"]


def test_a_missing_library_names_the_extra(with_engine: Path, monkeypatch: pytest.MonkeyPatch, machine: Any) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DpctlError, match=r"dpctl-diffusion\[gpu\]"):
        trt.open_denoiser(with_engine)


def test_a_directory_without_an_engine_names_the_command(exported_directory: Path, machine: Any) -> None:
    with pytest.raises(DpctlError, match="--force --trt"):
        trt.open_denoiser(exported_directory)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("device", [None, "cpu"])
def test_without_a_gpu_it_says_so(with_engine: Path, device: str | None) -> None:
    with pytest.raises(DpctlError, match="NVIDIA GPU"):
        trt.open_denoiser(with_engine, device=device)


# --- TensorRT-RTX ------------------------------------------------------------------------------------------------


@pytest.fixture
def rtx_directory(
    exported_directory: Path,
    tmp_path: Path,
    opened: SimpleNamespace,
    checked: Any,
    add_engine: Callable[..., Path],
) -> tuple[Path, SimpleNamespace]:
    """A directory with a TensorRT-RTX engine, and what its runtime was asked for."""
    copied = Path(shutil.copytree(exported_directory, tmp_path / "rtx"))
    add_engine(copied, EngineRecipe(flavor="rtx"))
    asked = SimpleNamespace(read=[], compiled=b"kernels")
    compiled = checked(
        rtx.IRuntimeCache,
        serialize=lambda: asked.compiled,
        deserialize=lambda blob: asked.read.append(blob) or True,
    )
    asked.settings = checked(
        rtx.IRuntimeConfig, create_runtime_cache=compiled, set_runtime_cache=lambda cache: cache is compiled
    )
    opened.changed = {"create_runtime_config": lambda: asked.settings}
    return copied, asked


def test_tensorrt_rtx_runs_in_one_context_that_captures_by_itself(
    rtx_directory: tuple[Path, SimpleNamespace], machine: Any
) -> None:
    directory, asked = rtx_directory
    with trt.open_denoiser(directory) as denoiser, ort.open_denoiser(directory) as reference:
        for batch in (1, 2, 2, 1):
            torch.testing.assert_close(denoiser(*inputs(batch)), reference(*inputs(batch)), rtol=0, atol=1e-6)
        (context,) = machine.contexts
        assert [name for name, *_ in context._calls].count("set_input_shape") == 2 * 3  # at each change of shape
    assert asked.settings.cuda_graph_strategy == rtx.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
    kept = asked.settings.dynamic_shapes_kernel_specialization_strategy
    assert kept == rtx.DynamicShapesKernelSpecializationStrategy.EAGER


def test_tensorrt_rtx_is_profiled_without_its_capture(
    rtx_directory: tuple[Path, SimpleNamespace], machine: Any
) -> None:
    directory, asked = rtx_directory
    machine.layers = [("conv_in/Conv", 1.0)]
    assert [layer.name for layer in trt.profile(directory, runs=1)] == ["conv_in"]
    assert asked.settings.cuda_graph_strategy == rtx.CudaGraphStrategy.DISABLED
    assert len(machine.contexts) == 2


def test_compiled_kernels_are_kept_for_the_next_start(
    rtx_directory: tuple[Path, SimpleNamespace], machine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory, asked = rtx_directory
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with trt.open_denoiser(directory):
        assert asked.read == []
    (kept,) = (tmp_path / "cache").rglob("*.cache")
    assert kept.read_bytes() == b"kernels"
    with trt.open_denoiser(directory):
        assert asked.read == [b"kernels"]
    assert list(kept.parent.iterdir()) == [kept]

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with trt.open_denoiser(directory):
        pass
    assert list(kept.parent.iterdir()) == [kept]


# --- the stand-ins themselves ------------------------------------------------------------------------------------


def test_a_stand_in_has_what_the_real_class_has_and_no_more(checked: Any) -> None:
    context = checked(lean.IExecutionContext, execute_async_v3=True, set_input_shape=True)
    assert context.execute_async_v3(7)
    assert context.execute_async_v3(stream_handle=7)
    assert context.set_input_shape("x", (1, 2))
    with pytest.raises(AttributeError):
        context.execute_async_v2(7)
    for args, kwargs in (((), {}), ((7, 8), {}), (("7",), {}), ((), {"stream": 7})):
        with pytest.raises(AssertionError, match="fits none of"):
            context.execute_async_v3(*args, **kwargs)
    with pytest.raises(AssertionError, match="fits none of"):
        context.set_input_shape("x", {1})
    with pytest.raises(AttributeError):
        context.set_tensor_adress = 1
    with pytest.raises(AssertionError, match="read-only"):
        checked(lean.ICudaEngine).num_io_tensors = 1
