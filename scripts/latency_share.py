"""Say which part of the MACs that go becomes time, and write the table of docs/latency.md: `make latency-share`.

The paper's network for CIFAR-10 and `reference`, each to half of its latency in ONNX Runtime: by one ratio for all
groups, and by a latency model of this machine, which is made first. An arm that is in the results file is not made
again.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpctl import chain, environment, progress
from dpctl.latency.profile import profile
from dpctl.recipe import LatencyRecipe, PruneRecipe
from dpctl.units import percent
from scripts.before_finetuning import make, read, tell, write
from scripts.latency_subjects import ROOT, SUBJECTS, ready

OUT, WORK = ROOT / "docs" / "latency" / "share.json", Path("build/latency")  # from the root
BEGIN, END = "<!-- latency-share: begin -->", "<!-- latency-share: end -->"

MODELS, BATCHES = ("CIFAR-10", "reference"), (1, 8)
THREADS, TARGET, NETWORKS, HELD_OUT = 2, "0.5", 16, 4
WAYS: Mapping[str, Mapping[str, Any]] = {
    "one ratio for all groups": {"align": 8, "scope": "local"},
    "by the latency model": {"align": 1},
    "by the latency model, --depth": {"align": 1, "depth": True, "scope": "global"},
}
HEADINGS = ("network", "images", "widths", "measured latency", "MACs", "of the MACs saved, became time")

Entry = dict[str, Any]


def recipe_of(name: str, batch: int, way: str) -> PruneRecipe:
    """Return the recipe of an arm."""
    file = str(profile_of(name, batch)) if way.startswith("by the latency model") else None
    wanted = LatencyRecipe(TARGET, batch_size=batch, threads=THREADS, model=file)
    scored: dict[str, Any] = {"data": SUBJECTS[name].data, "images": SUBJECTS[name].images}
    return PruneRecipe(latency=wanted, compensate=False, **scored, **WAYS[way])


def profile_of(name: str, batch: int) -> Path:
    """Return the latency file of a model: the one of the docs where it is of the same threads."""
    subject = SUBJECTS[name]
    if batch == 1 and subject.threads == THREADS:
        return subject.profile
    return WORK / f"{name}, {batch}.json"


def take(name: str, batch: int, way: str) -> Entry:
    """Prune; return what the chosen network took, and its MACs."""
    recipe, path, model = recipe_of(name, batch, way), profile_of(name, batch), ready(SUBJECTS[name]).model
    if recipe.latency is not None and recipe.latency.model:
        asked = LatencyRecipe(batch_size=batch, threads=THREADS)
        more: Any = {"networks": NETWORKS, "held_out": HELD_OUT, "resume": True, "bar": progress.bar}
        report = profile(model, path, asked, **more)
        told = report.json
        sys.stderr.write("\n".join(map(str, report.renderables)) + "\n")
    else:
        told = {}
    with tempfile.TemporaryDirectory() as folder:
        manifest = chain.prune(model, Path(folder) / "slim", recipe)
    found = manifest.stats["latency"]
    return {
        "chosen": found["builds"][found["chosen"]],
        "builds": found["builds"],
        "gone": sum(1 for _, kept in manifest.stats["widths"].values() if kept == 0),
        "model": {name: told[name] for name in ("rank_correlation", "median_error", "worst_error") if name in told},
        "environment": environment.describe(),
    }


def shares(chosen: Entry) -> list[float]:
    """Return the part of the MACs saved that became time: its value, and the ends of its interval."""
    return [(1 - chosen[name]) / (1 - chosen["macs"]) for name in ("ratio", "high", "low")]


def cells(entry: Entry) -> list[str]:
    """Return an arm's figures as text, as HEADINGS name them behind the widths."""
    chosen = entry["chosen"]
    value, low, high = shares(chosen)
    measured = f"{chosen['ratio']:.3f} [{chosen['low']:.3f}, {chosen['high']:.3f}]"
    return [measured, percent(chosen["macs"]), f"{value:.2f} [{low:.2f}, {high:.2f}]"]


def arms() -> list[tuple[str, int, str]]:
    """Return (model, batch, way) of every arm."""
    return [(name, batch, way) for name in MODELS for batch in BATCHES for way in WAYS]


def table(done: Mapping[str, Entry]) -> str:
    """Return the Markdown table of the arms that are done."""
    rows = [
        f"| {name} | {batch} | {way} | {' | '.join(cells(done[key]))} |"
        for name, batch, way in arms()
        if (key := f"{name}/{batch}/{way}") in done
    ]
    return "\n".join([f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *rows, ""]) if rows else ""


def main() -> int:
    """Measure what is missing, print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="the results, which are gone on with")
    parser.add_argument("--only", action="append", metavar="NAME", help="arms whose name begins so, such as CIFAR-10/1")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page that gets the table between its markers")
    asked = parser.parse_args()
    torch.set_num_threads(THREADS)

    def measured() -> str:
        document = read(asked.out, 0)
        done = document["arms"]
        for name, batch, way in arms():
            key = f"{name}/{batch}/{way}"
            if asked.only is None or key.startswith(tuple(asked.only)):
                taking = partial(take, name, batch, way)
                make(done, key, recipe_of(name, batch, way), taking, lambda: write(asked.out, document), cells)
        return table(done)

    return tell(measured, asked.page, BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
