"""The charts of what was measured: latencies, where the time goes, memory, the speed of light, energy."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dpctl import units
from dpctl.bench.result import DENOISER, SCHEDULER, TEXT_ENCODER, VAE, BenchResult, Condition, Row
from dpctl.report import charts, over_latency
from dpctl.report.charts import COLOURS, GREY, Drawing
from dpctl.report.tables import part, shares

# In inches.
LINE = 0.42
# A density of fewer turns would be invented.
FEWEST_TURNS = 8
COLOUR_OF = {DENOISER: COLOURS[0], TEXT_ENCODER: COLOURS[2], VAE: COLOURS[1], SCHEDULER: COLOURS[3]}


@dataclass(frozen=True)
class Bar:
    """A subject's bar, or a bar of several parts: (colour, length) from left to right, and what stands at its end."""

    name: str
    pieces: tuple[tuple[str, float], ...]
    said: str


def drawings(result: BenchResult) -> dict[str, Drawing]:
    """Return file name -> chart, of what this result has."""
    found = {"front.svg": over_latency.chart(result), **_latencies(result), "split.svg": split(result)}
    found |= {"memory.svg": memory(result), "light.svg": light(result), "first-image.svg": first_image(result)}
    found |= {"energy.svg": energy(result)}
    return {name: drawing for name, drawing in found.items() if drawing is not None}


def _rows(result: BenchResult) -> list[Row]:
    """Return the lines at the first number of steps, those of the baseline at fewer left out."""
    first = result.recipe["num_inference_steps"][0]
    return [row for row in result.rows if row.num_inference_steps == first and row.instead_of is None]


# --- latencies ---------------------------------------------------------------------------------------------------


def _latencies(result: BenchResult) -> dict[str, Drawing | None]:
    """Return a chart for each number of steps, the first under the plain name."""
    asked = result.recipe["num_inference_steps"]
    return {f"latency-{n}-steps.svg" if i else "latency.svg": latency(result, n) for i, n in enumerate(asked)}


def latency(result: BenchResult, num_inference_steps: int) -> Drawing | None:
    """Return the distribution of latencies: a panel per batch size, a dot per counted turn, a bar at the median."""
    conditions = [c for c in result.conditions if c.num_inference_steps == num_inference_steps]
    shown = [s for s in result.subjects if any(s.measured(c) for c in conditions)]
    if not shown:
        return None

    def draw() -> Any:
        figure, panels = _panels([len(result.subjects)] * len(conditions))
        for panel, condition in zip(panels, conditions, strict=True):
            _turns(panel, result, condition)
        return figure

    note = (
        "A dot is one turn: a whole batch from noise to pictures, the rounds from top to bottom, so that a drift is a "
        f"slant. The bar is the median, the shape above the dots their density, from {FEWEST_TURNS} turns on. Warm-ups "
        "are left out. The scale does not begin at 0."
    )
    asked = result.recipe["num_inference_steps"]
    title = f"Latency, {num_inference_steps} steps"
    return charts.drawn(
        f"latency {num_inference_steps}",
        title,
        "distribution of latencies",
        note if num_inference_steps == asked[0] else "",
        draw,
    )


def _turns(panel: Any, result: BenchResult, condition: Condition) -> None:
    for line, subject in enumerate(result.subjects):
        values = [turn.latency_s for turn in subject.measured(condition).values()]
        colour = charts.colour(result, subject.model)
        name = subject.name if values else f"{subject.name}: not measured"
        panel.text(0, line - 0.3, name, fontsize=8, transform=panel.get_yaxis_transform())
        if not values:
            continue
        if len(values) >= FEWEST_TURNS and np.ptp(values) > 0:
            grid, heights = density(values)
            panel.fill_between(grid, line - 0.22 * heights, line, color=colour, alpha=0.35, linewidth=0)
        panel.scatter(values, line + np.linspace(0.08, 0.36, len(values)), s=9, color=colour, alpha=0.7, linewidths=0)
        panel.plot([np.median(values)] * 2, [line - 0.2, line + 0.42], color=colour, linewidth=2)
    panel.set_title(f"batch {condition.batch_size}", loc="left", fontsize=9)
    _finish(panel, len(result.subjects), units.seconds)


def density(values: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Return places and the density there, 1 at its highest: Gaussians as wide as Silverman's rule says."""
    seen = np.asarray(values, dtype=float)
    low, high = np.percentile(seen, [25, 75])
    wide = 0.9 * (min(seen.std(), (high - low) / 1.34) or seen.std()) * len(seen) ** -0.2
    grid = np.linspace(seen.min() - 3 * wide, seen.max() + 3 * wide, 120)
    heights = np.exp(-0.5 * ((grid[:, None] - seen) / wide) ** 2).sum(axis=1)
    return grid, heights / heights.max()


# --- bars --------------------------------------------------------------------------------------------------------


def split(result: BenchResult) -> Drawing | None:
    """Return the chart of what an image's time goes into."""
    rows = _rows(result)
    names = list(dict.fromkeys(name for row in rows for name in shares(row)))

    def bar(row: Row) -> Bar:
        of_image = row.latency_s.p50 / row.batch_size
        pieces = tuple((COLOUR_OF.get(name, GREY), share * of_image) for name, share in shares(row).items())
        ceiling = "" if row.ceiling is None else f", ceiling {units.ratio(row.ceiling)}"
        return Bar(charts.name(row), pieces, f"{units.seconds(of_image)}{ceiling}")

    note = (
        f"An image's median time at {result.recipe['num_inference_steps'][0]} steps, split. The ceiling is "
        "how many times faster it would be if the network took no time."
    )
    legend = {part(name): COLOUR_OF.get(name, GREY) for name in names}
    return _bars("Where the time goes", note, {f"batch {n}": _of(rows, n, bar) for n in _sizes(rows)},
                 units.seconds, legend)  # fmt: skip


def _sizes(rows: Iterable[Row]) -> list[int]:
    return list(dict.fromkeys(row.batch_size for row in rows))


def _of(rows: Iterable[Row], batch_size: int, bar: Callable[[Row], Bar]) -> list[Bar]:
    return [bar(row) for row in rows if row.batch_size == batch_size]


def memory(result: BenchResult) -> Drawing | None:
    """Return the chart of peak memory, the device's below the host's."""
    found: dict[str, list[Bar]] = {}
    for row in _rows(result):
        places = {"": row.peak_memory_bytes, " on the device": row.peak_device_memory_bytes}
        for place, value in places.items():
            if value is not None:
                bar = Bar(charts.name(row), ((charts.colour(result, row.model), value),), units.bytes_(value))
                found.setdefault(f"batch {row.batch_size}{place}", []).append(bar)
    return _bars("Peak memory", "While drawing, beyond what the imported libraries take.", found, units.bytes_)


def light(result: BenchResult) -> Drawing | None:
    """Return the chart of the fraction of the speed of light."""
    found: dict[str, list[Bar]] = {}
    for row in _rows(result):
        if row.light is not None:
            bar = Bar(charts.name(row), ((charts.colour(result, row.model), row.light),), units.percent(row.light))
            found.setdefault(f"batch {row.batch_size}", []).append(bar)
    note = "The network's FLOP/s over those that a large matrix product reached on this machine in the same rounds."
    return _bars("Speed of light", note, found, units.percent)


def energy(result: BenchResult) -> Drawing | None:
    """Return the chart of the GPU's energy, where it was measured."""
    found: dict[str, list[Bar]] = {}
    for row in _rows(result):
        if row.energy_j_per_image is not None:
            pieces = ((charts.colour(result, row.model), row.energy_j_per_image),)
            bar = Bar(charts.name(row), pieces, f"{row.energy_j_per_image:.3g} J")
            found.setdefault(f"batch {row.batch_size}", []).append(bar)
    return _bars("Energy of an image", "What the GPU took, by its own counter.", found, lambda value: f"{value:g} J")


def first_image(result: BenchResult) -> Drawing | None:
    """Return the chart of the time to the first image, what is built before it beside it."""
    found: dict[str, list[Bar]] = {"first image": [], "built before": []}
    for subject in result.subjects:
        took = {"first image": subject.first_image_latency_s, "built before": subject.build_latency_s}
        for name, value in took.items():
            if value is not None:
                pieces = ((charts.colour(result, subject.model), value),)
                found[name].append(Bar(subject.name, pieces, units.seconds(value)))
    note = "From the request to open the model to its first picture at the smallest batch and the fewest steps."
    if found["built before"]:
        note += " What was built before, an engine, comes on top once."
    return _bars("Time to the first image", note, {k: v for k, v in found.items() if v}, units.seconds)


def _bars(
    title: str,
    note: str,
    panels: Mapping[str, Sequence[Bar]],
    written: Callable[[float], str],
    legend: Mapping[str, str] | None = None,
) -> Drawing | None:
    """Draw panels of bars below one another, each bar below its name; None without any."""
    if not panels:
        return None

    def draw() -> Any:
        from matplotlib.patches import Patch

        figure, axes = _panels([len(bars) for bars in panels.values()], 0.5 if legend else 0.0)
        for panel, (name, bars) in zip(axes, panels.items(), strict=True):
            for line, bar in enumerate(bars):
                left = 0.0
                for colour, length in bar.pieces:
                    panel.barh(line + 0.2, length, 0.34, left=left, color=colour, linewidth=0)
                    left += length
                panel.text(0, line - 0.1, bar.name, fontsize=8)
                panel.annotate(
                    bar.said, (left, line + 0.2), (4, 0), textcoords="offset points", fontsize=8, va="center"
                )
            longest = max(sum(length for _, length in bar.pieces) for bar in bars)
            panel.set_xlim(0, longest * (1.6 if legend else 1.25) or 1)
            panel.set_title(name, loc="left", fontsize=9)
            _finish(panel, len(bars), written)
        if legend:
            patches = [Patch(facecolor=colour, label=name) for name, colour in legend.items()]
            figure.legend(handles=patches, loc="outside lower left", frameon=False, fontsize=8, ncols=3)
        return figure

    return charts.drawn(title, title, title.lower(), note, draw)


# --- panels -------------------------------------------------------------------------------------------------------


def _panels(lines: Sequence[int], more: float = 0.0) -> tuple[Any, Any]:
    """Return a figure and its panels, below one another, with room for so many named lines each."""
    from matplotlib.figure import Figure as Picture
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.1)  # a panel's title apart from the scale above it
    figure = Picture(figsize=(charts.WIDTH, LINE * sum(lines) + 0.65 * len(lines) + more), layout=layout)
    return figure, figure.subplots(len(lines), 1, squeeze=False, height_ratios=lines)[:, 0]


def _finish(panel: Any, lines: int, written: Callable[[float], str]) -> None:
    """Set the lines from top to bottom below one another, with a scale in units below them."""
    panel.set_ylim(lines - 0.4, -0.6)
    panel.set_yticks([])
    panel.xaxis.set_major_locator(charts.few_ticks())
    panel.xaxis.set_major_formatter(lambda value, _: written(value))
    charts.plain(panel, "x")
