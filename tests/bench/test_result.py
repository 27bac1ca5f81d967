import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpctl.bench.document import read_result, write_result
from dpctl.bench.result import SCHEMA_VERSION, BenchResult, Condition
from dpctl.errors import DpctlError

Make = Callable[..., BenchResult]
LATENCIES = {
    ("a", "eager"): [4.0, 4.4, 4.2, 4.0, 4.1, 4.2],
    ("a", "ort"): [2.0, 2.2, 2.1, 2.0, 2.05, 2.1],
    ("b", "eager"): [3.0, 3.3, 3.1, 3.0, 3.0, 3.1],
    ("b", "ort"): [1.0, 1.1, 1.05, 1.0, 1.025, 1.05],
}


def test_warm_ups_are_kept_and_not_counted(make_result: Make) -> None:
    subject = make_result(LATENCIES).subjects[0]
    assert len(subject.turns) == 7
    assert 9.0 not in [turn.latency_s for turn in subject.measured(Condition(1, 2)).values()]


def test_the_parts_of_backend_and_pruning_are_told_apart(make_result: Make) -> None:
    rows = {(row.model, row.backend): row for row in make_result(LATENCIES).rows}
    assert rows["a", "eager"].pruning is rows["a", "eager"].total is None
    assert rows["a", "ort"].pruning is None
    assert rows["a", "ort"].total.value == pytest.approx(2)  # type: ignore[union-attr]
    assert rows["b", "ort"].pruning.value == pytest.approx(2)  # type: ignore[union-attr]
    assert rows["b", "ort"].total.value == pytest.approx(4)  # type: ignore[union-attr]
    assert rows["b", "ort"].images_per_second == pytest.approx(1 / 1.0375)
    assert rows["b", "ort"].network_share == pytest.approx(0.5)
    assert rows["b", "ort"].step_latency_s.count == 12


def test_only_rounds_that_both_took_are_paired(make_result: Make) -> None:
    result = make_result({("a", "ort"): [2.0, 2.0, 2.0], ("b", "ort"): [1.0]})
    row = result.rows[1]
    assert row.pruning is not None
    assert (row.pruning.value, row.pruning.count) == (2, 1)
    assert row.total is None


def test_written_and_read_back_it_is_the_same(make_result: Make, tmp_path: Path) -> None:
    result = make_result(LATENCIES, governor=None, nested={"x": [1, 2.5, "y"]})
    write_result(result, tmp_path)
    assert read_result(tmp_path / "bench.json") == result
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]
    document = json.loads((tmp_path / "bench.json").read_text())
    assert len(document["summary"]) == 4
    assert document["summary"][3]["pruning"]["value"] == pytest.approx(2)


def test_widths_and_a_scan_come_back_as_they_were(make_result: Make, tmp_path: Path) -> None:
    result = make_result(LATENCIES)
    scan = {"base_loss": 0.5, "rows": [{"group": "conv_in", "loss": 1.0}]}
    slim = dataclasses.replace(result.models[1], widths={"conv_in": (32, 16)}, sensitivity=scan)
    result = dataclasses.replace(result, models=(result.models[0], slim))
    write_result(result, tmp_path)
    assert read_result(tmp_path / "bench.json") == result


def test_digests_are_the_baselines_first(make_result: Make) -> None:
    assert make_result(LATENCIES).digests() == ["aaa", "bbb"]


def _drop(document: dict[str, Any]) -> None:
    del document["models"]


def _retype(document: dict[str, Any]) -> None:
    document["subjects"][0]["turns"][0]["latency_s"] = "fast"


def _add(document: dict[str, Any]) -> None:
    document["surprise"] = 1


def _age(document: dict[str, Any]) -> None:
    document["schema_version"] = SCHEMA_VERSION + 1


@pytest.mark.parametrize(
    ("change", "said"), [(_drop, "models"), (_retype, "latency_s"), (_add, "surprise"), (_age, "3")]
)
def test_a_damaged_file_says_where(
    change: Callable[[dict[str, Any]], None], said: str, make_result: Make, tmp_path: Path
) -> None:
    write_result(make_result(LATENCIES), tmp_path)
    document = json.loads((tmp_path / "bench.json").read_text())
    change(document)
    (tmp_path / "bench.json").write_text(json.dumps(document))
    with pytest.raises(DpctlError) as problem:
        read_result(tmp_path / "bench.json")
    assert said in problem.value.got


def test_a_file_of_the_first_version_is_still_read(make_result: Make, tmp_path: Path) -> None:
    write_result(make_result(LATENCIES), tmp_path)
    document = json.loads((tmp_path / "bench.json").read_text())
    document["schema_version"] = 1
    for model in document["models"]:
        del model["widths"], model["sensitivity"]
    (tmp_path / "bench.json").write_text(json.dumps(document))
    assert read_result(tmp_path / "bench.json") == make_result(LATENCIES)


def test_the_committed_evidence_can_be_read() -> None:
    assert read_result(Path(__file__).parents[2] / "docs" / "evidence" / "bench.json").baseline.name == "reference"


@pytest.mark.parametrize("content", [None, "", "[]", "{", '"x"'])
def test_what_is_no_benchmark_is_refused(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "bench.json").write_text(content)
    with pytest.raises(DpctlError):
        read_result(tmp_path / "bench.json")


def test_a_failure_leaves_the_others_in_the_table(make_result: Make) -> None:
    result = make_result(LATENCIES)
    dead = dataclasses.replace(result.subjects[2], turns=(), failure="killed")
    result = dataclasses.replace(result, subjects=(*result.subjects[:2], dead, result.subjects[3]))
    assert [(row.model, row.backend) for row in result.rows] == [("a", "eager"), ("a", "ort"), ("b", "ort")]
