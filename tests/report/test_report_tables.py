"""The tables of a report: the figures of schema 3, and approximations kept apart from the baseline's own."""

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from dpctl import report
from dpctl.asked import UNMEASURED
from dpctl.bench.result import BenchResult, Quality, Subject
from dpctl.report import charts, page, tables
from runtime.layers import LayerTime

Make = Callable[..., BenchResult]


def column(table: tables.Table, heading: str) -> list[str]:
    return [row[table.headings.index(heading)] for row in table.rows]


def test_where_the_time_goes(full_result: BenchResult) -> None:
    found = tables.time(full_result)
    parts = ("text encoder", "denoiser", "scheduler", "VAE", "other")
    assert found.headings[4:] == (*parts, "ceiling", "speed of light", "energy an image")
    assert [set(column(found, part)) for part in parts] == [{"10.0 %"}, {"60.0 %"}, {"5.0 %"}, {"20.0 %"}, {"5.0 %"}]
    assert set(column(found, "ceiling")) == {"2.50x"}
    light = dict(zip(zip(*(column(found, name) for name in tables.PLACE), strict=True),
                     column(found, "speed of light"), strict=True))  # fmt: skip
    assert light["reference", "deepcache", "1", "20"] == "-"
    row = next(r for r in full_result.rows if (r.model, r.backend) == ("reference", "ort"))
    call = 0.6 * row.latency_s.p50 / 20
    assert light["reference", "ort", "1", "20"] == f"{100 * 2 * 289e6 * 2 / call / 500e9:.1f} %"
    assert "500G FLOP/s" in found.note
    assert column(found, "energy an image")[0] == f"{30 * full_result.rows[0].latency_s.p50:.3g} J"


def test_without_parts_the_time_is_the_network_s_and_the_rest_s(make_result: Make) -> None:
    found = tables.time(make_result())
    assert found.headings[4:] == ("denoiser", "other", "ceiling", "speed of light")
    assert set(column(found, "denoiser")) == {"90.9 %"}
    assert set(column(found, "other")) == {"9.1 %"}
    assert set(column(found, "ceiling")) == {"11.00x"}


def test_memory_and_the_first_image(full_result: BenchResult, make_result: Make) -> None:
    found = tables.memory(full_result)
    assert found.headings[3:] == (
        *("peak, opening", "peak, batch 1", "peak, batch 8", "on the device, batch 1", "on the device, batch 8"),
        *("first image", "built before in"),
    )
    assert found.rows[1] == (
        *("reference", "ort", "fp32", "10 MB", "20 MB", "50 MB", "60 MB", "150 MB", "2.5 s", "42 s"),
    )
    assert found.rows[2][-1] == "-"
    assert tables.memory(make_result()).headings[-2:] == ("peak, batch 8", "first image")


def test_the_part_of_the_mac_saving_that_became_time(make_result: Make) -> None:
    subjects = tuple(_exactly(s, 0.6 if s.model == "slim" else 1.0) for s in make_result().subjects)
    found = tables.saving(make_result(subjects=subjects))
    assert set(column(found, "MACs saved")) == {"50.0 %"}
    assert set(column(found, "time saved")) == {"40.0 % [40.0, 40.0]"}
    assert set(column(found, "of the MACs saved, became time")) == {"80.0 %"}
    alike = tables.saving(make_result(subjects=tuple(_exactly(s, 1.0) for s in subjects)))
    assert set(column(alike, "of the MACs saved, became time")) == {"nothing"}


def _exactly(subject: Subject, seconds: float) -> Subject:
    turns = tuple(dataclasses.replace(turn, latency_s=seconds) for turn in subject.turns)
    return dataclasses.replace(subject, turns=turns)


def test_the_baseline_at_fewer_steps_says_in_whose_place(full_result: BenchResult) -> None:
    assert column(tables.speed(full_result), "steps").count("13 for 20") == 4
    assert column(tables.quality(full_result), "steps").count("13 for 20") == 1
    assert "13 for 20 steps: the baseline with 13" in tables.speed(full_result).note


def test_an_approximation_is_not_taken_for_the_model(full_result: BenchResult) -> None:
    turned = dataclasses.replace(full_result, quality=full_result.quality[::-1])
    for result in (full_result, turned):
        own = page.judged(result, result.baseline)
        assert own is not None
        assert (own.backend, own.figures["fid"].value) == ("ort", 10.0)
        assert "against 10 [" in page.verdicts(result)[0]
    only = tuple(q for q in full_result.quality if q.backend == "deepcache" or q.model == "slim")
    assert page.judged(dataclasses.replace(full_result, quality=only), full_result.baseline) is None


def test_a_candidate_that_is_an_approximation_only_is_judged_by_it(full_result: BenchResult) -> None:
    renamed = {"eager": "deepcache"}
    subjects = tuple(
        dataclasses.replace(s, backend=renamed.get(s.backend, s.backend)) if s.model == "slim" else s
        for s in full_result.subjects
        if (s.model, s.backend) != ("slim", "ort")
    )
    quality = tuple(
        dataclasses.replace(q, backend="deepcache") if q.model == "slim" else q for q in full_result.quality
    )
    result = dataclasses.replace(full_result, subjects=subjects, quality=quality)
    found: Quality | None = page.judged(result, result.models[1])
    assert found is not None
    assert found.backend == "deepcache"
    assert {row.backend for row in tables.chosen_rows(result, result.models[1])} == {"deepcache"}


def test_a_sheet_has_the_models_first_then_what_stands_in_for_the_baseline(full_result: BenchResult, out: Path) -> None:
    sheets = charts.sheets(full_result, out)
    names = [[strip.model for strip in sheet.strips] for sheet in sheets.values()]
    assert names == [["reference", "slim", "reference / deepcache", "reference, 13 steps"],
                     ["reference", "slim", "reference / deepcache"]]  # fmt: skip
    assert list(sheets) == ["samples-20-steps.png", "samples-10-steps.png"]


def test_the_layers_that_did_not_follow_have_a_table_of_their_own(full_result: BenchResult, out: Path) -> None:
    macs = {"reference": {"conv_in": 10**6, "conv_out": 10**6}, "slim": {"conv_in": 5 * 10**5, "conv_out": 5 * 10**5}}
    times = {"reference": (2e-3, 2e-3), "slim": (1.9e-3, 0.9e-3)}  # of the first, next to nothing became time
    models = tuple(dataclasses.replace(m, module_macs=macs.get(m.name, {})) for m in full_result.models)
    subjects = tuple(
        dataclasses.replace(s, layers=tuple(map(LayerTime, macs[s.model], ("Conv", "Conv"), times[s.model])))
        if s.backend == "ort"
        else s
        for s in full_result.subjects
    )
    report.write_report(dataclasses.replace(full_result, models=models, subjects=subjects), out)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "## Layers of slim / ort" in text
    assert "| conv_in | 1M to 500k | 2 ms to 1.9 ms | 10.0 % |" in text
    assert "conv_out" not in text
    assert "<td>conv_in</td>" in (out / "report.html").read_text(encoding="utf-8")
    report.write_report(full_result, out)
    assert "Layers of" not in (out / "report.md").read_text(encoding="utf-8")


def test_the_terminal_s_main_columns_fit_a_line(full_result: BenchResult) -> None:
    console = Console(width=140, file=io.StringIO(), record=True)
    console.print(report.table(full_result))
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 140
    [heading] = [line for line in lines if "images/s" in line]
    assert heading.split("  ")[-1].strip() == "vs baseline, eager"
    assert "a step" not in heading
    assert sum("13 for 20" in line and "[" in line for line in lines) == 5


@pytest.mark.parametrize("heading", ["peak memory", "a step, p50 / p90"])
def test_a_column_left_out_is_the_only_difference(full_result: BenchResult, heading: str) -> None:
    whole = tables.speed(full_result)
    less = whole.without(heading)
    place = whole.headings.index(heading)
    assert less.headings == whole.headings[:place] + whole.headings[place + 1 :]
    assert less.rows == tuple(row[:place] + row[place + 1 :] for row in whole.rows)
    assert (less.note, less.marks, less.title) == (whole.note, whole.marks, whole.title)


def test_the_precisions_are_told(make_result: Make) -> None:
    result = make_result()
    assert "In fp" not in tables.speed(result).note
    half = [dataclasses.replace(subject, precision="bf16") for subject in result.subjects]
    alike = dataclasses.replace(result, subjects=tuple(half))
    assert "All networks are in bf16." in tables.speed(alike).note
    first, *others = result.subjects
    mixed = dataclasses.replace(result, subjects=(dataclasses.replace(first, precision="bf16"), *others))
    assert f"In bf16: {first.name}. In fp32: {others[0].name}" in tables.speed(mixed).note


def test_what_was_asked_of_a_latency_stands_beside_what_came_of_it(make_result: Make) -> None:
    asked = {"target": "0.5", "of": "unet", "backend": "ort", "precision": "fp32", "batch_size": 1, "rows": 1}
    timed = {"ratio": 0.509, "low": 0.503, "high": 0.512, "latency_s": 0.0051, "baseline_latency_s": 0.01}
    builds = [{"macs": 0.6}, {"macs": 0.444, "predicted": 0.5, **timed}]
    told = {"asked": {**asked, "size": [28, 28], "share": 0.5}, "chosen": 1, "builds": builds}
    assert tables.latency_targets(make_result()).rows == ()
    models = make_result().models
    found = tables.latency_targets(make_result(models=(models[0], dataclasses.replace(models[1], latency=told))))
    name = models[1].name
    assert found.rows == (
        (name, "60.0 %", "-", UNMEASURED, ""),
        (name, "44.4 %", "0.500", "0.509 [0.503, 0.512], 5.1 ms of 10 ms", "chosen"),
    )
    assert "0.5 of a call of the network: 0.500 on ort, fp32, 1 images (1 rows) of 28x28" in found.note
