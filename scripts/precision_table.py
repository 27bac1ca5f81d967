"""Print the table of docs/export.md: what each precision makes of `reference`, and of 30 % of it pruned.

Errors are relative L2 over the golden grid of timesteps, the largest of them. Takes a minute.
"""

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from dpctl.models import Model, load_model
from dpctl.prune import prune
from dpctl.recipe import PruneRecipe
from dpctl.signature import OUTPUT, of_unet
from dpctl.units import bytes_
from export import golden
from export.graph import write_graph
from export.half import evidence, relative_l2
from export.precision import PRECISIONS, emulated, lower
from runtime.backends.ort import run_graph
from runtime.network import Network

HEADS = (
    "network", "precision", "graph", "nodes in float32", "weights to 0", "subnormal",
    "torch's own error", "the graph's", "at most of torch's", "with ORT's kernels", "headroom",
)  # fmt: skip


def rows(name: str, model: Model, folder: Path) -> Iterator[str]:
    """Yield the lines of one network."""
    config = {**model.unet.config, "_class_name": type(model.unet).__name__}
    network, signature = Network(model.unet).eval(), of_unet(config, (1, 8, 64))
    write_graph(network, signature, folder / "fp32.onnx", {})
    given = golden.inputs(signature, golden.timestep_grid(model.scheduler), model.unet.config.get("num_class_embeds"))
    expected = golden.with_outputs(network, given)
    for precision in PRECISIONS:
        path = folder / f"{precision}.onnx"
        lowered = lower(ir.load(folder / "fp32.onnx"), precision)
        ir.save(lowered.model, path)
        kept = sum(len(names) for names in lowered.report["fp32"].values())
        weights = lowered.report["weights"]
        cells = [name, precision, bytes_(path.stat().st_size)]
        if precision == "fp32":
            cells += ["all", "", "", "0", f"{max(errors(path, expected)):.1e}", "", "", ""]
        else:
            cells += [str(kept), *(str(weights[key]) for key in ("to_zero", "subnormal"))]
            cells += compared(model, path, expected, precision)
        yield "| " + " | ".join(cells) + " |"


def compared(model: Model, path: Path, expected: Mapping[str, Tensor], precision: str) -> list[str]:
    """Return the errors of a lowered graph beside torch's own."""
    found = evidence(model.unet, expected, precision)
    own = found["relative_l2"]
    native = f"{max(errors(path, expected)):.1e}" if precision == "fp16" else "none for bf16"
    rounded = path.with_name(f"{precision}-emulated.onnx")
    ir.save(emulated(ir.load(path)), rounded)
    ours = errors(rounded, expected)
    ratio = max(one / other for one, other in zip(ours, own, strict=True))
    room = f"{found['headroom']['headroom']:.0f}x ({found['headroom']['module']})" if "headroom" in found else ""
    return [f"{max(own):.1e}", f"{max(ours):.1e}", f"{ratio:.2f}x", native, room]


def errors(graph: Path, expected: Mapping[str, Tensor]) -> list[float]:
    """Return the relative L2 of every row on ONNX Runtime."""
    given = {name: value.numpy() for name, value in expected.items() if name != OUTPUT}
    (output,) = run_graph(graph, given, [OUTPUT])
    return [relative_l2(row, wanted) for row, wanted in zip(torch.from_numpy(output), expected[OUTPUT], strict=True)]


def main() -> None:
    """Print the table as Markdown."""
    torch.set_num_threads(1)
    print(f"| {' | '.join(HEADS)} |", "|---" * len(HEADS) + "|", sep="\n")
    with tempfile.TemporaryDirectory() as scratch:
        slim = Path(scratch) / "slim"
        prune("reference", slim, PruneRecipe(criterion="magnitude", ratio=0.3))
        sources: dict[str, Any] = {"reference": "reference", "pruned": slim}
        for name, source in sources.items():
            for line in rows(name, load_model(source), Path(scratch)):
                print(line, flush=True)


if __name__ == "__main__":
    main()
