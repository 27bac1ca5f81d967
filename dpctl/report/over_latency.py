"""The chart of quality over latency: each subject at its numbers of steps, and the front."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpctl import units
from dpctl.bench.front import Point, front, measured
from dpctl.bench.metrics import Figure
from dpctl.bench.result import INEXACT, BenchResult, Condition, Row
from dpctl.report import charts
from dpctl.report.charts import INK, Drawing

MARKERS = "osD^vPX*"
# The distances to real images that may be drawn over the latency: the first that was measured.
DISTANCES = ("fid", "kid")
# Names of a sweep's cells have so many parts; a legend with names of more letters has one column.
GRID, WORDS = 3, 28
# An axis whose largest value is so many times its smallest one is logarithmic.
FAR = 5.0


@dataclass(frozen=True)
class Judged:
    """A line of the table, and its point: the time of an image, and how far its pictures are from real ones."""

    row: Row
    point: Point


def points(result: BenchResult, batch_size: int) -> list[Judged]:
    """Return the points of one batch size, of what has been judged."""
    metric = distance(result)
    found = {}
    for row in result.rows:
        figures = _figures(result, row)
        subject = result.subject(row.model, row.backend)
        if row.batch_size != batch_size or metric is None or metric not in figures or subject is None:
            continue
        turns = subject.measured(Condition(batch_size, row.num_inference_steps))
        rounds = {number: turn.latency_s / batch_size for number, turn in turns.items()}
        point = measured(subject.name, row.num_inference_steps, rounds, figures[metric])
        found[subject.name, row.num_inference_steps] = Judged(row, point)
    return list(found.values())


def curve(result: BenchResult, model: str, backend: str, batch_size: int) -> list[Point]:
    """Return a subject's points."""
    return [p.point for p in points(result, batch_size) if (p.row.model, p.row.backend) == (model, backend)]


def distance(result: BenchResult) -> str | None:
    """Return the first of the distances that is there."""
    return next((name for name in DISTANCES if any(name in q.figures for q in result.quality)), None)


def _figures(result: BenchResult, row: Row) -> Mapping[str, Figure]:
    """Return the quality of a line's pictures: a model's own, on whatever exact backend they were drawn."""
    wanted = row.model, row.num_inference_steps, row.backend if row.backend in INEXACT else None
    found = (q for q in result.quality if (q.model, q.num_inference_steps, q.approximation) == wanted)
    return next((q.figures for q in found), {})


def chart(result: BenchResult) -> Drawing | None:
    """Return the chart of quality over latency: a panel per batch size, a line per subject, the front marked."""
    sizes = result.recipe["batch_sizes"]
    of_size = {size: found for size in sizes if (found := points(result, size))}
    if not any(len(found) > 1 for found in of_size.values()):
        return None
    metric = str(distance(result)).upper()

    def draw() -> Any:
        from matplotlib.figure import Figure as Picture

        lines = {line for found in of_size.values() for line in _lines(result, found)}
        columns = 2 if max(map(len, lines)) <= WORDS else 1
        height = 3.1 * len(of_size) + 0.2 + 0.2 * (len(lines) + columns) // columns
        figure = Picture(figsize=(charts.WIDTH, height), layout="constrained")
        panels = figure.subplots(len(of_size), 1, squeeze=False)[:, 0]
        for panel, (size, found) in zip(panels, of_size.items(), strict=True):
            _front(panel, result, found)
            panel.set_title(f"batch {size}", loc="left", fontsize=9)
            panel.set_ylabel(f"{metric}, lower is better", fontsize=8)
        panels[-1].set_xlabel("time of an image", fontsize=8)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", frameon=False, fontsize=8, ncols=columns)
        return figure

    beside = "target beside it, the baseline at the number of steps" if is_grid(result) else "number of steps beside it"
    note = (
        f"Each point is a subject at the {beside}: left is faster, low is closer to real images, the "
        "lines are 95 % intervals; where values lie far apart, equal ratios have equal lengths. Points with a halo are "
        "on the front: none on it is significantly better in one of the two and not significantly worse in the other. "
        "Hollow points are the baseline with fewer steps, in the time of a candidate."
    )
    return charts.drawn("front", f"{metric} over latency", f"{metric} over latency", note, draw)


def _front(panel: Any, result: BenchResult, found: Sequence[Judged]) -> None:
    best = front([p.point for p in found])
    backends = list(dict.fromkeys(subject.backend for subject in result.subjects))
    panel.scatter([p.latency_s.value for p in best], [p.fid.value for p in best], s=190, color=INK, alpha=0.16,
                  linewidths=0, label="on the front")  # fmt: skip
    drawn = _lines(result, found)
    families = list(dict.fromkeys(_family(result, model.name) for model in result.models))
    for name, own in drawn.items():
        place = families.index(_family(result, own[0].row.model))
        colour = charts.COLOURS[(place - 1) % len(charts.COLOURS)] if place else charts.GREY
        lap = max(0, place - 1) // len(charts.COLOURS)
        marker = MARKERS[(backends.index(own[0].row.backend) + lap * len(backends)) % len(MARKERS)]
        x, y = [p.point.latency_s.value for p in own], [p.point.fid.value for p in own]
        panel.plot(x, y, color=colour, linewidth=1, alpha=0.6)
        spread = [[[abs(f.value - f.low), abs(f.high - f.value)] for f in fs] for fs in
                  ([p.point.latency_s for p in own], [p.point.fid for p in own])]  # fmt: skip
        panel.errorbar(x, y, *(np.transpose(s) for s in spread[::-1]), fmt="none", ecolor=colour, alpha=0.5)
        panel.plot([], [], color=colour, marker=marker, linewidth=1, markersize=5, label=name)
        for point in own:
            hollow, where = point.row.instead_of is not None, (point.point.latency_s.value, point.point.fid.value)
            panel.plot(*where, color=colour, marker=marker, markersize=5, fillstyle="none" if hollow else "full")
            panel.annotate(_beside(result, point.row), where, (4, 4), textcoords="offset points", fontsize=7)
    _scale(panel, "x", [p.point.latency_s.value for p in found], units.seconds)
    _scale(panel, "y", [p.point.fid.low for p in found], "{:.3g}".format)
    charts.plain(panel, "both")


def is_grid(result: BenchResult) -> bool:
    """Tell whether the candidates are the cells of a sweep: many, of names like criterion/target/finetune."""
    names = [model.name for model in result.models[1:]]
    return len(names) > len(charts.COLOURS) and all(name.count("/") == GRID - 1 for name in names)


def _family(result: BenchResult, model: str) -> str:
    """Return what is drawn as one line: a model, or of a sweep the cells that differ in their target alone."""
    if not is_grid(result) or model == result.baseline.name:
        return model
    criterion, _, length = model.split("/")
    return f"{criterion}, {length}"


def _lines(result: BenchResult, found: Sequence[Judged]) -> dict[str, list[Judged]]:
    """Return name -> the points of a line, in the order they are joined in."""
    lines: dict[str, list[Judged]] = {}
    for point in found:
        lines.setdefault(f"{_family(result, point.row.model)} / {point.row.backend}", []).append(point)
    for line in lines.values():
        one = len({point.row.model for point in line}) == 1
        line.sort(key=lambda p: p.row.num_inference_steps if one else p.point.latency_s.value)
    return lines


def _beside(result: BenchResult, row: Row) -> str:
    """Return what stands beside a point: the number of steps, or of a sweep's cell its target."""
    steps = str(row.num_inference_steps)
    if not is_grid(result) or row.model == result.baseline.name:
        return steps
    target = row.model.split("/")[1]
    return target if len(result.recipe["num_inference_steps"]) == 1 else f"{target}, {steps}"


def _scale(panel: Any, which: str, values: Sequence[float], told: Callable[[float], str]) -> None:
    """Let an axis show ratios where its values spread over several of them: half of the points would be in a corner."""
    from matplotlib import ticker

    axis = getattr(panel, f"{which}axis")
    if 0 < FAR * min(values) < max(values):
        panel.set(**{f"{which}scale": "log"})
        axis.set_major_locator(ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(ticker.NullLocator())
    else:
        axis.set_major_locator(charts.few_ticks())
    axis.set_major_formatter(lambda value, _: told(value))
