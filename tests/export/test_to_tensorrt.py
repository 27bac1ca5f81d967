"""Real engines, built ahead of time by TensorRT-RTX on the processor."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from dpctl import artifact
from dpctl.errors import DpctlError
from dpctl.recipe import EngineRecipe
from dpctl.signature import Signature, Sizes, Tensor
from export import to_tensorrt
from export.engines import export_engine
from runtime import engine as engines
from runtime.backends.trt import log_of

rtx = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'dpctl-diffusion[rtx]'")
RTX = EngineRecipe(flavor="rtx", compute_capability=("8.9",))
NAME = "model.fp32.rtx-sm89.engine"
SIGNATURE = Signature((Tensor("x", "float32", ("batch", 4)),), (Tensor("y", "float32", ("batch", 4)),), (1, 2, 4))


@pytest.fixture(scope="module")
def with_engine(plain_exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shared: copy it before changing a file."""
    out = tmp_path_factory.mktemp("engine") / "exported"
    export_engine(plain_exported, out, dataclasses.replace(RTX, compute_capability=("12.0", "8.9")))
    return out


def write_graph(path: Path, nodes: list[Any], weights: dict[str, Any] | None = None, **domains: int) -> Path:
    """Write an ONNX graph from x [batch, 4] to y [batch, 4]."""
    inputs, outputs = ([helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])] for name in ("x", "y"))
    tensors = [numpy_helper.from_array(values, name) for name, values in (weights or {}).items()]
    imports = [helper.make_opsetid("", 18), *(helper.make_opsetid(name, number) for name, number in domains.items())]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    return path


def gpu(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)


# --- an engine beside its graph ----------------------------------------------------------------------------------


def test_the_directory_holds_an_engine_with_its_manifest_and_layers(plain_exported: Path, with_engine: Path) -> None:
    manifest = artifact.read_manifest(with_engine)
    assert manifest is not None
    artifact.verify_files(with_engine, manifest)
    before = artifact.read_manifest(plain_exported)
    assert before is not None
    engine = with_engine / "unet" / "model.fp32.rtx-sm89+sm120.engine"
    new = {f"unet/{path.name}" for path in (engine, engines.sidecar(engine), engines.layers(engine))}
    assert manifest.files.keys() - before.files.keys() == new
    assert {name: manifest.files[name] for name in before.files} == before.files
    assert manifest.recipe["engine"]["flavor"] == "rtx"
    assert manifest.stats["engines"][engine.name]["targets"] == ["8.9", "12.0"]
    assert (manifest.parent, manifest.parity) == (before.parent, before.parity)


def test_the_manifest_of_the_engine_says_what_was_built(with_engine: Path) -> None:
    engine = with_engine / "unet" / "model.fp32.rtx-sm89+sm120.engine"
    about = engines.read(engine)
    assert (about.flavor, about.version, about.precision, about.gpu) == ("rtx", rtx.__version__, "fp32", None)
    assert about.targets == ["8.9", "12.0"]
    assert about.profile == {"sample": [[n, 1, 8, 8] for n in (1, 2, 4)], "timestep": [[n] for n in (1, 2, 4)]}
    assert about.size_bytes == engine.stat().st_size
    graph = with_engine / "unet" / "model.fp32.onnx"
    assert about.onnx == {graph.name: artifact.hash_file(graph)}
    weights = sum(np.prod(tensor.dims) * 4 for tensor in onnx.load(graph).graph.initializer if tensor.data_type == 1)
    assert about.weights_bytes is not None
    assert 0.5 * weights < about.weights_bytes < 2 * weights
    assert about.activation_bytes is not None
    assert about.activation_bytes > 0
    engines.check(engine, about, version=rtx.__version__, capability="12.0", gpu="any")


def test_the_layers_are_those_of_the_parsed_network_without_a_gpu(with_engine: Path) -> None:
    told = json.loads(engines.layers(with_engine / "unet" / "model.fp32.rtx-sm89+sm120.engine").read_text())
    if not torch.cuda.is_available():
        assert told["of"].startswith("the parsed network")
    named = {layer["name"]: layer for layer in told["layers"]}
    convolution = named["conv_in/Conv"]
    assert convolution["type"] == "CONVOLUTION"
    assert [tensor["name"] for tensor in convolution["inputs"]] == ["sample"]
    assert {tensor["dtype"] for tensor in convolution["outputs"]} == {"FLOAT"}


def test_an_engine_is_added_in_place_and_a_second_one_beside_it(with_engine: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(with_engine, tmp_path / "here"))
    with pytest.raises(DpctlError, match="the output exists"):
        export_engine(directory, directory, RTX)
    manifest = export_engine(directory, directory, RTX, force=True)
    assert set(manifest.stats["engines"]) == {NAME, "model.fp32.rtx-sm89+sm120.engine"}
    artifact.verify_files(directory, manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_without_a_compute_capability_it_is_for_every_gpu_from_ampere_on(plain_exported: Path, tmp_path: Path) -> None:
    manifest = export_engine(plain_exported, tmp_path / "out", EngineRecipe(flavor="rtx"))
    assert manifest.stats["engines"]["model.fp32.rtx-sm80up.engine"]["targets"] == ["8.0+"]


def test_tf32_is_another_precision(plain_exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    configure = to_tensorrt._configure

    def watched(library: ModuleType, config: Any, recipe: EngineRecipe) -> None:
        configure(library, config, recipe)
        seen.append(config.get_flag(library.BuilderFlag.TF32))

    monkeypatch.setattr(to_tensorrt, "_configure", watched)
    for tf32 in (False, True):
        manifest = export_engine(plain_exported, tmp_path / f"{tf32}", dataclasses.replace(RTX, tf32=tf32))
        label = "tf32" if tf32 else "fp32"
        assert manifest.stats["engines"][f"model.{label}.rtx-sm89.engine"]["precision"] == label
    assert seen == [False, True]
    with pytest.raises(DpctlError, match="products of float32"):
        to_tensorrt.check(dataclasses.replace(RTX, tf32=True), "fp16")


def test_weights_beside_the_graph_are_found_and_digested(tmp_path: Path) -> None:
    graph = write_graph(
        tmp_path / "model.fp32.onnx",
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="product")],
        {"w": np.eye(4, dtype=np.float32)},
    )
    onnx.save(onnx.load(graph), graph, save_as_external_data=True, location=f"{graph.name}.data", size_threshold=0)
    _, about = to_tensorrt.build(graph, SIGNATURE, RTX, "fp32")
    assert set(about.onnx) == {graph.name, f"{graph.name}.data"}


def test_dynamic_sizes_are_in_the_profile() -> None:
    tensor = Tensor("sample", "float32", ("batch", 1, "height", "width"))
    signature = Signature((tensor,), (tensor,), (1, 2, 4), Sizes((8, 16, 32), 8))
    assert signature.bounds(tensor) == ((1, 1, 8, 8), (2, 1, 16, 16), (4, 1, 32, 32))


def test_every_option_is_set_by_a_call_that_exists() -> None:
    """TensorRT's own options too: TensorRT-RTX has the same classes, if not the same abilities."""
    config = rtx.Builder(log_of(rtx)).create_builder_config()
    recipe = EngineRecipe("tensorrt", ("8.9", "12.0"), 2.0, 4, True, True, True, True)
    assert all(getattr(recipe, field.name) != field.default for field in dataclasses.fields(recipe))
    to_tensorrt._configure(rtx, config, recipe)
    flags = rtx.BuilderFlag
    assert all(map(config.get_flag, (flags.TF32, flags.REFIT, flags.VERSION_COMPATIBLE, flags.EXCLUDE_LEAN_RUNTIME)))
    assert config.get_memory_pool_limit(rtx.MemoryPoolType.WORKSPACE) == 2 * 2**30
    assert (config.builder_optimization_level, config.num_compute_capabilities) == (4, 2)
    assert config.profiling_verbosity == rtx.ProfilingVerbosity.DETAILED


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("earlier", [None, b"", b"of another version"])
def test_a_timing_cache_that_does_not_fit_is_an_empty_one(tmp_path: Path, earlier: bytes | None) -> None:
    config, path = rtx.Builder(log_of(rtx)).create_builder_config(), tmp_path / "timings"
    if earlier is not None:
        path.write_bytes(earlier)
    assert to_tensorrt._timing_cache(config, path) is not None
    assert bytes(config.get_timing_cache().serialize())


# --- refusals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"flavor": "trt"}, "choose one of: auto, tensorrt, rtx"),
        ({"compute_capability": ("9.0",)}, "choose from: 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"),
        ({"compute_capability": ("8.9", "8.9")}, "each once"),
        ({"compute_capability": ("ada",)}, "ada"),
        ({"optimization_level": 6}, "give 0"),
        ({"compute_capability": ("8.9", "")}, "an empty one"),
        ({"workspace_gib": 0.0}, "got: 0 GiB"),
        ({"workspace_gib": float("nan")}, "got: nan GiB"),
        ({"workspace_gib": float("inf")}, "no size that memory has"),
        ({"workspace_gib": 1e300}, "no size that memory has"),
        ({"version_compatible": True}, "leave --version-compatible out"),
        ({"hardware_compatible": True}, "leave --hardware-compatible out"),
        ({"refit": True}, "only built with a GPU"),
    ],
)
def test_what_tensorrt_rtx_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], words: str
) -> None:
    gpu(monkeypatch, False)
    with pytest.raises(DpctlError, match=words):
        to_tensorrt.check(dataclasses.replace(RTX, **changed), "fp32")


class StandIn(ModuleType):
    """A TensorRT as far as the refusals look at it."""

    __version__ = "11.4.0"


@pytest.mark.parametrize(
    ("there", "changed", "version", "words"),
    [
        (False, {}, "11.4.0", "--trt-flavor rtx, which needs none"),
        (True, {"compute_capability": ("8.9",)}, "11.4.0", "for the GPU at hand"),
        (True, {"refit": True}, "11.3.0.1", "install another version"),
        (True, {"refit": True}, "11.4.0", None),
        (True, {"hardware_compatible": True, "version_compatible": True}, "10.13.2", None),
    ],
)
def test_what_tensorrt_cannot_do_is_refused(
    monkeypatch: pytest.MonkeyPatch, there: bool, changed: dict[str, Any], version: str, words: str | None
) -> None:
    library = StandIn("tensorrt")
    library.__version__ = version
    monkeypatch.setitem(sys.modules, "tensorrt", library)
    gpu(monkeypatch, there)
    recipe = EngineRecipe(flavor="tensorrt", **changed)
    if words is None:
        assert to_tensorrt.check(recipe, "fp32") == recipe
    else:
        with pytest.raises(DpctlError, match=words):
            to_tensorrt.check(recipe, "fp32")


@pytest.mark.parametrize(
    ("there", "installed", "flavor"), [(False, True, "rtx"), (True, False, "rtx"), (True, True, "tensorrt")]
)
def test_auto_takes_what_the_machine_can_do(
    monkeypatch: pytest.MonkeyPatch, there: bool, installed: bool, flavor: str
) -> None:
    gpu(monkeypatch, there)
    monkeypatch.setitem(sys.modules, "tensorrt", StandIn("tensorrt") if installed else None)
    assert to_tensorrt.check(EngineRecipe(), "fp32").flavor == flavor


@pytest.mark.parametrize(
    ("flavor", "module", "extra"), [("rtx", "tensorrt_rtx", "rtx"), ("tensorrt", "tensorrt", "gpu")]
)
def test_a_missing_library_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, flavor: str, module: str, extra: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    gpu(monkeypatch, True)
    with pytest.raises(DpctlError, match=rf"dpctl-diffusion\[{extra}\]"):
        to_tensorrt.check(EngineRecipe(flavor=flavor), "fp32")


def test_without_a_gpu_the_flavor_that_needs_one_names_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu(monkeypatch, False)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(DpctlError, match="--trt-flavor rtx"):
        to_tensorrt.check(EngineRecipe(flavor="tensorrt"), "fp32")


def test_a_node_that_the_parser_cannot_read_is_named(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"], name="fine"),
        helper.make_node("Foo", ["r"], ["y"], name="mid_block/Foo", domain="my.own"),
    ]
    graph = write_graph(tmp_path / "model.fp32.onnx", nodes, **{"my.own": 1})
    with pytest.raises(DpctlError, match=r"node mid_block/Foo \(Foo\): .*Plugin not found") as caught:
        to_tensorrt.build(graph, SIGNATURE, RTX, "fp32")
    assert "backend ort" in caught.value.todo
    assert [path.name for path in tmp_path.iterdir()] == [graph.name]


def test_a_file_that_is_no_graph_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.fp32.onnx").write_bytes(b"\0garbage" * 30)
    with pytest.raises(DpctlError, match="not those of the signature"):
        to_tensorrt.build(tmp_path / "model.fp32.onnx", SIGNATURE, RTX, "fp32")


def test_what_the_builder_refuses_is_said_and_nothing_is_left(plain_exported: Path, tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match="OutOfMemory|workspace limit") as caught:
        export_engine(plain_exported, tmp_path / "out", dataclasses.replace(RTX, workspace_gib=1e-6))
    assert "--workspace" in caught.value.todo
    with pytest.raises(DpctlError, match=r"Turing \(SM75\): FP32 GEMM is not supported") as caught:
        export_engine(plain_exported, tmp_path / "out", dataclasses.replace(RTX, compute_capability=("7.5",)))
    assert "leave 7.5 out or export with --precision fp16" in caught.value.todo
    assert list(tmp_path.iterdir()) == []


def test_a_graph_that_changed_after_its_export_gets_no_engine(plain_exported: Path, tmp_path: Path) -> None:
    directory = Path(shutil.copytree(plain_exported, tmp_path / "here"))
    with (directory / "unet" / "model.fp32.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(DpctlError, match="differs from its digest"):
        export_engine(directory, directory, RTX, force=True)
    assert not list(directory.rglob("*.engine"))


def test_a_model_that_was_not_exported_gets_no_engine(plain: Any, tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match="dpctl export"):
        export_engine(plain.directory, tmp_path / "out", RTX)


def test_a_full_disk_leaves_nothing(plain_exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DpctlError, match="no space left"):
        export_engine(plain_exported, tmp_path / "out", RTX)
    assert list(tmp_path.iterdir()) == []
