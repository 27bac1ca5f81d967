"""The manifest of an engine, without any engine: what is refused, and by which command it is built again."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from dpctl import artifact
from dpctl.errors import DpctlError
from dpctl.recipe import EngineRecipe, to_dict
from runtime import engine as engines
from runtime.engine import EngineManifest

HERE: dict[str, str] = {"version": "11.4.0.106", "capability": "8.9", "gpu": "NVIDIA L4"}


@pytest.fixture
def engine(tmp_path: Path) -> Path:
    """An engine of a few bytes beside a graph of as many, with a manifest that is true."""
    folder = tmp_path / "my models" / "unet"
    folder.mkdir(parents=True)
    graph, path = folder / "model.fp16.onnx", folder / engines.name("fp16", "tensorrt", ["8.9"])
    graph.write_bytes(b"graph")
    path.write_bytes(b"engine")
    save(path, manifest(path, graph))
    return path


def manifest(path: Path, graph: Path, **changed: Any) -> EngineManifest:
    values: dict[str, Any] = {
        "flavor": "tensorrt",
        "version": HERE["version"],
        "targets": ["8.9"],
        "gpu": HERE["gpu"],
        "precision": "fp16",
        "profile": {"sample": [[1, 1, 8, 8], [2, 1, 8, 8], [4, 1, 8, 8]]},
        "weights_bytes": 100,
        "activation_bytes": None,
        "build_s": 1.5,
        "sha256": artifact.hash_file(path),
        "size_bytes": path.stat().st_size,
        "onnx": engines.graph_digests(graph),
        "recipe": to_dict(EngineRecipe(flavor="tensorrt", workspace_gib=2.0)),
        "built_on": {},
    }
    return EngineManifest(**values | changed)


def save(path: Path, about: EngineManifest) -> None:
    engines.sidecar(path).write_text(about.to_json())


def test_a_manifest_survives_its_file(engine: Path) -> None:
    about = engines.read(engine)
    assert about == manifest(engine, engine.with_name("model.fp16.onnx"))
    assert about.engine_recipe == EngineRecipe(flavor="tensorrt", workspace_gib=2.0)
    engines.check(engine, about, **HERE)


@pytest.mark.parametrize(
    ("targets", "name"),
    [
        (["8.9"], "model.fp16.tensorrt-sm89.engine"),
        (["8.9", "12.0"], "model.fp16.tensorrt-sm89+sm120.engine"),
        (["8.0+"], "model.fp16.tensorrt-sm80up.engine"),
    ],
)
def test_the_name_says_precision_flavor_and_target(targets: list[str], name: str) -> None:
    assert engines.name("fp16", "tensorrt", targets) == name


@pytest.mark.parametrize("damage", ["missing", "garbage", "a list", "bytes", "no sha256", "one more", "wrong kind"])
def test_an_engine_without_a_readable_manifest_is_refused(engine: Path, damage: str) -> None:
    path = engines.sidecar(engine)
    values = json.loads(path.read_text())
    if damage == "missing":
        path.unlink()
    elif damage == "garbage":
        path.write_text("{")
    elif damage == "bytes":
        path.write_bytes(b"\xff\xfe")
    else:
        changed: dict[str, Any] = {
            "a list": [],
            "no sha256": {name: value for name, value in values.items() if name != "sha256"},
            "one more": values | {"more": 1},
            "wrong kind": values | {"targets": "8.9"},
        }
        path.write_text(json.dumps(changed[damage]))
    with pytest.raises(
        DpctlError, match=r"dpctl export '.*my models' --out '.*my models' --force --trt --trt-flavor tensorrt$"
    ):
        engines.read(engine)


@pytest.mark.parametrize(
    ("precision", "recipe", "target"),
    [
        ("fp16", EngineRecipe(flavor="rtx", compute_capability=("8.9", "12.0")), ["8.9", "12.0"]),
        ("tf32", EngineRecipe(flavor="rtx", tf32=True), ["8.0+"]),
        ("bf16", EngineRecipe(flavor="tensorrt", hardware_compatible=True), ["8.0+"]),
        ("fp32", EngineRecipe(flavor="tensorrt"), ["8.9"]),
    ],
)
def test_without_its_manifest_the_name_says_what_is_to_be_built(
    tmp_path: Path, precision: str, recipe: EngineRecipe, target: list[str]
) -> None:
    path = tmp_path / "unet" / engines.name(precision, recipe.flavor, target)
    with pytest.raises(DpctlError) as caught:
        engines.read(path)
    assert caught.value.todo == f"build the engine again: {engines.rebuild(path, recipe)}"


@pytest.mark.parametrize(
    "changed",
    [
        {"format_version": 2},
        {"flavor": "rt"},
        {"onnx": {"../../secret": "0" * 64}},
        {"onnx": {"model.onnx": 1}},
        {"targets": ["sm89"]},
        {"targets": [8.9]},
        {"targets": []},
        {"targets": ["8." + "9" * 5000]},
        {"onnx": {"": "0" * 64, "model.onnx": "0" * 64}},
        {"onnx": {"model\0.onnx": "0" * 64}},
        {"recipe": {"compute_capability": [8.9]}},
        {"recipe": {"flavor": "rtx"}},
        {"recipe": {"flavour": "rtx"}},
        {"build_s": "1"},
        {"weights_bytes": 1.5},
    ],
)
def test_values_that_are_none_are_refused(engine: Path, changed: dict[str, Any]) -> None:
    save(engine, dataclasses.replace(engines.read(engine), **changed))
    with pytest.raises(DpctlError, match="manifest cannot be read"):
        engines.read(engine)


def test_a_changed_engine_is_refused_with_the_command_that_builds_it(engine: Path) -> None:
    engine.write_bytes(b"other")
    with pytest.raises(DpctlError, match="changed or damaged") as caught:
        engines.check(engine, engines.read(engine), **HERE)
    directory = engine.parent.parent
    assert caught.value.todo == (
        f"build the engine again: dpctl export '{directory}' --out '{directory}' --force --trt "
        "--trt-flavor tensorrt --workspace 2.0"
    )


def test_a_changed_or_missing_graph_is_refused(engine: Path) -> None:
    graph = engine.with_name("model.fp16.onnx")
    graph.write_bytes(b"changed")
    with pytest.raises(DpctlError, match="not the one that the engine was built from"):
        engines.check(engine, engines.read(engine), **HERE)
    graph.unlink()
    with pytest.raises(DpctlError, match="cannot be read"):
        engines.check(engine, engines.read(engine), **HERE)


def test_weights_beside_the_graph_belong_to_it(engine: Path) -> None:
    graph = engine.with_name("model.fp16.onnx")
    data = engine.with_name("model.fp16.onnx.data")
    data.write_bytes(b"weights")
    save(engine, manifest(engine, graph))
    engines.check(engine, engines.read(engine), **HERE)
    data.write_bytes(b"others!")
    with pytest.raises(DpctlError, match=r"onnx\.data"):
        engines.check(engine, engines.read(engine), **HERE)


@pytest.mark.parametrize(
    ("built", "here", "compatible", "runs"),
    [
        ("11.4.0.106", "11.4.0.106", False, True),
        ("11.4.0.106", "11.4.1.2", False, False),
        ("11.4.0.106", "11.4.1.2", True, True),
        ("11.4.0.106", "11.10.0.1", True, True),
        ("11.4.0.106", "11.3.0.9", True, False),
        ("10.16.0.1", "11.4.0.106", True, False),  # by the lean runtime of TensorRT 10
    ],
)
def test_another_version_is_refused_unless_it_is_compatible(
    engine: Path, built: str, here: str, compatible: bool, runs: bool
) -> None:
    recipe = to_dict(EngineRecipe(flavor="tensorrt", version_compatible=compatible))
    about = dataclasses.replace(engines.read(engine), version=built, recipe=recipe)
    if runs:
        engines.check(engine, about, **HERE | {"version": here})
    else:
        with pytest.raises(DpctlError, match=f"built by TensorRT {built}, here is {here}") as caught:
            engines.check(engine, about, **HERE | {"version": here})
        assert "--force --trt --trt-flavor tensorrt" in caught.value.todo


@pytest.mark.parametrize(
    ("targets", "gpu", "capability", "runs"),
    [
        (["8.9"], None, "8.9", True),
        (["8.9"], None, "8.6", False),
        (["8.9", "12.0"], None, "12.0", True),
        (["8.0+"], None, "12.0", True),
        (["8.0+"], None, "8.0", True),
        (["8.0+"], None, "7.5", False),
        (["8.9"], "NVIDIA L4", "8.9", True),
        (["8.9"], "NVIDIA L40S", "8.9", False),
    ],
)
def test_another_gpu_is_refused(engine: Path, targets: list[str], gpu: str | None, capability: str, runs: bool) -> None:
    about = dataclasses.replace(engines.read(engine), targets=targets, gpu=gpu)
    here = HERE | {"capability": capability}
    if runs:
        engines.check(engine, about, **here)
    else:
        with pytest.raises(DpctlError, match=f"this is NVIDIA L4, compute capability {capability}"):
            engines.check(engine, about, **here)


def test_the_command_builds_a_rtx_engine_for_the_gpu_that_is_here(engine: Path) -> None:
    recipe = EngineRecipe(flavor="rtx", compute_capability=("8.9", "12.0"), tf32=True, optimization_level=2)
    about = dataclasses.replace(engines.read(engine), flavor="rtx", targets=["8.9"], gpu=None, recipe=to_dict(recipe))
    with pytest.raises(DpctlError) as caught:
        engines.check(engine, about, **HERE | {"capability": "8.6"})
    assert caught.value.todo.endswith("--trt-flavor rtx --compute-capability 8.6 --optimization-level 2 --tf32")
    assert "--compute-capability 8.9,12.0" in engines.rebuild(engine, recipe)
