"""The table of docs/export.md that sets two engines side by side."""

import re
from pathlib import Path
from typing import Any

import pytest

from runtime.engine import EngineManifest
from scripts import engine_comparison as script

ROOT = Path(__file__).resolve().parent.parent


def engine(**changed: Any) -> EngineManifest:
    values: dict[str, Any] = {
        "flavor": "rtx",
        "version": "1.7.1",
        "targets": ["8.9"],
        "gpu": None,
        "precision": "fp32",
        "profile": {},
        "weights_bytes": 100_000_000,
        "activation_bytes": 50_000_000,
        "build_s": 2.0,
        "sha256": "",
        "size_bytes": 120_000_000,
        "onnx": {},
        "recipe": {},
        "built_on": {"processor": "a processor, 2 cores"},
    }
    return EngineManifest(**values | changed)


def test_each_row_is_set_against_the_first_of_its_precision() -> None:
    slim = engine(weights_bytes=25_000_000, activation_bytes=None, size_bytes=30_000_000)
    rows = [
        script.Row("whole", "fp32", 10_000_000, 40_000_000, [engine(build_s=s) for s in (1.0, 9.0, 3.0)]),
        script.Row("slim", "fp32", 5_000_000, 20_000_000, [slim]),
        script.Row("whole", "fp16", 10_000_000, 20_000_000, [slim]),
    ]
    _, _, *lines = script.table(rows).splitlines()
    assert lines[0] == "| whole | fp32 | 10M | 40 MB | 120 MB | 100 MB | 50 MB | 3 s |"
    assert lines[1] == "| slim | fp32 | 5M | 20 MB (50.0 %) | 30 MB (25.0 %) | 25 MB (25.0 %) | not said | 2 s |"
    assert lines[2].startswith("| whole | fp16 | 10M | 20 MB | 30 MB |")


def test_the_page_holds_a_table_of_the_script() -> None:
    page = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    told = page.partition(script.BEGIN)[2].partition(script.END)[0].strip().splitlines()
    assert told[:2] == script.table([]).strip().splitlines()
    assert [line.split(" | ")[1] for line in told[2:6]] == ["fp32", "fp32", "fp16", "fp16"]
    assert re.fullmatch(r"TensorRT-RTX [\d.]+, for compute capability .*; build: the median of \d+, .*", told[-1])


@pytest.mark.slow
def test_two_models_are_built_in_one_run(toy_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("tensorrt_rtx")
    from dpctl.prune import prune
    from dpctl.recipe import PruneRecipe

    prune(str(toy_pipeline), tmp_path / "slim", PruneRecipe("magnitude", ratio=0.5))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{script.BEGIN}\nold\n{script.END}\nafter\n")
    models = [str(toy_pipeline), str(tmp_path / "slim")]
    assert script.main([*models, "--precision", "fp16", "--repeats", "1", "--page", str(page)]) == 0
    said = capsys.readouterr().out
    assert "| slim | fp16 |" in said
    assert page.read_text() == f"before\n{script.BEGIN}\n{said.rstrip()}\n{script.END}\nafter\n"
    assert script.main([*models, "--precision", "fp16", "--repeats", "1", "--page", str(ROOT / "README.md")]) == 1
