"""Measure scoring on the reference model at 50 % MACs against a full pass: time, agreement and memory.

The full pass is the reference code's way: one batch with one fixed noise, a backward pass at every timestep from 0 on
until L_t / L_max <= T, gradients summed. Agreement is Cohen's kappa over all channels, kept or not. Everything goes to
the folder `--out`, which a second run goes on from; timings are of one process with one thread, in turns.
"""

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchmetrics.functional import cohen_kappa

from dpctl import progress
from dpctl.data import Pixels, open_data
from dpctl.diffusion import denoising_loss, noise_for, sample_generator
from dpctl.models import Model, load_model
from dpctl.prune.compensate import make_up
from dpctl.prune.groups import find_groups
from dpctl.prune.importance import Scoring, first_order, reduce_over
from dpctl.prune.network import describe
from dpctl.prune.plan import PruningPlan, select, uniform, widths_for_target
from dpctl.prune.probe import open_probe
from dpctl.prune.surgery import kept_indices, slim
from dpctl.recipe import REDUCTIONS, PruneRecipe
from dpctl.signature import sample_size
from dpctl.units import bytes_, seconds
from runtime.denoiser import memory_used

SEEDS = (0, 1, 2)
FULL_IMAGES, THRESHOLD, TARGET = 64, 0.05, 0.5
PASSES = ("train", "score", "compensate")
IMAGES = (64, 128, 256, 512, 1024)
Scores = dict[str, list[float]]


class Bench:
    """The reference model, its groups, and the folder of what was measured before."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.model: Model = load_model("reference")
        self.unet = self.model.unet
        config = self.unet.config
        self.images = Pixels(open_data("reference", channels=config.in_channels, size=sample_size(config)))
        self.groups = find_groups(self.unet)
        self.network = describe(self.unet, self.groups)

    def once(self, name: str, score: Callable[[], dict[str, Scores]]) -> tuple[dict[str, Scores], float]:
        """Return scores by reduction and the seconds that they took, from the folder where they are there."""
        path = self.out / f"{name}.json"
        if not path.is_file():
            start = time.perf_counter()
            scores = score()
            took = time.perf_counter() - start
            sys.stderr.write(f"{name}: {seconds(took)}\n")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"seconds": took, "scores": scores}), encoding="utf-8")
        read = json.loads(path.read_text(encoding="utf-8"))
        return read["scores"], read["seconds"]

    def full_pass(self, seed: int) -> dict[str, Scores]:
        """Score by one batch with one noise at every timestep above the threshold."""
        order = torch.randperm(len(self.images), generator=sample_generator(seed, 0, "full-images"))[:FULL_IMAGES]
        clean = self.images.plain(order.tolist()).clean
        noise = noise_for(seed, order.tolist(), clean.shape[1:], "full-noise")
        self.unet.requires_grad_(True).zero_grad(set_to_none=True)
        largest = 0.0
        for t in range(int(self.model.scheduler.config.num_train_timesteps)):
            timesteps = torch.full((len(clean),), t)
            loss = denoising_loss(self.unet, self.model.scheduler, clean, noise, timesteps).mean()
            largest = max(largest, loss.item())
            if loss.item() <= THRESHOLD * largest:
                break
            loss.backward()
        products = {name: p.detach() * p.grad for name, p in self.unet.named_parameters() if p.grad is not None}
        self.unet.zero_grad(set_to_none=True)
        return {
            reduction: {g.name: reduce_over(self.unet, g, products, reduction).tolist() for g in self.groups.prunable}
            for reduction in REDUCTIONS
        }

    def ours(self, seed: int, images: int, reduction: str) -> dict[str, Scores]:
        """Score as `dpctl prune` does."""
        recipe = PruneRecipe(target_macs=TARGET, images=images, reduction=reduction, threshold=THRESHOLD, seed=seed)
        scoring = Scoring(self.unet, self.groups.prunable, self.model.scheduler, self.images, recipe)
        return {reduction: {name: found.tolist() for name, found in first_order(scoring, "threshold").items()}}

    def plan(self, scores: Scores, scope: str) -> PruningPlan:
        """Return what stays: at the MACs target, or (local) of every group the same fraction, 70 %."""
        budget = TARGET * self.network.cost("macs", self.network.full())
        if scope == "local":
            return select(self.network, scores, uniform(self.network, 0.3, 1))
        return select(self.network, scores, widths_for_target(self.network, scores, "macs", budget, PruneRecipe.align))

    def agreement(self, one: Scores, other: Scores, scope: str) -> float:
        """Return Cohen's kappa between the channels that two sets of scores keep."""
        flags = [self._flags(self.plan(scores, scope)) for scores in (one, other)]
        return float(cohen_kappa(*flags, task="binary"))

    def _flags(self, plan: PruningPlan) -> Tensor:
        staying = {name: set(channels) for name, channels in plan.keep.items()}
        return torch.tensor([c in staying[s.name] for s in self.network.spans for c in range(s.width)]).int()

    def loss(self, scores: Scores) -> float:
        """Return the denoising loss after the cut to the MACs target, before compensation and finetuning."""
        probe = open_probe(
            self.unet, self.model.scheduler, self.images, count=64, timesteps=8, seed=9, stream="bench-scoring"
        )
        plan = self.plan(scores, "global")
        return probe.loss(slim(self.unet, kept_indices(self.unet, self.groups, plan)))


def measure(bench: Bench) -> Iterator[str]:
    """Yield the lines of the table, measuring what is not there yet."""
    full: dict[int, dict[str, Scores]] = {}
    ours: dict[tuple[int, str, int], dict[str, Scores]] = {}
    spent: dict[tuple[int, str, int], float] = {}
    for seed in SEEDS:  # in turns, so that a slow minute of the machine falls on both
        full[seed], spent[0, "", seed] = bench.once(f"full-{seed}", partial(bench.full_pass, seed))
        for images, reduction in itertools.product(IMAGES, REDUCTIONS):
            key = (images, reduction, seed)
            name = f"ours-{images}-{reduction}-{seed}"
            ours[key], spent[key] = bench.once(name, partial(bench.ours, seed, images, reduction))
    yield "| scoring | reduction | time of a full pass | kappa to full passes | to itself | (one ratio) | loss after |"
    yield "|---|---|---|---|---|---|---|"
    for reduction in REDUCTIONS:
        arms = {seed: full[seed][reduction] for seed in SEEDS}
        yield _row(bench, "full pass, 64 images", reduction, arms, arms, [1.0])
    for reduction, images in itertools.product(REDUCTIONS, IMAGES):
        arms = {seed: ours[images, reduction, seed][reduction] for seed in SEEDS}
        whole = {seed: full[seed][reduction] for seed in SEEDS}
        share = [spent[images, reduction, seed] / spent[0, "", seed] for seed in SEEDS]
        yield _row(bench, f"{images} images", reduction, arms, whole, share)
    yield f"\nA full pass took {seconds(statistics.median(spent[0, '', seed] for seed in SEEDS))}."


def _row(
    bench: Bench, name: str, reduction: str, arms: dict[int, Scores], whole: dict[int, Scores], share: list[float]
) -> str:
    others = [(a, b) for a in SEEDS for b in SEEDS if a != b]  # never two of one seed
    pairs = [(a, b) for a, b in others if a < b]

    def agreed(left: dict[int, Scores], right: dict[int, Scores], among: list[tuple[int, int]], scope: str) -> str:
        return f"{statistics.mean(bench.agreement(left[a], right[b], scope) for a, b in among):.3f}"

    local = f"{agreed(arms, whole, others, 'local')} / {agreed(arms, arms, pairs, 'local')}"
    cells = [agreed(arms, whole, others, "global"), agreed(arms, arms, pairs, "global"), local]
    losses = ", ".join(f"{bench.loss(scores):.3f}" for scores in arms.values())
    return f"| {name} | {reduction} | {statistics.median(share):.3f} | {' | '.join(cells)} | {losses} |"


def peak(what: str, batch: int) -> int:
    """Return how far the peak of this process's memory rises in training steps, scoring or compensation, in bytes."""
    bench = Bench(Path())
    before = _peak_resident()
    if what == "score":
        recipe = PruneRecipe(target_macs=TARGET, images=4 * batch, batch_size=batch)
        first_order(
            Scoring(bench.unet, bench.groups.prunable, bench.model.scheduler, bench.images, recipe), "threshold"
        )
    elif what == "compensate":
        recipe = PruneRecipe(batch_size=batch)
        scores: Scores = {span.name: list(range(span.width)) for span in bench.network.spans}
        kept = kept_indices(bench.unet, bench.groups, bench.plan(scores, "local"))
        small = slim(bench.unet, kept)
        make_up(bench.unet, small, kept, bench.model.scheduler, bench.images, recipe, progress.no_bar)
    else:
        optimizer = torch.optim.AdamW(bench.unet.parameters())
        for start in (0, batch):  # the second step is the first with the optimizer's state
            clean = bench.images.plain(range(start, start + batch)).clean
            noise = noise_for(0, range(start, start + batch), clean.shape[1:])
            loss = denoising_loss(bench.unet, bench.model.scheduler, clean, noise, torch.full((batch,), 100)).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return _peak_resident() - before


def _peak_resident() -> int:
    # Not getrusage's: that of a process includes what its parent held when it was started.
    return memory_used(torch.device("cpu"))["peak_resident_bytes"]


def memory() -> Iterator[str]:
    """Yield the lines of the table of memory; every figure is of a process of its own."""
    yield "| --batch-size | training step (AdamW) | scoring | ratio | compensation | ratio |"
    yield "|---|---|---|---|---|---|"
    for batch in (16, 64):
        found = [
            int(
                subprocess.run(
                    [sys.executable, __file__, "--peak", what, "--batch-size", str(batch)],
                    check=True,
                    capture_output=True,
                    text=True,
                ).stdout
            )
            for what in PASSES
        ]
        ratios = " | ".join(f"{bytes_(rise)} | {rise / found[0]:.2f}" for rise in found[1:])
        yield f"| {batch} | {bytes_(found[0])} | {ratios} |"


def main() -> None:
    """Print both tables as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/bench-scoring"))
    parser.add_argument("--peak", choices=PASSES, help="only print the bytes of one kind of pass")
    parser.add_argument("--batch-size", type=int, default=16)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.peak:
        print(peak(given.peak, given.batch_size))
        return
    for line in itertools.chain(measure(Bench(given.out)), [""], memory()):
        print(line, flush=True)


if __name__ == "__main__":
    main()
