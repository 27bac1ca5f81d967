"""The charts of what was measured: what stands where, and what is left out where it is not known."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dpctl import report
from dpctl.bench.result import BenchResult
from dpctl.report import charts, measured, over_latency
from dpctl.report.over_latency import chart, points

Make = Callable[..., BenchResult]
ALL = {"front.svg", "latency.svg", "latency-10-steps.svg", "split.svg", "memory.svg", "light.svg", "first-image.svg",
       "energy.svg"}  # fmt: skip


def test_there_is_a_chart_of_everything_that_was_measured(full_result: BenchResult, out: Path) -> None:
    report.write_report(full_result, out)
    assert set(measured.drawings(full_result)) == ALL
    page, markdown = ((out / name).read_text(encoding="utf-8") for name in ("report.html", "report.md"))
    assert page.count("<figure>") == len(ALL)
    for name, drawing in measured.drawings(full_result).items():
        assert (out / name).read_text(encoding="utf-8") == drawing.svg
        assert f"]({name})" in markdown
        assert f"<h3>{drawing.title}</h3>" in page


def test_what_was_not_measured_has_no_chart(make_result: Make) -> None:
    assert set(measured.drawings(make_result())) == {"front.svg", "latency.svg", "split.svg", "memory.svg"}
    without = make_result(quality=(), subjects=())
    assert measured.drawings(without) == {}


def test_marks_in_the_page_are_those_of_one_chart_only(full_result: BenchResult, out: Path) -> None:
    report.write_report(full_result, out)
    page = (out / "report.html").read_text(encoding="utf-8")
    names = re.findall(r' id="([^"]+)"', page)
    assert len(names) == len(set(names))
    assert set(re.findall(r'(?:href="|url\()#([^")]+)', page)) <= set(names)


def test_points_are_of_a_model_s_own_pictures_and_an_approximation_s_of_its_own(full_result: BenchResult) -> None:
    found = {
        (p.row.model, p.row.backend, p.row.num_inference_steps): (p.point.fid.value, p.point.latency_s.value)
        for p in points(full_result, 8)
    }
    assert len(found) == 2 * 5 + 2
    assert found["reference", "eager", 20][0] == found["reference", "ort", 20][0] == 10.0
    assert found["reference", "ort", 13][0] == 11.0
    assert found["reference", "deepcache", 20][0] == 13.0
    for row in full_result.rows:
        if row.batch_size == 8:
            place = row.model, row.backend, row.num_inference_steps
            assert found[place][1] == pytest.approx(row.latency_s.p50 / 8)


def test_the_baseline_at_fewer_steps_is_on_the_chart_hollow(full_result: BenchResult) -> None:
    drawing = chart(full_result)
    assert drawing is not None
    assert drawing.svg.count(f"fill-opacity: 0; stroke: {charts.GREY}") == 2 * 2  # eager and ort, two batch sizes
    few = chart(dataclasses.replace(full_result, fewer_steps=()))
    assert few is not None
    assert "fill-opacity: 0;" not in few.svg


@pytest.mark.parametrize(("values", "scale"), [([1.0, 4.9], "linear"), ([1.0, 5.1], "log"), ([-1.0, 90.0], "linear")])
def test_values_that_lie_far_apart_are_shown_by_their_ratios(values: list[float], scale: str) -> None:
    panel = Figure().subplots()
    over_latency._scale(panel, "y", values, "{:.2g}".format)
    assert panel.get_yscale() == scale
    assert panel.get_xscale() == "linear"
    assert panel.yaxis.get_major_formatter()(20.0, 0) == "20"


def test_one_point_is_no_front(make_result: Make) -> None:
    result = make_result()
    assert chart(make_result(subjects=result.subjects[:1], models=result.models[:1])) is None
    assert chart(make_result(quality=())) is None


def test_a_density_is_highest_among_the_turns_and_gone_far_from_them() -> None:
    values = [1.0, 1.1, 1.1, 1.2, 1.1, 1.0, 1.2, 3.0]
    grid, heights = measured.density(values)
    assert heights.max() == 1
    assert 1.0 < grid[heights.argmax()] < 1.2
    assert heights[np.abs(grid - 2.2).argmin()] < 0.01
    assert (grid[0] < 1.0, grid[-1] > 3.0) == (True, True)
    assert measured.density([1.0] * 7 + [2.0])[1].max() == 1


def test_a_bar_s_pieces_are_the_parts_of_the_time(full_result: BenchResult) -> None:
    drawing = measured.split(full_result)
    assert drawing is not None
    for name in ("text encoder", "denoiser", "scheduler", "VAE", "other", "ceiling 2.50x"):
        assert name in drawing.svg
    assert {colour for colour in (*charts.COLOURS, charts.GREY) if f"fill: {colour}" in drawing.svg} == {
        *charts.COLOURS, charts.GREY
    }  # fmt: skip
