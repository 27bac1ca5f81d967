"""Build engines of an unpruned and a slim network in one run and print what can be said of them without a GPU.

    python scripts/engine_comparison.py [UNPRUNED SLIM] [--page docs/export.md]

TensorRT-RTX builds ahead of time: size, memory and build time are real. Kernels are chosen on the target, so nothing
about speed follows. Without models, `reference` is compared with itself at half the MACs.
"""

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpctl import cost, units
from dpctl.errors import DpctlError
from dpctl.models import Model, load_model
from dpctl.prune import prune
from dpctl.recipe import EngineRecipe, PruneRecipe
from dpctl.signature import of_unet, rows_of
from export.graph import write_graph
from export.to_tensorrt import build, check
from runtime.engine import EngineManifest
from runtime.network import Network

BEGIN, END = "<!-- engine-comparison: begin -->", "<!-- engine-comparison: end -->"
HALF = PruneRecipe(target_macs=0.5, align=16)
BATCH = (1, 8, 64)


@dataclass(frozen=True)
class Row:
    """One network in one precision: its parameters, the bytes of its graph, and its engine, built several times."""

    name: str
    precision: str
    parameters: int
    graph_bytes: int
    engines: list[EngineManifest]

    @property
    def build_s(self) -> float:
        """The median time of a build."""
        return statistics.median(engine.build_s for engine in self.engines)


def compare(models: dict[str, Model], precisions: Sequence[str], recipe: EngineRecipe, repeats: int) -> list[Row]:
    """Export every model in every precision, and build the engines in turn, so that all share what else goes on."""
    with tempfile.TemporaryDirectory() as scratch:
        rows = []
        for precision in precisions:
            recipe = check(recipe, precision)
            for number, (name, model) in enumerate(models.items()):
                graph = Path(scratch) / f"{number}-{precision}" / f"model.{precision}.onnx"
                graph.parent.mkdir()
                config = {**model.unet.config, "_class_name": type(model.unet).__name__}
                signature = of_unet(config, rows_of(config, BATCH))
                write_graph(Network(model.unet).eval(), signature, graph, {}, precision)
                size = sum(path.stat().st_size for path in graph.parent.iterdir())
                rows.append((Row(name, precision, cost.parameters(model.unet), size, []), graph, signature))
        for _ in range(repeats):
            for row, graph, signature in rows:
                row.engines.append(build(graph, signature, recipe, row.precision)[1])
    return [row for row, _, _ in rows]


def table(rows: Sequence[Row]) -> str:
    """Return the rows as a Markdown table, each with its share of the first network in the same precision."""
    lines = [
        "| network | precision | parameters | ONNX | engine | weights | activations at batch 64 | build |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        first = next(other for other in rows if other.precision == row.precision)
        engine, base = row.engines[0], first.engines[0]
        cells = [
            units.count(row.parameters),
            _shared(row.graph_bytes, first.graph_bytes),
            _shared(engine.size_bytes, base.size_bytes),
            _shared(engine.weights_bytes, base.weights_bytes),
            _shared(engine.activation_bytes, base.activation_bytes),
            units.seconds(row.build_s),
        ]
        lines.append(f"| {row.name} | {row.precision} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _shared(size: int | None, base: int | None) -> str:
    if size is None or base is None:
        return "not said"
    return units.bytes_(size) + ("" if size == base else f" ({units.percent(size / base)})")


def caption(rows: Sequence[Row], repeats: int) -> str:
    """Return what the table was made with, in a line."""
    engine = rows[0].engines[0]
    targets = " and ".join(engine.targets)
    return (
        f"TensorRT-RTX {engine.version}, for compute capability {targets}, on {engine.built_on['processor']}; build: "
        f"the median of {repeats}, the networks in turn.\n"
    )


def write_between(page: Path, text: str) -> None:
    """Put `text` between the markers of a page. Raises a DpctlError where they are missing."""
    before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise DpctlError("the page has no place for the table", str(page), f"put {BEGIN} and {END} into it")
    page.write_text(f"{before}{BEGIN}\n{text}{END}{after}", encoding="utf-8")


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print, and write into the page that was asked for; return the exit code."""
    parser = argparse.ArgumentParser(description="engines of an unpruned and a slim network, side by side")
    parser.add_argument("models", nargs="*", help="the unpruned model and a slim one")
    parser.add_argument("--precision", default="fp32,fp16")
    parser.add_argument("--compute-capability", default="8.9,12.0")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page that gets the table between its markers")
    asked = parser.parse_args(arguments)
    if len(asked.models) not in (0, 2):
        parser.error("give two models, or none")
    try:
        with tempfile.TemporaryDirectory() as scratch:
            names = asked.models
            if not names:
                prune("reference", Path(scratch) / "half the MACs", HALF)
                names = ["reference", str(Path(scratch) / "half the MACs")]
            models = {Path(name).name: load_model(name) for name in names}
        recipe = EngineRecipe("rtx", tuple(asked.compute_capability.split(",")))
        rows = compare(models, asked.precision.split(","), recipe, asked.repeats)
        text = f"{table(rows)}\n{caption(rows, asked.repeats)}"
        print(text)
        if asked.page is not None:
            write_between(asked.page, text)
    except DpctlError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
