"""Compare networks of the same measured latency, and write the table of docs/latency.md: `make latency-front`.

Each arm is pruned to a share of the unpruned model's latency on this machine, judged as it is and again after a short
finetune. `profile` has to be there first (`dpctl profile reference`); what it predicted stands in the results. An arm
that is in the results file, made by the same recipe, is not made again.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dpctl import chain, cost, environment
from dpctl.bench.metrics import Drawn, Figure
from dpctl.bench.quality import judge
from dpctl.errors import DpctlError
from dpctl.finetune import finetune
from dpctl.latency.document import read_profile
from dpctl.models import load_model, resolve
from dpctl.recipe import FinetuneRecipe, LatencyRecipe, PruneRecipe
from dpctl.report.page import interval
from dpctl.units import percent
from scripts.before_finetuning import MODEL, Gauge, make, read, tell, write

ROOT = Path(__file__).resolve().parent.parent
OUT, PROFILE = ROOT / "docs" / "latency" / "front.json", Path("docs/latency/profile.json")  # from the root
BEGIN, END = "<!-- latency-front: begin -->", "<!-- latency-front: end -->"

SHARES = ("0.7", "0.5", "0.35")
TUNED = FinetuneRecipe(steps=100, mixed_precision="bf16")
# How the widths are chosen. One ratio for all groups is what tools for pruning do.
METHODS: dict[str, dict[str, Any]] = {
    "one ratio for all groups": {"align": 16, "scope": "local"},
    "most importance within the MACs": {"align": 16, "scope": "global"},
    "most importance within the MACs, --norm-groups": {"align": 16, "scope": "global", "norm_groups": True},
    "most importance within the MACs, --depth": {"align": 16, "scope": "global", "depth": True},
    "most importance within the latency": {"align": 1},
    "most importance within the latency, --depth": {"align": 1, "depth": True},
}
BY_MODEL = "most importance within the latency"
HEADINGS = (
    "latency asked",
    "widths",
    "measured",
    "MACs",
    "parameters",
    "loss",
    "FID",
    "loss, 100 steps",
    "FID, 100 steps",
)

Entry = dict[str, Any]


def recipe_of(method: str, share: str) -> PruneRecipe:
    """Return the recipe of an arm."""
    model = str(PROFILE) if method.startswith(BY_MODEL) else None
    wanted = LatencyRecipe(share, threads=1, model=model)
    return PruneRecipe(latency=wanted, compensate=True, **METHODS[method])


def key_of(method: str, share: str) -> str:
    """Return the name of an arm's entry."""
    return f"{method}/{share}"


def take(method: str, share: str, gauge: Gauge) -> Entry:
    """Prune, judge, finetune, judge again; return the figures."""
    if method.startswith(BY_MODEL) and not read_profile(PROFILE).is_from_here:
        todo = f"make one here: dpctl profile {MODEL} --out {PROFILE} --threads 1 --held-out 20 --force"
        raise DpctlError("the latency file is of another machine", str(PROFILE), todo)
    with tempfile.TemporaryDirectory() as folder:
        slim, tuned = Path(folder) / "slim", Path(folder) / "tuned"
        manifest = chain.prune(MODEL, slim, recipe_of(method, share))
        finetune(str(slim), tuned, TUNED)
        told = manifest.stats["latency"]
        return {
            "timed": told["builds"][told["chosen"]],
            "builds": told["builds"],
            "achieved": manifest.stats["achieved"],
            "before": judged(slim, gauge),
            "after": judged(tuned, gauge),
            "environment": environment.describe(),
        }


def judged(directory: Path, gauge: Gauge) -> Entry:
    """Return the denoising loss of a model and the figures of its pictures."""
    model, unpruned = load_model(directory), directory == resolve(MODEL)
    drawn = gauge.baseline if unpruned else gauge.draw(directory)
    figures = judge(Drawn(drawn, None if unpruned else gauge.baseline, gauge.space))[0]
    return {
        "digest": model.digest,
        "loss": gauge.probe.loss(model.unet),
        "macs": cost.stats(model.unet)["macs"],
        "figures": {name: dataclasses.asdict(figure) | {"replicates": []} for name, figure in figures.items()},
    }


def cells(entry: Entry) -> list[str]:
    """Return an arm's figures as text, as HEADINGS name them behind the widths."""
    timed = entry["timed"]
    predicted = f", predicted {timed['predicted']:.3f}" if "predicted" in timed else ""
    told = [f"{timed['ratio']:.3f} [{timed['low']:.3f}, {timed['high']:.3f}]{predicted}"]
    told += [percent(entry["achieved"][name]) for name in ("macs", "params")]
    for when in ("before", "after"):
        told += [f"{entry[when]['loss']:.4f}", interval(Figure(**entry[when]["figures"]["fid"]))]
    return told


def table(done: dict[str, Entry]) -> str:
    """Return the Markdown table of the arms that are done."""
    rows = [
        f"| {share} | {method} | {' | '.join(cells(done[key_of(method, share)]))} |"
        for share in SHARES
        for method in METHODS
        if key_of(method, share) in done
    ]
    return "\n".join([f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *rows, ""]) if rows else ""


def arms(only: Sequence[str] | None) -> list[tuple[str, str]]:
    """Return (method, share) of the arms that are asked for."""
    return [(method, share) for share in SHARES if not only or share in only for method in METHODS]


def main() -> int:
    """Measure what is missing, print the table; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="the results, which are gone on with")
    parser.add_argument("--samples", type=int, default=1024, metavar="N", help="pictures of each arm")
    parser.add_argument("--only", action="append", choices=SHARES, metavar="SHARE", help=f"of: {', '.join(SHARES)}")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page that gets the table between its markers")
    asked = parser.parse_args()
    torch.set_num_threads(1)  # sums in one order, however many cores there are

    def measured() -> str:
        document, gauge = read(asked.out, asked.samples), Gauge(asked.samples)
        done = document["arms"]
        for method, share in arms(asked.only):
            taking = partial(take, method, share, gauge)
            key, recipe = key_of(method, share), recipe_of(method, share)
            make(done, key, recipe, taking, lambda: write(asked.out, document), cells)
        return table(done)

    return tell(measured, asked.page, BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
