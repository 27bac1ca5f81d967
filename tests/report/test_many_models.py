"""A page of many candidates, as a sweep leaves it: a short title, lines of the chart over the targets."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dpctl.bench.result import BenchResult
from dpctl.report import charts, over_latency, page, tables, write_report

CELLS = [f"{c}/macs-{t}/{n}" for c in ("random", "diff-pruning") for t in (0.7, 0.5) for n in ("pruned", "finetuned-9")]


@pytest.fixture
def of(make_result: Callable[..., BenchResult]) -> Callable[[Sequence[str]], BenchResult]:
    """Return what gives a result of candidates of these names, each with a speed and an FID of its own."""

    def result_of(names: Sequence[str]) -> BenchResult:
        found = [make_result(speed={1: 1.2 + i, 8: 1.2 + i}, fid=20.0 - i) for i in range(len(names))]
        named = list(zip(names, found, strict=True))
        return dataclasses.replace(
            found[0],
            recipe={**found[0].recipe, "candidates": list(names)},
            models=(found[0].models[0], *(dataclasses.replace(one.models[1], name=name) for name, one in named)),
            subjects=(
                *(subject for subject in found[0].subjects if subject.model == "reference"),
                *(
                    dataclasses.replace(subject, model=name)
                    for name, one in named
                    for subject in one.subjects
                    if subject.model == "slim"
                ),
            ),
            quality=(
                found[0].quality[0],
                *(
                    dataclasses.replace(one.quality[1], model=name, left_out={"clip-score": "why"})
                    for name, one in named
                ),
            ),
        )

    return result_of


def test_the_cells_of_a_sweep_are_lines_over_their_targets(of: Callable[[Sequence[str]], BenchResult]) -> None:
    result = of(CELLS)
    assert over_latency.is_grid(result)
    lines = over_latency._lines(result, over_latency.points(result, 1))
    ours = {name: [p.row.model for p in line] for name, line in lines.items() if name.endswith("/ ort")}
    assert ours == {"reference / ort": ["reference"]} | {
        f"{criterion}, {length} / ort": [f"{criterion}/macs-{target}/{length}" for target in (0.5, 0.7)]
        for criterion in ("random", "diff-pruning")
        for length in ("pruned", "finetuned-9")
    }  # by their time: here later ones are faster
    drawing = over_latency.chart(result)
    assert drawing is not None
    assert "target beside it" in drawing.note
    assert all(colour in drawing.svg for colour in charts.COLOURS)


@pytest.mark.parametrize("names", [CELLS[:4], [f"cut-{number}" for number in range(6)]])
def test_other_models_are_lines_over_their_steps(
    of: Callable[[Sequence[str]], BenchResult], names: Sequence[str]
) -> None:
    result = of(names)
    assert not over_latency.is_grid(result)
    lines = over_latency._lines(result, over_latency.points(result, 1))
    assert [name for name in lines if name.endswith("/ ort")] == [f"{name} / ort" for name in ("reference", *names)]
    drawing = over_latency.chart(result)
    assert drawing is not None
    assert "number of steps beside it" in drawing.note


def test_many_candidates_are_counted_and_told_one_by_one(
    of: Callable[[Sequence[str]], BenchResult], tmp_path: Path
) -> None:
    few, many = of(CELLS[:2]), of(CELLS)
    assert page.title(few) == f"{CELLS[0]}, {CELLS[1]} against reference"
    assert page.title(many) == "8 models against reference"
    assert (len(page.verdicts(few)), len(page.verdicts(many))) == (1, 8)
    bare = dataclasses.replace(many, quality=())
    write_report(bare, tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# 8 models against reference\n")
    assert all(f"\n* **{verdict}**\n" in text for verdict in page.verdicts(bare))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert html.count(" of reference&#39;s MACs;") + html.count(" of reference's MACs;") == 8


def test_what_holds_of_many_is_said_once(of: Callable[[Sequence[str]], BenchResult]) -> None:
    result = of(CELLS)
    (told,) = [line for line in page.labels(result) if line.endswith("of the training)")]
    assert told.startswith(", ".join(CELLS) + ": a short finetune")
    note = tables.quality(result).note
    assert note.count("why") == 1
    assert f"CLIP-SCORE of {', '.join(CELLS)}: why" in note
    every = dataclasses.replace(
        result, quality=tuple(dataclasses.replace(q, left_out={"clip-score": "why"}) for q in result.quality)
    )
    assert "CLIP-SCORE: why" in tables.quality(every).note
