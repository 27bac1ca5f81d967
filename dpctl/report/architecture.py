"""The pictures of a network's channel groups: their widths before and after, and how the loss reacts to cuts."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dpctl.bars import measured_on, nearest
from dpctl.bench.result import BenchResult, Model
from dpctl.blocks import by_block
from dpctl.errors import DpctlError
from dpctl.report import charts
from dpctl.report.charts import Drawing

# With more groups than this their names have no room: blocks alone are named.
NAMED = 60
# Rises of the loss below this are drawn there: a logarithm has no zero.
FLOOR = 1e-3
SUFFIXES = (".svg", ".png")


def drawings(result: BenchResult) -> dict[str, Drawing]:
    """Return file name -> picture for the candidates whose manifests tell widths or a scan; one for what is alike."""
    found = {}
    for position, models in _alike(result, "widths"):
        name = f"widths-{position}.svg"
        note = f"The channels of every group of {_names(models)}, in the order in which data flows."
        found[name] = Drawing("Widths", "widths before and after", note, _svg(widths, models[0].widths, name))
    for position, models in _alike(result, "sensitivity"):
        name, scan = f"sensitivity-{position}.svg", models[0].sensitivity or {}
        note = (
            f"How much the denoising loss of the model that {_names(models)} was cut from rises when a part of one "
            f"group alone goes, without finetuning; {measured_on(scan)}. Rises of 0.1 % or less are drawn at the foot."
        )
        found[name] = Drawing("Sensitivity", "rise of the loss by group", note, _svg(reactions, scan, name))
    return found


def _alike(result: BenchResult, entry: str) -> Iterable[tuple[int, list[Model]]]:
    """Return the candidates that have an entry, those with the same one together, after the first's position."""
    found: dict[str, tuple[int, list[Model]]] = {}
    for position, model in enumerate(result.models):
        if position and getattr(model, entry):
            found.setdefault(json.dumps(getattr(model, entry), sort_keys=True), (position, []))[1].append(model)
    return found.values()


def _names(models: Sequence[Model]) -> str:
    return " and ".join(model.name for model in models)


def check(path: Path | None) -> None:
    """Raise a DpctlError for a picture that cannot be written under that name."""
    if path is None:
        return
    if path.suffix not in SUFFIXES:
        raise DpctlError("a picture of an unknown kind", str(path), f"give a name that ends in {' or '.join(SUFFIXES)}")
    if path.exists():
        raise DpctlError("the picture exists", str(path), "choose another name, or remove it")
    if not path.parent.is_dir():
        raise DpctlError("the picture's folder does not exist", str(path.parent), "make it, or choose another")


def write(path: Path | None, stats: Mapping[str, Any], scan: Mapping[str, Any] | None) -> None:
    """Draw a scan, or without one the widths before and after, into an .svg or .png file."""
    from matplotlib import rc_context

    if path is None:
        return
    check(path)
    if scan is None and not stats.get("widths"):
        raise DpctlError(
            "there are no widths to draw", "the model was not pruned by dpctl", "give a pruned one, or --sensitivity"
        )
    draw: Any = widths if scan is None else reactions
    told = stats["widths"] if scan is None else scan
    if path.suffix == ".svg":
        path.write_text(_svg(draw, told, path.name), encoding="utf-8")
        return
    with rc_context(charts.style(path.name)):
        draw(told).savefig(path, dpi=150)


def _svg(draw: Any, told: Any, salt: str) -> str:
    from matplotlib import rc_context

    with rc_context(charts.style(salt)):
        return charts.svg(draw(told))


def widths(pairs: Mapping[str, Sequence[int]]) -> Any:
    """Return the figure of widths: for each group a light bar of what there was and a filled one of what stays."""
    figure, panel, places = _panel(pairs)
    for light, side, told in ((True, 0, "before"), (False, 1, "after")):
        heights = [pairs[name][side] for name in places]
        colour, alpha = (charts.INK, 0.18) if light else (charts.COLOURS[0], 1.0)
        panel.bar(list(places.values()), heights, width=0.78, color=colour, alpha=alpha, linewidth=0, label=told)
    panel.set_ylabel("channels", fontsize=9)
    panel.legend(**_LEGEND)
    return figure


def reactions(scan: Mapping[str, Any]) -> Any:
    """Return the figure of a scan: for each group a dot per cut at the rise of the loss, on a logarithmic scale."""
    figure, panel, places = _panel({row["group"] for row in scan["rows"]})
    rises = {id(row): max(FLOOR, row["loss"] / scan["base_loss"] - 1) for row in scan["rows"]}
    for name, place in places.items():
        own = [rises[id(row)] for row in scan["rows"] if row["group"] == name]
        panel.plot([place, place], [min(own), max(own)], color=charts.INK, alpha=0.25, linewidth=1)
    for number, fraction in enumerate(scan["fractions"]):
        rows = [row for row in scan["rows"] if nearest(row, scan["fractions"]) == fraction]
        panel.scatter(
            [places[row["group"]] for row in rows],
            [rises[id(row)] for row in rows],
            s=22,
            color=charts.COLOURS[number % len(charts.COLOURS)],
            linewidths=0,
            zorder=3,
            label=f"{100 * fraction:.0f} % cut",
        )
    panel.set_yscale("log")
    panel.minorticks_off()
    panel.yaxis.set_major_formatter(lambda value, _: f"+{100 * value:g} %")
    panel.set_ylabel("rise of the loss", fontsize=9)
    panel.legend(**_LEGEND)
    return figure


_LEGEND: dict[str, Any] = {"frameon": False, "fontsize": 8, "ncols": 4, "loc": "lower right", "bbox_to_anchor": (1, 1)}


def _panel(names: Iterable[str]) -> tuple[Any, Any, dict[str, float]]:
    """Return figure, panel and group -> place from left to right: the order of data, with a gap after each block."""
    from matplotlib.figure import Figure

    blocks = by_block(names)
    gap = max(1.0, sum(map(len, blocks.values())) / 80)  # as wide as a label is high
    places: dict[str, float] = {}
    ticks: dict[str, float] = {}
    for number, (block, inside) in enumerate(blocks.items()):
        first = len(places) + number * gap
        places |= {name: first + i for i, name in enumerate(inside)}
        ticks[block] = first + (len(inside) - 1) / 2
    if len(places) <= NAMED:
        ticks = places
    longest = max((len(name) for name in ticks), default=0)
    figure = Figure(figsize=(10, 2.4 + 0.055 * longest), layout="constrained")
    panel = figure.subplots()
    panel.set_xticks(list(ticks.values()), list(ticks), rotation=90, fontsize=7)
    panel.set_xlim(-1, max(places.values(), default=0) + 1)
    panel.tick_params(axis="both", length=0)
    panel.tick_params(axis="y", labelsize=8)
    panel.grid(axis="y", color=charts.INK, alpha=0.12)
    panel.set_axisbelow(True)
    panel.spines[:].set_visible(False)
    return figure, panel, places
