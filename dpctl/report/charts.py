"""What the pictures of a report have in common, and its strips of samples from the same noise."""

import base64
import io
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpctl.bench.quality import load_samples
from dpctl.bench.result import BenchResult, Quality, Row, Subject
from dpctl.models import PROGRESS
from dpctl.report.tables import instead_of

# Stands for the page's own text colour: matplotlib cannot write `currentColor`.
INK = "#010203"
GREY, COLOURS = "#8b939e", ("#0e8074", "#c8641b", "#5a5fd0", "#b03a6f")
STRIP_WIDTH, LARGE = 640, 128
# In inches: a page shows two charts beside one another, a phone one.
WIDTH = 4.6


@dataclass(frozen=True)
class Drawing:
    """One picture of a report."""

    title: str
    label: str
    note: str
    svg: str

    @property
    def element(self) -> str:
        """The picture for use inside a page."""
        return for_page(self.svg, self.label)


@dataclass(frozen=True)
class Strip:
    """The first samples of one model, as data URIs for the page."""

    model: str
    uris: tuple[str, ...]


@dataclass(frozen=True)
class Sheet:
    """The strips of all models from the same noise, the baseline's first; `whole` has them above one another."""

    num_inference_steps: int
    strips: tuple[Strip, ...]
    whole: np.ndarray

    @property
    def large(self) -> bool:
        """Whether a picture has enough pixels to be shown smoothly."""
        return self.whole.shape[1] // len(self.strips[0].uris) > LARGE


@dataclass(frozen=True)
class Progress:
    """The sample sheets of one model's training below one another: a PNG file, and as a data URI for the page."""

    model: str
    label: str
    uri: str
    png: bytes


def sheets(result: BenchResult, out: Path) -> dict[str, Sheet]:
    """Return file name -> sheet for each number of steps whose samples lie in `out`."""
    found = {}
    for steps in result.recipe["num_inference_steps"]:
        drawn = {name: first(load_samples(out / q.samples)) for name, q in _side_by_side(result, steps)}
        if drawn:
            strips = tuple(Strip(name, tuple(map(data_uri, images))) for name, images in drawn.items())
            rows = [np.pad(row(images), ((0, 4), (0, 0), (0, 0)), constant_values=255) for images in drawn.values()]
            found[f"samples-{steps}-steps.png"] = Sheet(steps, strips, np.concatenate(rows))
    return found


def strips(result: BenchResult, out: Path) -> dict[str, Progress]:
    """Return file name -> what a candidate's training drew, of those that were trained with sample sheets.

    An earlier report in `out` has the picture where the model is no longer.
    """
    found = {}
    for position, model in enumerate(result.models[1:], start=1):
        name = f"progress-{position}.png"
        path = next((p for p in (Path(model.source) / PROGRESS, out / name) if p.is_file()), None)
        if path is not None:
            data = path.read_bytes()
            uri = "data:image/png;base64," + base64.b64encode(data).decode()
            label = f"samples of {model.name} while it was trained, from the same noise: a row each, the last one below"
            found[name] = Progress(model.name, label, uri, data)
    return found


def _side_by_side(result: BenchResult, steps: int) -> Iterable[tuple[str, Quality]]:
    """Yield what belongs on a sheet: the models, their approximations, the baseline at fewer steps in their place."""
    asked = [q for q in result.quality if q.num_inference_steps == steps]
    yield from ((q.model, q) for q in asked if q.approximation is None)
    yield from ((f"{q.model} / {q.backend}", q) for q in asked if q.approximation is not None)
    for q in result.quality:
        if instead_of(result, q) == steps:
            yield f"{q.model}, {q.num_inference_steps} steps", q


def first(images: np.ndarray) -> np.ndarray:
    """Return the first of images [N, H, W, C]; as many as fit a page side by side."""
    return images[: max(4, min(20, STRIP_WIDTH // images.shape[2]))]


def row(images: np.ndarray) -> np.ndarray:
    """Return images [N, H, W, C] in a row, one white pixel between them."""
    padded = [np.pad(image, ((0, 0), (0, 1), (0, 0)), constant_values=255) for image in images]
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


def colour(result: BenchResult, model: str) -> str:
    """Return a model's colour: grey for the baseline."""
    position = [each.name for each in result.models].index(model)
    return COLOURS[(position - 1) % len(COLOURS)] if position else GREY


def name(of: Row | Subject) -> str:
    """Return a subject's name."""
    return f"{of.model} / {of.backend}"


def drawn(salt: str, title: str, label: str, note: str, draw: Callable[[], Any]) -> Drawing:
    """Return what `draw` draws, in the style of all charts."""
    from matplotlib import rc_context

    with rc_context(style(salt)):
        return Drawing(title, label, note, svg(draw()))


def plain(panel: Any, axis: str) -> None:
    """Leave a panel nothing but its marks and a light grid."""
    panel.tick_params(length=0, labelsize=8)
    panel.grid(axis=axis, color=INK, alpha=0.12)
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)


def few_ticks() -> Any:
    """Return a locator of ticks that leave room for units."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(nbins=4)


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


def for_page(file: str, label: str) -> str:
    """Return an SVG file's element for use inside a page: in the page's text colour and font, as wide as it may be."""
    element = file[file.index("<svg") :].replace(INK, "currentColor")
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r"font(-family)?: [^;\"]*'[^;\"]*", lambda m: re.sub(r"(?<=px ).*", "inherit", m[0]), element)
    # Names that every figure has would stand in the page once for each.
    used = set(re.findall(r"#([\w-]+)", element))
    element = re.sub(r' id="([^"]*)"', lambda m: m[0] if m[1] in used else "", element)
    return re.sub(
        r'width="[\d.]+pt" height="[\d.]+pt"', f'width="100%" role="img" aria-label="{label}"', element, count=1
    )
