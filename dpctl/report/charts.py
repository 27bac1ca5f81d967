"""The pictures of a report: strips of samples from the same noise, and the chart of latencies."""

import base64
import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpctl import units
from dpctl.bench.quality import load_samples
from dpctl.bench.result import BenchResult, Condition

# Stands for the page's own text colour: matplotlib cannot write `currentColor`.
INK = "#010203"
GREY, COLOURS = "#8b939e", ("#0e8074", "#c8641b", "#5a5fd0", "#b03a6f")
STRIP_WIDTH = 640


@dataclass(frozen=True)
class Strip:
    """The first samples of one model side by side, as a data URI for the page."""

    model: str
    uri: str


@dataclass(frozen=True)
class Sheet:
    """The strips of all models from the same noise, the baseline's first; `whole` has them above one another."""

    num_inference_steps: int
    strips: tuple[Strip, ...]
    whole: np.ndarray


def sheets(result: BenchResult, out: Path) -> dict[str, Sheet]:
    """Return file name -> sheet for each number of steps whose samples lie in `out`."""
    found = {}
    for steps in result.recipe["num_inference_steps"]:
        drawn = [
            (q.model, strip(load_samples(out / q.samples))) for q in result.quality if q.num_inference_steps == steps
        ]
        if drawn:
            strips = tuple(Strip(model, data_uri(pixels)) for model, pixels in drawn)
            whole = np.concatenate(
                [np.pad(pixels, ((0, 4), (0, 0), (0, 0)), constant_values=255) for _, pixels in drawn]
            )
            found[f"samples-{steps}-steps.png"] = Sheet(steps, strips, whole)
    return found


def strip(images: np.ndarray) -> np.ndarray:
    """Return the first of images [N, H, W, C] in a row, one white pixel between them; as many as fit a page."""
    count = min(len(images), max(4, min(20, STRIP_WIDTH // images.shape[2])))
    padded = [np.pad(image, ((0, 0), (0, 1), (0, 0)), constant_values=255) for image in images[:count]]
    return np.concatenate(padded, axis=1)[:, :-1]


def png(pixels: np.ndarray) -> bytes:
    """Return bytes [H, W, C] as a PNG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3]).save(file, "PNG", optimize=True)
    return file.getvalue()


def data_uri(pixels: np.ndarray) -> str:
    """Return bytes [H, W, C] as a PNG inside an address."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def latency(result: BenchResult) -> str:
    """Return the chart of latencies as an SVG: a panel per condition, a dot per counted turn, a bar at the median."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    steps, sizes = result.recipe["num_inference_steps"], result.recipe["batch_sizes"]
    count = len(result.subjects)
    with rc_context(style("latency")):
        figure = Figure(figsize=(10, (0.8 + 0.4 * count) * len(steps) + 0.2), layout="constrained")
        panels = figure.subplots(len(steps), len(sizes), sharey=True, squeeze=False)
        for panel, condition in zip(panels.flat, result.conditions, strict=True):
            _panel(panel, result, condition)
        panels[0][0].set_yticks(range(count), [subject.name for subject in result.subjects])
        panels[0][0].invert_yaxis()
        return svg(figure)


def style(salt: str) -> dict[str, Any]:
    """Return matplotlib's settings for a chart; `salt` tells its marks from those of other charts on one page."""
    return {
        "svg.fonttype": "none",
        "svg.hashsalt": salt,
        "font.family": "sans-serif",
        "text.parse_math": False,  # a model's name may hold a $
        **{f"{name}.color": INK for name in ("text", "xtick", "ytick")},
        **{f"axes.{name}": INK for name in ("edgecolor", "labelcolor", "titlecolor")},
    }


def svg(figure: Any) -> str:
    """Return a figure as an SVG file, the same bytes every time; within the style that it was drawn in."""
    file = io.StringIO()
    figure.savefig(file, format="svg", transparent=True, metadata={"Date": None, "Creator": None, "Format": None})
    return file.getvalue()


def _panel(panel: Any, result: BenchResult, condition: Condition) -> None:
    """Draw one condition. The dots of a subject are spread by round, so that a drift shows as a slant."""
    names = [model.name for model in result.models]
    for line, subject in enumerate(result.subjects):
        turns = subject.measured(condition)
        if not turns:
            continue
        position = names.index(subject.model)
        colour = GREY if position == 0 else COLOURS[(position - 1) % len(COLOURS)]
        values = [turn.latency_s for turn in turns.values()]
        heights = line + np.linspace(-0.22, 0.22, len(values))
        panel.scatter(values, heights, s=14, color=colour, alpha=0.6, linewidths=0)
        panel.plot([np.median(values)] * 2, [line - 0.34, line + 0.34], color=colour, linewidth=2.5)
    panel.set_title(f"batch {condition.batch_size}, {condition.num_inference_steps} steps", loc="left", fontsize=10)
    panel.set_xlim(left=0)
    panel.xaxis.set_major_locator(_few_ticks())
    panel.xaxis.set_major_formatter(lambda value, _: units.seconds(value))
    panel.tick_params(length=0, labelsize=9)
    panel.grid(axis="x", color=INK, alpha=0.12)
    panel.spines[:].set_visible(False)


def _few_ticks() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4)


def for_page(file: str, label: str) -> str:
    """Return an SVG file's element for use inside a page: in the page's text colour and font, as wide as it may be."""
    element = file[file.index("<svg") :].replace(INK, "currentColor")
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"font(-family)?: [^;\"]*'[^;\"]*", lambda m: re.sub(r"(?<=px ).*", "inherit", m[0]), element)
    return re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"', f'width="100%" role="img" aria-label="{label}"', element, count=1
    )
