"""Draw quality over measured latency for two ways of choosing widths: `latency_front_picture.py RESULTS OUT.svg`.

RESULTS is what `latency_front.py` writes; drawn are its first seed's arms, and the unpruned network at 1.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from dpctl.report import charts
from scripts.latency_front import BY_MODEL, UNIFORM, Entry, fid_of, key_of

LINES = {UNIFORM: charts.COLOURS[1], BY_MODEL: charts.COLOURS[0]}
PANELS = ("denoising loss, as cut", "FID, as cut", "FID after 100 steps")
SHARES = ("0.35", "0.5", "0.7")
# (measured latency, value, lower and upper end of the value's interval)
Point = tuple[float, float, float, float]


def points(document: dict[str, Any], method: str) -> list[list[Point]]:
    """Return the points of a method in each panel, by latency, the unpruned network's last."""
    arms = [document["arms"][key] for share in SHARES if (key := key_of(method, share)) in document["arms"]]
    found: list[list[Point]] = [[], [], []]
    for arm in arms:
        latency = arm["timed"]["ratio"]
        for panel, judged in zip(found, (None, arm["before"], arm["after"]), strict=True):
            panel.append((latency, *(_fid(judged) if judged else _loss(arm["before"]))))
    for panel, value in zip(found, (_loss, _fid, _fid), strict=True):
        panel.append((1.0, *value(document["unpruned"])))
    return [sorted(panel) for panel in found]


def _loss(judged: Entry) -> tuple[float, float, float]:
    return (judged["loss"],) * 3


def _fid(judged: Entry) -> tuple[float, float, float]:
    found = fid_of(judged)
    return found.value, found.low, found.high


def draw(document: dict[str, Any]) -> Any:
    """Return the chart as a matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figure = Figure(figsize=(2 * charts.WIDTH, 0.75 * charts.WIDTH), layout="constrained")
    panels = figure.subplots(1, len(PANELS))
    for method, colour in LINES.items():
        for panel, drawn in zip(panels, points(document, method), strict=True):
            latency, value, low, high = zip(*drawn, strict=True)
            panel.plot(latency, value, "o-", color=colour, markersize=4, linewidth=1.2, label=method)
            panel.vlines(latency, low, high, color=colour, linewidth=1.2)
    for panel, title in zip(panels, PANELS, strict=True):
        panel.set_title(title, fontsize=10)
        if title.startswith("FID"):
            panel.set_yscale("log")
            panel.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            panel.yaxis.set_major_formatter(ScalarFormatter())
            panel.yaxis.set_minor_formatter(NullFormatter())
        charts.plain(panel, "both")
    panels[0].legend(frameon=False, fontsize=8)
    figure.supxlabel("measured latency over the unpruned network's", fontsize=9)
    return figure


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    document = json.loads(asked.results.read_text(encoding="utf-8"))
    asked.out.write_text(charts.drawn("front", "", "", "", lambda: draw(document)).svg, encoding="utf-8")


if __name__ == "__main__":
    main()
