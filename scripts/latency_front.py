"""Compare networks of the same measured latency, and write the tables of docs/latency.md: `make latency-front`.

Each arm is pruned to a share of the unpruned model's latency on this machine, judged as it is and again after a short
finetune. The latency file has to be there first (`dpctl profile`); what it predicted stands in the results. An arm that
is in the results file, made by the same recipe, is not made again.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from dpctl import chain, cost, environment
from dpctl.bench.metrics import Drawn, Figure, mean_figure
from dpctl.bench.quality import judge
from dpctl.bench.result import difference
from dpctl.errors import DpctlError
from dpctl.finetune import finetune
from dpctl.latency.document import read_profile
from dpctl.models import load_model, resolve
from dpctl.recipe import LatencyRecipe, PruneRecipe
from dpctl.report.page import interval
from dpctl.units import percent
from scripts.before_finetuning import Gauge, make, read, tell, write
from scripts.latency_subjects import ROOT, SUBJECTS, Subject, as_reference, ready

# How the widths are chosen. One ratio for all groups is what tools for pruning do.
UNIFORM = "one ratio for all groups"
METHODS: dict[str, dict[str, Any]] = {
    UNIFORM: {"align": 16, "scope": "local"},
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
DIFFERENCES = ("latency asked", "widths", "seeds", *HEADINGS[5:])
WHEN = ("before", "after")

Entry = dict[str, Any]


def recipe_of(method: str, share: str, subject: Subject = SUBJECTS["reference"], seed: int = 0) -> PruneRecipe:
    """Return the recipe of an arm."""
    model = str(subject.profile) if method.startswith(BY_MODEL) else None
    wanted = LatencyRecipe(share, threads=subject.threads, model=model)
    scored: dict[str, Any] = {"data": subject.data, "images": subject.images, "seed": seed}
    return PruneRecipe(latency=wanted, compensate=True, **scored, **METHODS[method])


def key_of(method: str, share: str, seed: int = 0) -> str:
    """Return the name of an arm's entry."""
    return f"{method}/{share}" + (f"/seed {seed}" if seed else "")


def take(method: str, share: str, subject: Subject, seed: int, gauge: Gauge) -> Entry:
    """Prune, judge, finetune, judge again; return the figures."""
    if method.startswith(BY_MODEL) and not read_profile(subject.profile).is_from_here:
        command = f"dpctl profile {subject.model} --out {subject.profile} --threads {subject.threads} --force"
        raise DpctlError("the latency file is of another machine", str(subject.profile), f"make one here: {command}")
    with tempfile.TemporaryDirectory() as folder:
        slim, tuned = Path(folder) / "slim", Path(folder) / "tuned"
        manifest = chain.prune(subject.model, slim, recipe_of(method, share, subject, seed))
        finetune(str(slim), tuned, dataclasses.replace(subject.tuned, seed=seed))
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
    model, unpruned = load_model(directory), directory == resolve(gauge.model)
    drawn = gauge.baseline if unpruned else gauge.draw(directory)
    figures = judge(Drawn(drawn, None if unpruned else gauge.baseline, gauge.space))[0]
    losses = gauge.probe.losses(model.unet)
    return {
        "digest": model.digest,
        "loss": float(losses.mean()),
        "losses": [round(value, 6) for value in losses.tolist()],
        "macs": cost.stats(model.unet)["macs"],
        # The replicates of the FID are kept, for the interval of a difference.
        "figures": {
            name: dataclasses.asdict(figure) | {"replicates": rounded(figure.replicates) if name == "fid" else []}
            for name, figure in figures.items()
        },
    }


def rounded(values: Sequence[float]) -> list[float]:
    """Return values as a file needs them."""
    return [round(value, 3) for value in values]


def cells(entry: Entry) -> list[str]:
    """Return an arm's figures as text, as HEADINGS name them behind the widths."""
    timed = entry["timed"]
    predicted = f", predicted {timed['predicted']:.3f}" if "predicted" in timed else ""
    told = [f"{timed['ratio']:.3f} [{timed['low']:.3f}, {timed['high']:.3f}]{predicted}"]
    told += [percent(entry["achieved"][name]) for name in ("macs", "params")]
    for when in WHEN:
        told += [f"{entry[when]['loss']:.4f}", interval(fid_of(entry[when]))]
    return told


def fid_of(judgement: Entry) -> Figure:
    """Return the FID of what was judged."""
    return Figure(**judgement["figures"]["fid"])


def markdown(headings: Sequence[str], rows: Sequence[str]) -> list[str]:
    """Return the lines of a table; none without rows."""
    return [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|", *rows, ""] if rows else []


def table(done: dict[str, Entry], shares: Sequence[str], unpruned: Entry) -> list[str]:
    """Return the lines of the table of the unpruned network and the first seed's arms that are done."""
    whole = ["1", "unpruned", "1", "100 %", "100 %", f"{unpruned['loss']:.4f}", interval(fid_of(unpruned)), "", ""]
    rows = [f"| {' | '.join(whole)} |"] + [
        f"| {share} | {method} | {' | '.join(cells(done[key_of(method, share)]))} |"
        for share in shares
        for method in METHODS
        if key_of(method, share) in done
    ]
    return markdown(HEADINGS, rows)


def differences(done: dict[str, Entry], shares: Sequence[str], seeds: int) -> list[str]:
    """Return the lines of the table of what each way differs by from one ratio for all groups, of equal latency."""
    rows = []
    for share in shares:
        for method in METHODS:
            keys = [(key_of(method, share, seed), key_of(UNIFORM, share, seed)) for seed in range(seeds)]
            pairs = [(done[one], done[other]) for one, other in keys if one in done and other in done]
            if method != UNIFORM and pairs:
                told = [
                    compared([(one[when], other[when]) for one, other in pairs])
                    for when in WHEN
                    for compared in COMPARED
                ]
                rows.append(f"| {share} | {method} | {len(pairs)} | {' | '.join(told)} |")
    return markdown(DIFFERENCES, rows)


def loss_difference(pairs: Sequence[tuple[Entry, Entry]]) -> str:
    """Return the difference of losses with its interval: over seeds, or over the images of one."""
    if len(pairs) > 1:
        return over_seeds([one["loss"] - other["loss"] for one, other in pairs], 4)
    one, other = pairs[0]
    if "losses" not in one or "losses" not in other:
        return f"{one['loss'] - other['loss']:+.4f}"
    found = mean_figure(np.subtract(one["losses"], other["losses"]), against="", better="")
    return f"{found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"


def fid_difference(pairs: Sequence[tuple[Entry, Entry]]) -> str:
    """Return the difference of FIDs with its interval: over seeds, or over the pictures of one."""
    if len(pairs) > 1:
        return over_seeds([fid_of(one).value - fid_of(other).value for one, other in pairs], 2)
    one, other = (fid_of(each) for each in pairs[0])
    found = difference(one, other) if one.replicates and other.replicates else None
    if found is None:
        return f"{one.value - other.value:+.2f}"
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


COMPARED: tuple[Callable[[Sequence[tuple[Entry, Entry]]], str], ...] = (loss_difference, fid_difference)


def over_seeds(values: Sequence[float], digits: int) -> str:
    """Return the mean of a few values and its 95 % interval by Student's t."""
    middle = mean(values)
    reach = float(student.ppf(0.975, len(values) - 1)) * stdev(values) / len(values) ** 0.5
    return f"{middle:+.{digits}f} [{middle - reach:+.{digits}f}, {middle + reach:+.{digits}f}]"


def arms(
    only: Sequence[str] | None, subject: Subject = SUBJECTS["reference"], seeds: int = 1
) -> list[tuple[str, str, int]]:
    """Return (method, share, seed) of the arms that are asked for; all ways for the first seed, three for others."""
    few = [method for method in METHODS if "--" not in method]
    return [
        (method, share, seed)
        for seed in range(seeds)
        for share in subject.shares
        if not only or share in only
        for method in (few if seed else METHODS)
    ]


def gauge_of(subject: Subject, samples: int) -> Gauge:
    """Return what a subject's arms are measured with."""
    gauge = Gauge(samples, subject.model, subject.data)
    if subject.model != "reference":
        gauge.seen = as_reference
    return gauge


def main() -> int:
    """Measure what is missing, print the tables; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=SUBJECTS, default="reference", help="what is cut")
    parser.add_argument("--only", action="append", metavar="SHARE", help="of the unpruned latency, such as 0.5")
    parser.add_argument("--method", action="append", choices=METHODS, help="how widths are chosen; all without")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="seeds of scoring and finetuning, from 0 on")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page that gets the tables between its markers")
    asked = parser.parse_args()
    subject = SUBJECTS[asked.model]
    out = ROOT / "docs" / "latency" / subject.file
    torch.set_num_threads(subject.threads)  # sums in one order, however many cores there are

    def measured() -> str:
        document, gauge = read(out, subject.samples), gauge_of(ready(subject), subject.samples)
        done = document["arms"]
        if "unpruned" not in document:
            document["unpruned"] = judged(resolve(subject.model), gauge)
            write(out, document)
        for method, share, seed in arms(asked.only, subject, asked.seeds):
            if asked.method and method not in asked.method:
                continue
            taking = partial(take, method, share, subject, seed, gauge)
            key, recipe = key_of(method, share, seed), recipe_of(method, share, subject, seed)
            make(done, key, recipe, taking, lambda: write(out, document), cells)
        every = range(1 + max((entry["recipe"]["seed"] for entry in done.values()), default=0))
        return "\n".join(
            [*table(done, subject.shares, document["unpruned"]), *differences(done, subject.shares, len(every))]
        )

    begin, end = (f"<!-- latency-{out.stem}: {which} -->" for which in ("begin", "end"))
    return tell(measured, asked.page, begin, end)


if __name__ == "__main__":
    sys.exit(main())
