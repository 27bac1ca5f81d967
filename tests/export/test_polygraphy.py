"""NVIDIA's own command-line client accepts what dpctl exports."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dpctl import artifact
from dpctl.signature import Signature

POLYGRAPHY = Path(sys.executable).with_name("polygraphy")

pytestmark = pytest.mark.skipif(not POLYGRAPHY.is_file(), reason="polygraphy is not installed beside this Python")


def polygraphy(*arguments: object) -> str:
    """Run the client with TensorRT-RTX and return what it says; it must succeed."""
    command = [str(POLYGRAPHY), *map(str, arguments)]
    environment = os.environ | {"POLYGRAPHY_USE_TENSORRT_RTX": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def graph_of(directory: Path) -> tuple[Path, Signature]:
    manifest = artifact.read_manifest(directory)
    assert manifest is not None
    return directory / "unet" / "model.fp32.onnx", Signature.from_json(manifest.signature)


@pytest.fixture(params=["plain_exported", "pruned_exported"])
def exported(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_inspect_reads_the_signature(exported: Path) -> None:
    graph, signature = graph_of(exported)
    said = polygraphy("inspect", "model", graph)
    for tensor in (*signature.inputs, *signature.outputs):
        assert f"{tensor.name} [dtype={tensor.dtype}, shape={tensor.shape}]" in said


def test_onnx_runtime_runs_it(exported: Path) -> None:
    graph, signature = graph_of(exported)
    shapes = [f"{tensor.name}:{list(tensor.at(2))}".replace(" ", "") for tensor in signature.inputs]
    said = polygraphy("run", "--onnxrt", graph, "--input-shapes", *shapes)
    assert "PASSED" in said
    assert f"out_sample [dtype=float32, shape={signature.outputs[0].at(2)}]" in said


def test_tensorrt_rtx_converts_it(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph, signature = graph_of(exported)
    bounds: dict[str, list[str]] = {"min": [], "opt": [], "max": []}
    for tensor in signature.inputs:
        for shapes, shape in zip(bounds.values(), signature.bounds(tensor), strict=True):
            shapes.append(f"{tensor.name}:{list(shape)}".replace(" ", ""))
    profile = [word for name, shapes in bounds.items() for word in (f"--trt-{name}-shapes", *shapes)]
    target = ("--convert-to", "trt", "--compute-capabilities", "8.9")
    polygraphy("convert", graph, "-o", tmp_path / "model.engine", *target, *profile)
    assert (tmp_path / "model.engine").stat().st_size > 0
