"""Print what export/simplify.py buys on ONNX Runtime: the exporter's graph and ours in turns, on one thread.

What was measured is kept under build/simplify-comparison; remove that to measure again. A minute.
"""

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from unittest import mock

import onnx_ir as ir
import torch
from opset_comparison import NETWORKS, ROUNDS, Comparison

from dpctl.bench.compare import paired_ratio
from export.graph import write_graph
from runtime.network import Network

OUT = Path("build/simplify-comparison")
EXPORTED, SIMPLIFIED = "as exported", "simplified"


class Simplification(Comparison):
    """The graph of one network with and without our passes."""

    def graph(self, variant: str) -> Path:
        """Return the graph of a variant, exported."""
        path = self.folder / f"{variant}.onnx"
        if not path.is_file():
            simplify = (lambda model: model) if variant == EXPORTED else sys.modules["export.graph"].simplify
            with mock.patch("export.graph.simplify", simplify):
                write_graph(Network(self.unet).eval(), self.signature, path, {})
        return path


def rows(name: str) -> Iterator[str]:
    """Yield the lines of one network."""
    comparison, variants = Simplification(name, OUT), (EXPORTED, SIMPLIFIED)
    taken = [comparison.once(f"batch-{b}", partial(comparison.times, variants, b)) for b in ROUNDS]
    for variant in variants:
        ratios = [paired_ratio(found[variant], found[EXPORTED]) for found in taken]
        told = [f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" if variant != EXPORTED else "1" for r in ratios]
        nodes = len(ir.load(comparison.graph(variant)).graph)
        yield "| " + " | ".join([name, variant, str(nodes), *told]) + " |"


def main() -> int:
    """Print the table as Markdown."""
    torch.set_num_threads(1)
    print(f"| {' | '.join(['network', 'graph', 'nodes', *(f'ORT, batch {batch}' for batch in ROUNDS)])} |")
    print("|---" * 5 + "|")
    for name in NETWORKS:
        for line in rows(name):
            print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
