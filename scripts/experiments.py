"""Run the experiments behind docs/experiments.md, and write its table: `make evidence`.

Half of the MACs of `reference` go by each criterion, and what is left is finetuned for a tenth of the reference's own
training, with distillation and without; beside it the same slim network from random weights. Every arm has a file of
results of its own, and goes on after a stop from the checkpoint of its finetune. Several processes may run at once:
each takes the arms that no other holds. After a change of the code remove the files of the arms it concerns.
"""

import argparse
import dataclasses
import fcntl
import hashlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dpctl import cost, environment
from dpctl.bench.compare import interval as paired
from dpctl.bench.metrics import Drawn, Figure
from dpctl.bench.quality import judge, load_samples, save_samples
from dpctl.bench.result import difference
from dpctl.finetune import checkpoint, finetune
from dpctl.models import load_model, resolve
from dpctl.prune import prune
from dpctl.recipe import FinetuneRecipe, PruneRecipe, to_dict
from dpctl.report.page import interval
from dpctl.units import percent
from scripts.before_finetuning import MODEL, Gauge, alike, options, tell, write
from scripts.loss_defaults import held_out

ROOT = Path(__file__).resolve().parent.parent
RESULTS, WORK = ROOT / "docs" / "experiments", ROOT / "build" / "experiments"
BEGIN, END = "<!-- experiments: begin -->", "<!-- experiments: end -->"

TRAINED = 4000  # steps of the reference's own training (dpctl/reference/README.md)
# Every arm is compensated: a criterion is to be judged by the channels it keeps, not by what is done afterwards.
HALF = PruneRecipe(target_macs=0.5, align=16, compensate=True)
TENTH = FinetuneRecipe(steps=TRAINED // 10, mixed_precision="bf16", validation=256, validate_every=TRAINED // 10)
PLAIN: Mapping[str, Any] = {"distillation": 0.0}
TWICE: Mapping[str, Any] = {"steps": TRAINED // 5, "validate_every": TRAINED // 5}

Entry = dict[str, Any]
Results = Mapping[tuple[str, int], Entry]


@dataclass(frozen=True)
class Arm:
    """What one line of the table changes in HALF and TENTH."""

    name: str
    cut: Mapping[str, Any] = field(default_factory=dict)
    tune: Mapping[str, Any] = field(default_factory=dict)

    def recipes(self, seed: int) -> tuple[PruneRecipe, FinetuneRecipe]:
        """Return the two recipes; the seed is of both."""
        return dataclasses.replace(HALF, **self.cut, seed=seed), dataclasses.replace(TENTH, **self.tune, seed=seed)


CRITERIA: Mapping[str, Mapping[str, Any]] = {
    "random": {"criterion": "random"},
    "magnitude": {"criterion": "magnitude"},
    "taylor": {"criterion": "taylor"},
    "diff-pruning-0": {"threshold": 0.0},
    "diff-pruning-0.02": {"threshold": 0.02},
    "diff-pruning-0.05": {},
    "diff-pruning-0.2": {"threshold": 0.2},
}
BEST, UNPRUNED, SCRATCH = "diff-pruning-0.05", "unpruned", "scratch"
SEEDED = ("random", "taylor", BEST)
DISTILLED = [Arm(name, cut) for name, cut in CRITERIA.items()]
UNTAUGHT = [Arm(f"{name}-plain", CRITERIA[name], PLAIN) for name in SEEDED]
FROM_RANDOM = Arm(SCRATCH, CRITERIA[BEST], {"from_scratch": True})
LONGER = [Arm(f"{arm.name}-twice", arm.cut, {**arm.tune, **TWICE}) for arm in (Arm(BEST, CRITERIA[BEST]), FROM_RANDOM)]
BARE = [Arm(f"{name}-bare", {**CRITERIA[name], "compensate": False}) for name in ("random", BEST)]
ARMS = {arm.name: arm for arm in (*DISTILLED, FROM_RANDOM, *UNTAUGHT, *LONGER, *BARE)}
# In this order: what decides the most comes first.
LATER = [(f"{name}{kind}", seed) for seed in (1, 2) for name in SEEDED for kind in ("", "-plain")]
ORDER: list[tuple[str, int]] = [(UNPRUNED, 0), *((name, 0) for name in ARMS), *LATER]


@contextmanager
def held(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold a lock that ends with this process; yield whether it is ours, which it is always after `wait`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True


class Laboratory:
    """Makes the arms: what may be used again (cuts, pictures, checkpoints) stays in `work`, figures go to `results`."""

    def __init__(self, samples: int, results: Path, work: Path) -> None:
        self.gauge, self.results, self.work = Gauge(samples), results, work

    def path(self, arm: str, seed: int) -> Path:
        """Return the file of an arm's figures."""
        return self.results / f"{arm}.{seed}.json"

    def done(self, arm: str, seed: int) -> Entry | None:
        """Return the figures of an arm; None where they are missing, or of other recipes or numbers of samples."""
        path = self.path(arm, seed)
        if not path.is_file():
            return None
        entry: Entry = json.loads(path.read_text(encoding="utf-8"))
        cut, tune = ARMS[arm].recipes(seed) if arm in ARMS else (None, None)
        same = alike(entry["prune"], cut) and alike(entry["finetune"], tune)
        return entry if same and entry["samples"] == self.gauge.samples else None

    def take(self, arm: str, seed: int) -> None:
        """Make an arm and write its figures."""
        if arm == UNPRUNED:
            self._write(arm, seed, resolve(MODEL), {"prune": None, "finetune": None})
            return
        cut, tune = ARMS[arm].recipes(seed)
        slim, out = self._cut(cut), self.work / f"{arm}.{seed}"
        if not out.exists():
            finetune(str(slim), out, tune, resume=checkpoint.folder_for(out).exists())
        asked = {"prune": to_dict(cut), "finetune": to_dict(tune)}
        self._write(arm, seed, out, asked | {"cut": load_model(slim).digest})
        shutil.rmtree(out)

    def _cut(self, recipe: PruneRecipe) -> Path:
        name = hashlib.sha256(json.dumps(to_dict(recipe), sort_keys=True).encode()).hexdigest()[:16]
        directory = self.work / "cuts" / name
        with held(directory.with_suffix(".lock"), wait=True):
            if not directory.exists():
                prune(MODEL, directory, recipe)
        return directory

    def _write(self, arm: str, seed: int, directory: Path, more: Entry) -> None:
        model = load_model(directory)
        baseline = None if arm == UNPRUNED else self._pictures(UNPRUNED, 0, resolve(MODEL))
        drawn = Drawn(self._pictures(arm, seed, directory), baseline, self.gauge.space)
        buckets = held_out(directory, seed)
        entry = {
            "samples": self.gauge.samples,
            **more,
            "digest": model.digest,
            **cost.stats(model.unet),
            "held_out_loss": sum(buckets) / len(buckets),
            "held_out_buckets": buckets,
            "figures": {name: rounded(figure) for name, figure in judge(drawn)[0].items()},
            "environment": environment.describe(),
        }
        write(self.path(arm, seed), entry)

    def _pictures(self, arm: str, seed: int, directory: Path) -> Any:
        path = self.work / "pictures" / f"{arm}.{seed}.{self.gauge.samples}.{load_model(directory).digest[:16]}.npz"
        with held(path.with_suffix(".lock"), wait=True):
            if not path.exists():
                save_samples(path, [self.gauge.draw(directory)])
        return load_samples(path)


def rounded(figure: Figure) -> Entry:
    """Return a figure as JSON; its replicates pair up with another arm's, and five digits do for that."""
    return dataclasses.asdict(figure) | {"replicates": [float(f"{value:.5g}") for value in figure.replicates]}


def figure_of(entry: Entry, name: str) -> Figure:
    """Return a figure of an arm's entry."""
    values = entry["figures"][name]
    return Figure(**values | {"replicates": tuple(values["replicates"])})


def run(lab: Laboratory, order: Sequence[tuple[str, int]]) -> None:
    """Make the arms that are neither done nor held by another process."""
    for arm, seed in order:
        with held(lab.work / "locks" / f"{arm}.{seed}") as ours:
            if not ours or lab.done(arm, seed) is not None:
                sys.stderr.write(f"{arm}, seed {seed}: {'done before' if ours else 'another process has it'}\n")
                continue
            began = time.perf_counter()
            lab.take(arm, seed)
            sys.stderr.write(f"{arm}, seed {seed}: {time.perf_counter() - began:.0f} s\n")


def command(what: str, recipe: Any, default: Any) -> str:
    """Return a command with the options in which a recipe differs from the defaults."""
    told = options(to_dict(recipe), to_dict(default)).strip("`")
    return f"`dpctl {what} {told}`".replace(" (no others)", "")


def changes(arm: str) -> list[str]:
    """Return what an arm changes in the two commands, as options."""
    if arm not in ARMS:
        return ["(unpruned)", ""]
    cut, tune = ARMS[arm].recipes(HALF.seed)
    told = [options(to_dict(cut), to_dict(HALF)), options(to_dict(tune), to_dict(TENTH))]
    return ["" if text == "(no others)" else text for text in told]


def against(entry: Entry, other: Entry | None) -> str:
    """Return an arm's FID minus another's, with the interval of the difference: both drew from the same noise."""
    found = difference(figure_of(entry, "fid"), figure_of(other, "fid")) if other not in (None, entry) else None
    return f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]" if found else "-"


def ratio(entry: Entry, other: Entry) -> str:
    """Return an arm's FID over another's, with the interval of the ratio."""
    one, two = figure_of(entry, "fid"), figure_of(other, "fid")
    low, high = paired([a / b for a, b in zip(one.replicates, two.replicates, strict=True)])
    return f"{one.value / two.value:.2f} [{low:.2f}, {high:.2f}]"


def row(done: Results, arm: str) -> list[str]:
    """Return the cells of an arm's first seed, as HEADINGS name them."""
    entry, whole = done[arm, 0], done[UNPRUNED, 0]
    told = [interval(figure_of(entry, name)) if name in entry["figures"] else "-" for name in ("fid", "kid", "ssim")]
    sizes = percent(entry["params"] / whole["params"])
    return [*changes(arm), sizes, f"{entry['held_out_loss']:.5f}", *told, against(entry, done.get((BEST, 0)))]


def seeds(done: Results, arm: str) -> list[str]:
    """Return the cells of an arm over its seeds, as SEEDS name them."""
    entries = [done[arm, seed] for seed in range(3) if (arm, seed) in done]
    fids = [figure_of(entry, "fid").value for entry in entries]
    ssims = [figure_of(entry, "ssim").value for entry in entries]
    told = [", ".join(f"{value:.2f}" for value in fids), f"{statistics.mean(fids):.2f}"]
    spread = f"{max(fids) - min(fids):.2f}" if len(fids) > 1 else "-"
    losses = statistics.mean(entry["held_out_loss"] for entry in entries)
    return [*changes(arm), *told, spread, f"{statistics.mean(ssims):.3f}", f"{losses:.5f}"]


HEADINGS = ("prune", "finetune", "parameters", "held-out loss", "FID", "KID", "SSIM", "FID minus the default's")
SEEDS = ("prune", "finetune", "FID by seed", "mean", "range", "SSIM, mean", "held-out loss, mean")


def markdown(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a table with its title; nothing without rows."""
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return [f"**{title}**", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", *lines, ""] if rows else []


def tables(done: Results) -> str:
    """Return the tables of the arms that are done; nothing without the unpruned model."""
    if (UNPRUNED, 0) not in done:
        return ""
    half = command(f"prune {MODEL} --out CUT", HALF, PruneRecipe())
    tenth = command("finetune CUT --out DIR", TENTH, FinetuneRecipe())
    single = [arm.name for arm in (*DISTILLED, FROM_RANDOM, *BARE)]
    repeated = [f"{name}{kind}" for kind in ("", "-plain") for name in SEEDED]
    longer = [
        [*row(done, arm.name)[:-1], ratio(done[arm.name, 0], done[UNPRUNED, 0])]
        for arm in (ARMS[BEST], *LONGER)
        if (arm.name, 0) in done
    ]
    lines = [
        f"Every line is {half} and {tenth}, with the options in its first two columns, and",
        f"{next(iter(done.values()))['samples']} pictures of DDIM in 20 steps.",
        "",
        *markdown("Seed 0", HEADINGS, [row(done, arm) for arm in (UNPRUNED, *single) if (arm, 0) in done]),
        *markdown("Three seeds", SEEDS, [seeds(done, arm) for arm in repeated if (arm, 0) in done]),
        *markdown("Twice the steps", (*HEADINGS[:-1], "FID over the unpruned's"), longer),
    ]
    return "\n".join([*lines, ""])


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="the figures, a file for each arm")
    parser.add_argument("--work", type=Path, default=WORK, metavar="DIR", help="cuts, pictures and checkpoints")
    parser.add_argument("--samples", type=int, default=2048, metavar="N", help="pictures of each arm")
    parser.add_argument("--only", action="append", choices=tuple(ARMS), metavar="ARM", help=f"of: {', '.join(ARMS)}")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page that gets the tables between its markers")
    return parser.parse_args()


def main() -> int:
    """Make what is missing, print the tables; return the exit code."""
    asked = arguments()
    torch.set_num_threads(1)  # sums in one order, however many cores there are
    lab = Laboratory(asked.samples, asked.results, asked.work)

    def measured() -> str:
        run(lab, [(arm, seed) for arm, seed in ORDER if asked.only is None or arm in (UNPRUNED, *asked.only)])
        found = {(arm, seed): lab.done(arm, seed) for arm, seed in ORDER}
        return tables({key: entry for key, entry in found.items() if entry is not None})

    return tell(measured, asked.page, BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
