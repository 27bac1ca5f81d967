"""Draw what a latency model predicts against what networks took: `latency_picture.py MODEL FILE OUT.svg`.

FILE is of `dpctl profile MODEL --held-out N`; what it was fitted on is hollow. Prints the accuracy.
"""

import argparse
from pathlib import Path
from typing import Any

from dpctl.latency.build import Exports
from dpctl.latency.document import read_profile
from dpctl.latency.model import Accuracy, accuracy
from dpctl.latency.profile import fitted, report
from dpctl.models import load_model
from dpctl.recipe import LatencyRecipe, PruneRecipe
from dpctl.report import charts
from dpctl.units import seconds


def draw(seen: Accuracy, unseen: Accuracy) -> Any:
    """Return the chart as a matplotlib figure."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    figure = Figure(figsize=(charts.WIDTH, charts.WIDTH), layout="constrained")
    panel = figure.subplots()
    ends = [f(value for pair in (*seen.pairs, *unseen.pairs) for value in pair) for f in (min, max)]
    panel.plot(ends, ends, color=charts.GREY, linewidth=1, label="predicted = measured")
    for judged, fill, name in ((seen, "none", "fitted on"), (unseen, "full", "held out")):
        predicted, measured = zip(*judged.pairs, strict=True)
        panel.plot(measured, predicted, "o", color=charts.COLOURS[0], fillstyle=fill, markersize=5, label=name)
    panel.set(xscale="log", yscale="log", xlabel="measured, a call", ylabel="predicted")
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: seconds(value)))
    panel.legend(frameon=False, fontsize=8)
    charts.plain(panel, "both")
    return figure


def main() -> None:
    """Write the picture and print the accuracy."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("file", type=Path)
    parser.add_argument("out", type=Path)
    asked = parser.parse_args()
    found = read_profile(asked.file)
    network = Exports(load_model(asked.model), PruneRecipe(latency=LatencyRecipe()), Path()).network
    model = fitted(found, network)
    judged = [accuracy(model, samples) for samples in (found.samples, found.held_out or found.samples)]
    drawing = charts.drawn("predicted", "", "", "", lambda: draw(*judged))
    asked.out.write_text(drawing.svg, encoding="utf-8")
    print("\n".join(map(str, report(found, network, asked.file).renderables)))


if __name__ == "__main__":
    main()
