"""New weights into an engine: what is compared before anything is touched. Stand-ins load it, as that needs a GPU."""

import dataclasses
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from dpctl import artifact
from dpctl.errors import DpctlError
from dpctl.models import load_model, write_pipeline
from dpctl.recipe import EngineRecipe, ExportRecipe, to_dict
from export import export_model, refit, to_tensorrt
from export.engines import export_engine
from runtime import engine as engines
from runtime.backends.trt import require

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'dpctl-diffusion[rtx]'")
NAME = "model.fp32.rtx-sm89.engine"


@pytest.fixture(scope="module")
def with_engine(plain_exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("refit") / "exported"
    export_engine(plain_exported, out, EngineRecipe(flavor="rtx", compute_capability=("8.9",)))
    return out


@pytest.fixture
def engine(with_engine: Path, tmp_path: Path) -> Path:
    """A real engine, said to be built for new weights: such a build needs a GPU."""
    directory = Path(shutil.copytree(with_engine, tmp_path / "here"))
    path = directory / "unet" / NAME
    about = engines.read(path)
    recipe = dataclasses.replace(about.engine_recipe, refit=True)
    engines.sidecar(path).write_text(dataclasses.replace(about, recipe=to_dict(recipe)).to_json())
    rewrite_manifest(directory)
    return path


def rewrite_manifest(directory: Path) -> None:
    manifest = artifact.read_manifest(directory)
    assert manifest is not None
    manifest = dataclasses.replace(manifest, files=artifact.hash_files(directory))
    (directory / artifact.MANIFEST).write_text(manifest.to_json())


@pytest.fixture(scope="module")
def tuned(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same architecture with other weights."""
    directory = tmp_path_factory.mktemp("tuned") / "model"
    unet = type(plain.unet).from_config(plain.unet.config)
    with torch.no_grad():
        for new, old in zip(unet.parameters(), plain.unet.parameters(), strict=True):
            new.copy_(old + 0.01)
    write_pipeline(directory, unet=unet, scheduler=plain.scheduler)
    return directory


@pytest.fixture(scope="module")
def tuned_exported(tuned: Path) -> Path:
    """The same, exported as the engine's directory was."""
    export_model(load_model(tuned), tuned.with_name("exported"), ExportRecipe(batch=(1, 2, 4)))
    return tuned.with_name("exported")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, checked: Any, stand_in: Any) -> SimpleNamespace:
    """Put a GPU and a loading runtime in the place of none; `said` is what the refitter and its parser answer."""
    said = SimpleNamespace(taken=True, missing=[], done=True, graphs=[], loaded=[], flags=[])
    settings = checked(rtx.ISerializationConfig, set_flag=lambda flag: said.flags.append(flag) or True)
    loaded = checked(
        rtx.ICudaEngine,
        create_serialization_config=lambda: settings,
        serialize_with_config=lambda config: b"an engine with new weights",
    )
    runtime = checked(rtx.Runtime, deserialize_cuda_engine=lambda plan: said.loaded.append(plan) or loaded)
    refitter = checked(rtx.Refitter, get_missing_weights=lambda: said.missing, refit_cuda_engine=lambda: said.done)
    parser = checked(
        rtx.OnnxParserRefitter, refit_from_file=lambda model: said.graphs.append(Path(model).read_bytes()) or said.taken
    )
    library = stand_in(
        rtx,
        "tensorrt_rtx",
        Runtime=lambda logger: runtime,
        Refitter=lambda engine, logger: refitter,
        OnnxParserRefitter=lambda refitter, logger: parser,
    )
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    monkeypatch.setattr(refit, "_gpu", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA L4")
    monkeypatch.setattr(refit, "capability_of", lambda device: "8.9")
    return said


def contents(folder: Path) -> dict[str, str]:
    return artifact.hash_files(folder) | {"": artifact.hash_file(folder / artifact.MANIFEST)}


# --- what it does ------------------------------------------------------------------------------------------------


def test_the_directory_then_holds_the_new_graph_and_the_engine_of_it(
    engine: Path, tuned: Path, gpu: SimpleNamespace
) -> None:
    old, directory = engine.read_bytes(), engine.parent.parent
    graph = engine.with_name("model.fp32.onnx")
    before = graph.read_bytes()
    manifest = refit.refit(engine, str(tuned))
    artifact.verify_files(directory, manifest)
    assert manifest == artifact.read_manifest(directory)
    assert gpu.loaded == [old]
    assert gpu.graphs == [graph.read_bytes()]
    assert graph.read_bytes() != before
    assert engine.read_bytes() == b"an engine with new weights"
    assert gpu.flags == [rtx.SerializationFlag.INCLUDE_REFIT]  # so that it can be done again
    about = engines.read(engine)
    engines.check(engine, about, version=rtx.__version__, capability="8.9", gpu="any")
    assert about.engine_recipe.refit
    assert (manifest.parity or {})["verdict"] == "passed"
    assert set(manifest.stats["engines"]) == {NAME}


def test_an_exported_model_will_do_and_out_leaves_the_old_directory(
    engine: Path, tuned_exported: Path, gpu: SimpleNamespace, tmp_path: Path
) -> None:
    before = contents(engine.parent.parent)
    manifest = refit.refit(engine, str(tuned_exported), tmp_path / "out")
    artifact.verify_files(tmp_path / "out", manifest)
    assert contents(engine.parent.parent) == before
    assert gpu.graphs == [(tuned_exported / "unet" / "model.fp32.onnx").read_bytes()]


# --- what it refuses, and then leaves everything as it was -------------------------------------------------------


@pytest.fixture
def refuse(engine: Path) -> Callable[..., DpctlError]:
    def run(model: Path, words: str, **how: Any) -> DpctlError:
        before = contents(engine.parent.parent)
        with pytest.raises(DpctlError, match=words) as caught:
            refit.refit(engine, str(model), **how)
        assert contents(engine.parent.parent) == before
        return caught.value

    return run


@pytest.mark.parametrize("part", [".", "unet/missing.engine"])
def test_what_is_no_engine_is_named(with_engine: Path, tuned: Path, part: str) -> None:
    with pytest.raises(DpctlError, match="no such engine") as caught:
        refit.refit(with_engine / part, str(tuned))
    assert str(with_engine / part) in caught.value.got


def test_an_engine_that_was_not_built_for_it_names_the_command(with_engine: Path, tuned: Path) -> None:
    with pytest.raises(DpctlError, match="not built to be refitted") as caught:
        refit.refit(with_engine / "unet" / NAME, str(tuned))
    assert caught.value.todo.endswith("--compute-capability 8.9 --refit")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_says_so_before_the_model_is_exported(
    refuse: Callable[..., DpctlError], tuned: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "export_model", lambda *_, **__: pytest.fail("exported"))
    refuse(tuned, "on the GPU that it is for")


def test_another_gpu_is_refused(
    refuse: Callable[..., DpctlError], tuned: Path, gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(refit, "capability_of", lambda device: "8.6")
    refuse(tuned, "for another GPU")
    assert gpu.loaded == []


def test_a_model_of_another_shape_is_refused_by_the_name_of_the_weight(
    refuse: Callable[..., DpctlError], plain: Any, gpu: SimpleNamespace, tmp_path: Path
) -> None:
    unet = type(plain.unet).from_config({**plain.unet.config, "block_out_channels": (16,)})
    write_pipeline(tmp_path / "wider", unet=unet, scheduler=plain.scheduler)
    refuse(tmp_path / "wider", r"conv_in\.weight: FLOAT \[16, 1, 3, 3\] against FLOAT \[8, 1, 3, 3\]")
    assert gpu.loaded == []


def test_a_model_of_another_signature_is_refused(
    refuse: Callable[..., DpctlError], pruned_exported: Path, gpu: SimpleNamespace
) -> None:
    refuse(pruned_exported, "other inputs, outputs or ranges")


@pytest.mark.parametrize("change", [{"taken": False}, {"missing": ["conv_in.weight"]}, {"done": False}])
def test_weights_that_the_engine_does_not_take_leave_everything_as_it_was(
    refuse: Callable[..., DpctlError], tuned_exported: Path, gpu: SimpleNamespace, change: dict[str, Any]
) -> None:
    vars(gpu).update(change)
    assert "dpctl export" in refuse(tuned_exported, "does not take the new weights").todo


def test_other_engines_would_keep_the_old_weights(
    engine: Path, refuse: Callable[..., DpctlError], tuned: Path, gpu: SimpleNamespace
) -> None:
    engine.with_name("model.fp32.rtx-sm120.engine").write_bytes(b"another")
    rewrite_manifest(engine.parent.parent)
    refuse(tuned, "rtx-sm120")


def test_force_without_another_directory_is_refused(refuse: Callable[..., DpctlError], tuned: Path) -> None:
    refuse(tuned, "--force is for another directory", force=True)


# --- shapes ------------------------------------------------------------------------------------------------------


def changed(path: Path, out: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(path)
    change(model.graph)
    onnx.save(model, out)
    return out


def test_two_exports_of_one_architecture_have_one_shape(plain_exported: Path, tmp_path: Path) -> None:
    graph = plain_exported / "unet" / "model.fp32.onnx"

    def other_values(graph: Any) -> None:
        for tensor in graph.initializer:
            if tensor.data_type == onnx.TensorProto.FLOAT:
                tensor.raw_data = bytes(len(tensor.raw_data))

    refit.require_same_shape(graph, graph)
    refit.require_same_shape(graph, changed(graph, tmp_path / "new.onnx", other_values))


def test_other_operations_are_another_shape(plain_exported: Path, tmp_path: Path) -> None:
    graph = plain_exported / "unet" / "model.fp32.onnx"

    def sigmoid_to_tanh(graph: Any) -> None:
        next(node for node in graph.node if node.op_type == "Sigmoid").op_type = "Tanh"

    with pytest.raises(DpctlError, match="the operation .*Sigmoid"):
        refit.require_same_shape(graph, changed(graph, tmp_path / "new.onnx", sigmoid_to_tanh))
    with pytest.raises(DpctlError, match="more or fewer operations"):
        refit.require_same_shape(graph, changed(graph, tmp_path / "fewer.onnx", lambda graph: graph.node.pop()))


def test_the_parser_keeps_the_names_of_the_weights(plain_exported: Path) -> None:
    """By these names the refitter finds them; only what it folds together (a norm's scale and shift) has others."""
    graph = plain_exported / "unet" / "model.fp32.onnx"
    library = require("rtx")
    builder = library.Builder(to_tensorrt.log_of(library))
    network, _parser = to_tensorrt.parse(library, builder, graph)
    weights = [tensor for tensor in onnx.load(graph).graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT]
    folded = {
        name for node in onnx.load(graph).graph.node if node.op_type == "BatchNormalization" for name in node.input
    }
    names = {tensor.name for tensor in weights if tensor.name.endswith((".weight", ".bias"))} - folded
    assert len(names) > 20
    assert [name for name in sorted(names) if not network.mark_weights_refittable(name)] == []
