"""Profiles: every layer of the network occurs under its module's name, whichever backend tells of it."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from dpctl import cost, registry
from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.signature import of_unet
from runtime.backends import eager, ort
from runtime.layers import LayerTime, layer_times, module_of, modules_of, random_inputs

PROFILED = [
    name
    for name in registry.names(runtime.BACKENDS)
    if hasattr(registry.load(runtime.BACKENDS, name, "backend"), "profile")
]


def test_these_have_a_profiler() -> None:
    assert {"eager", "ort", "trt"} <= set(PROFILED)


@pytest.fixture(scope="module")
def layers(model_directory: Path) -> set[str]:
    """The modules that do multiply: layers, and attention's two products."""
    found = set(cost.macs_by_module(load_model(model_directory).unet))
    assert {"conv_in", "mid_block.resnets.0.conv1", "down_blocks.0.attentions.0"} <= found
    return found


def test_eager_tells_of_every_module_and_leaves_no_hook(
    model_directory: Path, layers: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    monkeypatch.setattr(eager, "load_model", lambda directory: models.append(load_model(directory)) or models[-1])
    found = eager.profile(model_directory, threads=1, batch_size=2, runs=2)
    (model,) = models
    modules = {name: type(module).__name__ for name, module in model.unet.named_modules()}
    assert layers <= {layer.name for layer in found} <= modules.keys()
    assert all(modules[layer.name] == layer.kind and layer.latency_s > 0 for layer in found)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.unet.modules())


def test_eager_is_timed_in_the_precision_that_it_runs_in(
    model_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[Any] = []
    monkeypatch.setattr(eager, "load_model", lambda directory: models.append(load_model(directory)) or models[-1])
    assert eager.profile(model_directory, precision="bf16", runs=1)
    assert {value.dtype for value in models[0].unet.parameters()} == {torch.bfloat16}


def test_eager_times_add_up_to_the_whole_pass(model_directory: Path) -> None:
    with eager.open_denoiser(model_directory) as denoiser:
        unet = denoiser._network.unet
        tape = eager.Tape(unet, denoiser.device)
        parts = tape.record(lambda: denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1)))
        (began, first), *_, (ended, last) = tape._marks
        tape.close()
    assert first == ("", "UNet2DModel")
    assert last is None
    assert sum(part.latency_s for part in parts) == pytest.approx(ended - began)
    # The activation is one module that a residual block calls several times.
    acts = [part for part in parts if part.name == "mid_block.resnets.0.nonlinearity"]
    assert len(acts) > 1
    (one,) = [each for each in layer_times([parts]) if each.name == "mid_block.resnets.0.nonlinearity"]
    assert one.latency_s == pytest.approx(sum(part.latency_s for part in acts))


def test_a_pruned_network_is_of_the_same_kind(model_directory: Path) -> None:
    with eager.open_denoiser(model_directory) as denoiser:
        unet = denoiser._network.unet
        unet.__class__ = type("PrunedUNet2DModel", (type(unet),), {})
        tape = eager.Tape(unet, denoiser.device)
        parts = tape.record(lambda: denoiser(torch.zeros(1, 1, 8, 8), torch.ones(1)))
    assert {part.kind for part in parts if part.name == ""} == {"UNet2DModel"}


@pytest.mark.parametrize("backend", [name for name in PROFILED if name not in ("eager", "trt")])
def test_an_engine_tells_of_every_layer(
    backend: str, exported_directory: Path, layers: set[str], model_directory: Path
) -> None:
    found = registry.load(runtime.BACKENDS, backend, "backend").profile(
        exported_directory, threads=1, batch_size=2, runs=3
    )
    modules = {name for name, _ in load_model(model_directory).unet.named_modules()}
    assert layers <= {layer.name for layer in found} <= modules
    assert all(layer.latency_s >= 0 for layer in found)
    assert any(layer.latency_s > 0 for layer in found)


def test_ort_runs_the_batch_as_often_as_asked(exported_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    call = ort.OrtDenoiser.__call__
    monkeypatch.setattr(
        ort.OrtDenoiser, "__call__", lambda self, **given: asked.append(len(given["sample"])) or call(self, **given)
    )
    found = ort.profile(exported_directory, threads=1, batch_size=2, runs=3)
    assert asked == [2] * 4  # one of them warms up
    kinds = {layer.name: layer.kind for layer in found if layer.kind in ("Conv", "Gemm")}
    assert kinds["mid_block.resnets.0.conv1"] == "Conv"
    assert kinds["time_embedding.linear_1"] == "Gemm"


def test_ort_profiles_are_read_run_by_run() -> None:
    def node(name: str, kind: str, dur: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "dur": dur, "args": {"op_name": kind}}

    run = {"cat": "Session", "name": "model_run", "dur": 99, "args": {}}
    first = [node("a.conv/Conv_nchwc", "Conv", 4), node("ReorderOutput_token_9", "ReorderOutput", 2), run]
    second = [node("out_sample_nchwc", "Conv", 8), node("a.conv/Add", "Add", 1), node("a.conv/Add_2", "Add", 3), run]
    half = [node("InsertedPrecisionFreeCast_a.conv/Conv_nchwc", "Conv", 5), run]
    beside = [{"cat": "Session", "name": "session_initialization", "dur": 7, "args": {}}]
    assert ort._passes([*beside, *first, *second, *half]) == [
        [LayerTime("a.conv", "Conv", 4e-6), LayerTime("", "ReorderOutput", 2e-6)],
        [LayerTime("conv_out", "Conv", 8e-6), LayerTime("a.conv", "Add", 1e-6), LayerTime("a.conv", "Add", 3e-6)],
        [LayerTime("a.conv", "Conv", 5e-6)],
    ]


def test_ort_leaves_no_file_behind(exported_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ort.tempfile, "tempdir", str(tmp_path))
    ort.profile(exported_directory, threads=1, runs=1)
    assert list(tmp_path.iterdir()) == []


def test_ort_does_not_profile_a_gpu(exported_directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "find_device", torch.device)
    with pytest.raises(DpctlError, match="does not time a GPU's kernels"):
        ort.profile(exported_directory, device="cuda")


def test_profiles_refuse_a_batch_that_was_not_exported(exported_directory: Path) -> None:
    with pytest.raises(DpctlError, match="exported for 1 to 4"):
        ort.profile(exported_directory, batch_size=5)


@pytest.mark.parametrize("backend", PROFILED)
def test_a_profile_has_the_documented_door(backend: str) -> None:
    module = registry.load(runtime.BACKENDS, backend, "backend")
    own = [] if module.RUNS_EXPORTED else ["precision"]
    wanted = ["directory", "threads", "device", *own, "batch_size", "runs"]
    assert list(inspect.signature(module.profile).parameters) == wanted


# --- what they have in common -------------------------------------------------------------------------------------


def test_the_time_is_the_median_of_sums() -> None:
    passes = [
        [LayerTime("a", "Conv", 1.0), LayerTime("a", "Add", 5.0), LayerTime("a", "Conv", 2.0)],
        [LayerTime("a", "Conv", 9.0), LayerTime("b", "Conv", 4.0)],
        [LayerTime("a", "Conv", 4.0), LayerTime("b", "Conv", 6.0)],
    ]
    assert layer_times(passes) == (
        LayerTime("a", "Conv", 4.0),
        LayerTime("a", "Add", 0.0),
        LayerTime("b", "Conv", 4.0),
    )


def test_modules_are_in_the_names_of_nodes() -> None:
    assert (
        module_of("down_blocks.0.resnets.0.nonlinearity/Mul/QuickGeluFusion/") == "down_blocks.0.resnets.0.nonlinearity"
    )
    assert module_of("ReorderOutput_token_9") == ""
    assert modules_of(["a.conv/Conv", "a/Add", "Shape", "a/Add_2"]) == "a.conv + a"


def test_random_inputs_are_taken_by_every_family(families: dict[str, Callable[..., Any]]) -> None:
    for name, make in families.items():
        unet = make()
        signature = of_unet({**unet.config, "_class_name": type(unet).__name__})
        inputs = random_inputs(signature, unet.config, 2)
        with eager.EagerDenoiser(unet) as denoiser:
            assert bool(denoiser(**inputs).isfinite().all()), name


def test_random_inputs_suit_tables(make_unet: Callable[..., Any]) -> None:
    for changed in ({"time_embedding_type": "learned", "num_train_timesteps": 3}, {"num_class_embeds": 2}):
        unet = make_unet(**changed)
        signature = of_unet({**unet.config, "_class_name": type(unet).__name__})
        with eager.EagerDenoiser(unet) as denoiser:
            assert bool(denoiser(**random_inputs(signature, unet.config, 16)).isfinite().all())
