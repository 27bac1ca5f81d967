"""Print the table of docs/export.md on narrowing: seconds of an export and of narrowing one graph instead.

Each network is cut to half of its MACs by magnitude; the weights of the paper's are random. One thread.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpctl.models import load_model
from dpctl.prune import prune
from dpctl.recipe import PruneRecipe
from dpctl.units import seconds
from export.narrow import narrow
from export.to_onnx import export_model
from scripts.pruning_sizes import write_random

PAPER = "DDPM, CIFAR-10 32x32"
HALF = PruneRecipe("magnitude", target_macs=0.5)


def took(work: Callable[[], Any]) -> float:
    """Return the seconds that something takes."""
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def row(name: str, model: str, folder: Path) -> str:
    """Return a line of the table."""
    prune(model, folder / "slim", HALF)
    slim = load_model(folder / "slim")
    export_model(load_model(model), folder / "whole")
    exporting = took(lambda: export_model(slim, folder / "exported"))
    narrowing = took(lambda: narrow(folder / "whole", slim.unet, folder / "narrow"))
    return f"| {name} | {seconds(exporting)} | {seconds(narrowing)} |"


def main() -> None:
    """Print the table as Markdown."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    print("| network, cut to half its MACs | `export_model` | `narrow` |", "|---|---|---|", sep="\n")
    with tempfile.TemporaryDirectory() as folder:
        paper = write_random(PAPER, Path(folder) / "paper")
        for name, model in (("reference", "reference"), ("the paper's for CIFAR-10, random weights", str(paper))):
            print(row(name, model, Path(tempfile.mkdtemp(dir=folder))))


if __name__ == "__main__":
    main()
