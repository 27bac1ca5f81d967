"""Compare losses and timestep samplings at a fixed budget, and write the table of docs/losses.md: `make loss-defaults`.

Every arm finetunes the same cut of `reference` by `dpctl.finetune.finetune`, as many steps on as many images, and is
drawn in the same noise. The results file holds what is done: an arm that is in it, made by the same recipe, is not made
again. After a change of the code remove the file, or the arm in it.
"""

import argparse
import dataclasses
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from dpctl import environment
from dpctl.bench.metrics import Drawn, Figure
from dpctl.bench.quality import judge
from dpctl.data import Pixels, open_data
from dpctl.diffusion import first_timestep
from dpctl.errors import DpctlError
from dpctl.finetune import finetune
from dpctl.finetune.draws import Draws
from dpctl.finetune.validation import Validation
from dpctl.models import load_model, resolve
from dpctl.prune import prune
from dpctl.recipe import FinetuneRecipe, PruneRecipe, to_dict
from dpctl.report.page import interval
from dpctl.signature import sample_size
from scripts.before_finetuning import MODEL, Gauge, make, options, read, tell, write

OUT = Path(__file__).resolve().parent.parent / "docs" / "finetuning" / "loss_defaults.json"
BEGIN, END = "<!-- loss-defaults: begin -->", "<!-- loss-defaults: end -->"

CUT = PruneRecipe(target_macs=0.5, align=16)
# Checkpoints would only take time: an arm is short.
BASE = FinetuneRecipe(
    steps=200, distillation=3.0, mixed_precision="bf16", validation=256, validate_every=200, checkpoint_every=200
)
# What the arms change in BASE.
ARMS: dict[str, dict[str, Any]] = {
    "denoising": {"distillation": 0.0},
    "distillation-1": {"distillation": 1.0},
    "distillation-3": {},
    "learning-rate-1e-3": {"learning_rate": 1e-3},
    "learning-rate-2e-3": {"learning_rate": 2e-3},
    "distillation-10": {"distillation": 10.0},
    "distillation-alone": {"denoising": 0.0, "distillation": 1.0},
    # On this cut the error of the features begins as large as the denoising error, with a gradient of the same norm.
    "features-0.1": {"feature_distillation": 0.1},
    "features-0.3": {"feature_distillation": 0.3},
    "features-1": {"feature_distillation": 1.0},
    "features-1-for-output": {"feature_distillation": 1.0, "distillation": 0.0},
    "min-snr-5": {"min_snr_gamma": 5.0},
    "min-snr-5-denoising": {"min_snr_gamma": 5.0, "distillation": 0.0},
    "antithetic": {"timestep_sampling": "antithetic"},
    "importance": {"timestep_sampling": "importance"},
    "importance-denoising": {"timestep_sampling": "importance", "distillation": 0.0},
}
UNPRUNED, UNTRAINED = "unpruned", "not finetuned"
HEADINGS = ("what differs", "held-out loss", "FID", "SSIM to the unpruned")

Entry = dict[str, Any]


def recipe_of(arm: str, seed: int) -> FinetuneRecipe | None:
    """Return the recipe of an arm; None for the two that are not finetuned."""
    return dataclasses.replace(BASE, **ARMS[arm], seed=seed) if arm in ARMS else None


def key_of(arm: str, seed: int) -> str:
    """Return the name of an arm's entry in the results."""
    return f"{arm}/{seed}"


class Bench:
    """The cut network that every arm begins with, and what each is measured with."""

    def __init__(self, samples: int, folder: Path) -> None:
        self.gauge, self._folder = Gauge(samples), folder

    @cached_property
    def cut(self) -> Path:
        """The directory of the pruned network."""
        prune(MODEL, self._folder / "cut", CUT)
        return self._folder / "cut"

    def take(self, arm: str, seed: int) -> Entry:
        """Finetune as the arm says and return the figures of what that gave."""
        recipe = recipe_of(arm, seed)
        began = time.perf_counter()
        if recipe is None:
            return self._measured(resolve(MODEL) if arm == UNPRUNED else self.cut, arm, seed)
        with tempfile.TemporaryDirectory(dir=self._folder) as folder:
            finetune(str(self.cut), Path(folder) / "tuned", recipe)
            trained_s = time.perf_counter() - began
            return self._measured(Path(folder) / "tuned", arm, seed) | {"trained_s": trained_s}

    def _measured(self, directory: Path, arm: str, seed: int) -> Entry:
        drawn = self.gauge.baseline if arm == UNPRUNED else self.gauge.draw(directory)
        figures, _ = judge(Drawn(drawn, None if arm == UNPRUNED else self.gauge.baseline, self.gauge.space))
        buckets = held_out(directory, seed)
        return {
            "cut": load_model(self.cut).digest,
            "digest": load_model(directory).digest,
            "held_out_loss": sum(buckets) / len(buckets),
            "held_out_buckets": buckets,
            # The bootstrap's replicates make the interval, which stays.
            "figures": {name: dataclasses.asdict(figure) | {"replicates": []} for name, figure in figures.items()},
            "environment": environment.describe(),
        }


def held_out(directory: Path, seed: int) -> list[float]:
    """Return a model's denoising loss on the images that no arm of this seed trains on, by parts of the schedule."""
    model, recipe = load_model(directory), dataclasses.replace(BASE, seed=seed)
    config = model.unet.config
    examples = Pixels(open_data(recipe.data, channels=config.in_channels, size=sample_size(config)))
    positions, first = Draws(examples, recipe).held_out(), first_timestep(model.unet)
    judging = Validation(examples, positions, model.scheduler, first, recipe.batch_size, seed)
    losses: list[float] = judging(model.unet, torch.device("cpu")).tolist()
    return losses


def fill(done: dict[str, Entry], arms: Iterable[tuple[str, int]], bench: Bench, save: Callable[[], None]) -> None:
    """Measure the arms that `done` does not hold yet by the same recipe; save after each.

    Raises a DpctlError where those it holds began with another cut network.
    """
    for arm, seed in arms:
        make(done, key_of(arm, seed), recipe_of(arm, seed), partial(_taken, done, arm, seed, bench), save, _told)


def _taken(done: dict[str, Entry], arm: str, seed: int, bench: Bench) -> Entry:
    entry = bench.take(arm, seed)
    if any(other["cut"] != entry["cut"] for other in done.values()):
        got = f"{entry['cut'][:12]}; those of the file began with another"
        raise DpctlError("the cut network is not the one of the results", got, "give another --out")
    return entry


def _told(entry: Entry) -> list[str]:
    return cells([entry])


def cells(entries: list[Entry]) -> list[str]:
    """Return the figures of an arm as text, one of each seed, as HEADINGS name them behind what differs."""
    told = [", ".join(f"{entry['held_out_loss']:.5f}" for entry in entries)]
    for name in ("fid", "ssim"):
        figures = [Figure(**entry["figures"][name]) for entry in entries if name in entry["figures"]]
        told.append(", ".join(interval(figure) for figure in figures) or "-")
    return told


def table(done: dict[str, Entry], seeds: int) -> str:
    """Return the Markdown table of the arms that are done for the first `seeds` seeds; others have no line."""
    rows = []
    for arm in (UNPRUNED, UNTRAINED, *ARMS):
        entries = [done[key] for key in (key_of(arm, seed) for seed in range(seeds)) if key in done]
        if entries:
            recipe = recipe_of(arm, 0)
            what = options(to_dict(recipe), to_dict(BASE)) if recipe else arm
            rows.append(f"| {' | '.join([what, *cells(entries)])} |")
    changed = {name: value for name, value in to_dict(BASE).items() if name != "checkpoint_every"}
    command = f"dpctl finetune CUT --out DIR {options(changed, to_dict(FinetuneRecipe())).strip('`')}".strip()
    head = f"After `dpctl prune {MODEL} --out CUT {options(to_dict(CUT), to_dict(PruneRecipe())).strip('`')}`,"
    lines = [head, f"by `{command}` and", "", f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|", *rows]
    return "\n".join([*lines, ""]) if rows else ""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="the results, which are gone on with")
    parser.add_argument("--samples", type=int, default=1024, metavar="N", help="pictures of each arm")
    parser.add_argument("--seeds", type=int, default=1, metavar="N", help="how often each arm is made")
    parser.add_argument("--only", action="append", choices=tuple(ARMS), metavar="ARM", help=f"of: {', '.join(ARMS)}")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page that gets the table between its markers")
    return parser.parse_args()


def main() -> int:
    """Measure what is missing, print the table; return the exit code."""
    asked = arguments()
    torch.set_num_threads(1)  # sums in one order, however many cores there are
    wanted = [arm for arm in ARMS if asked.only is None or arm in asked.only]
    arms = [(arm, seed) for seed in range(asked.seeds) for arm in (UNPRUNED, UNTRAINED, *wanted)]

    def measured() -> str:
        document = read(asked.out, asked.samples)
        with tempfile.TemporaryDirectory() as folder:
            bench = Bench(asked.samples, Path(folder))
            fill(document["arms"], arms, bench, lambda: write(asked.out, document))
        return table(document["arms"], asked.seeds)

    return tell(measured, asked.page, BEGIN, END)


if __name__ == "__main__":
    sys.exit(main())
