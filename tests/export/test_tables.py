"""The scripts behind the tables of docs/export.md, on a toy."""

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from scripts import opset_comparison, precision_table


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_precision_is_a_line_with_its_error_beside_torchs(plain: Any, tmp_path: Path) -> None:
    lines = [
        dict(zip(precision_table.HEADS, cells(line), strict=True))
        for line in precision_table.rows("toy", plain, tmp_path)
    ]
    assert [line["precision"] for line in lines] == ["fp32", "fp16", "bf16"]
    for line in lines[1:]:
        own, ours = float(line["torch's own error"]), float(line["the graph's"])
        assert 1e-5 < own < 0.1
        assert 1e-5 < ours < 1.5 * own
        assert int(line["nodes in float32"]) > 0
    assert float(lines[0]["the graph's"]) < 1e-5


@pytest.fixture
def toy_comparison(plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(opset_comparison, "NETWORKS", {"toy": lambda: plain.unet})
    monkeypatch.setattr(opset_comparison, "ROUNDS", {1: 2, 8: 2})
    monkeypatch.setattr(opset_comparison, "BUILDS", 1)
    return tmp_path


@pytest.mark.slow
def test_only_stash_type_gives_a_normalization_low_values(toy_comparison: Path) -> None:
    comparison = opset_comparison.Comparison("toy", toy_comparison)
    found = {}
    for variant in opset_comparison.FP16:
        graph = ir.load(comparison.graph(variant)).graph
        norms = [node for node in graph if node.op_type in ("InstanceNormalization", "GroupNormalization")]
        found[variant] = {(node.op_type, node.inputs[0].dtype) for node in norms}
    assert found == {
        "fp16 18": {("InstanceNormalization", ir.DataType.FLOAT)},
        "fp16 22": {("GroupNormalization", ir.DataType.FLOAT)},
        "fp16 22, stash_type": {("GroupNormalization", ir.DataType.FLOAT16)},
    }


@pytest.mark.trt
def test_what_was_measured_is_not_measured_again(toy_comparison: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    first = list(opset_comparison.rows("toy", toy_comparison))
    assert len(first) == len(opset_comparison.FP32) + len(opset_comparison.FP16)
    monkeypatch.setattr(opset_comparison.Comparison, "times", lambda *_: pytest.fail("measured twice"))
    monkeypatch.setattr(opset_comparison.Comparison, "engines", lambda *_: pytest.fail("built twice"))
    assert list(opset_comparison.rows("toy", toy_comparison)) == first
