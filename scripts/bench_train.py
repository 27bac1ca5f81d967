"""Print what a training step costs beside a plain diffusers training loop: `bench_train.py [--rounds N] [--steps N]`.

The reference network at half its MACs, batches of 16 on one thread. The plain loop is that of diffusers' example for
unconditional generation: accelerate, AdamW, a gradient clip, the EMA of diffusers.training_utils. The loops take turns
of a few steps each, and the ratio of a round is of medians of steps; memory is the peak of a process of its own.
"""

import argparse
import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers.training_utils import EMAModel

from dpctl import cost
from dpctl.data import Pixels, open_data
from dpctl.finetune import loop
from dpctl.finetune.loss import Objective
from dpctl.finetune.processes import open_accelerator
from dpctl.models import Model, load_model
from dpctl.prune import prune
from dpctl.recipe import LoopRecipe, PruneRecipe
from dpctl.units import bytes_, seconds

BATCH = 16
PLAIN, OURS, TAUGHT = "plain diffusers loop", "dpctl, no teacher", "dpctl, output distillation"
HEADS = ("loop", "a step", "to the plain loop", "limit", "peak memory")


def plain(model: Model, steps: int) -> Iterator[None]:
    """Train as diffusers' example does; yield after every step."""
    images = open_data("reference", channels=1, size=(28, 28))
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.unet.parameters(), lr=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows: Any = list(images.batch(range(4096)))
    data: Any = torch.utils.data.DataLoader(rows, batch_size=BATCH, shuffle=True)
    unet, optimizer, data, schedule = accelerator.prepare(model.unet.train(), optimizer, data, schedule)
    ema = EMAModel(unet.parameters(), decay=0.99, use_ema_warmup=True, power=0.75, foreach=True)
    for clean in itertools.islice(itertools.cycle(data), steps):
        noise = torch.randn_like(clean)
        timesteps = torch.randint(0, model.scheduler.config.num_train_timesteps, (len(clean),))
        noisy = model.scheduler.add_noise(clean, noise, timesteps)
        loss = F.mse_loss(unet(noisy, timesteps).sample, noise)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(unet.parameters())
        loss.item()
        yield


def ours(model: Model, steps: int, teacher: Any, done: Callable[..., None]) -> None:
    """Train as `dpctl finetune` does; call `done` after every step."""
    recipe = LoopRecipe(steps=steps, batch_size=BATCH, checkpoint_every=10**9)
    examples = Pixels(open_data("reference", channels=1, size=(28, 28)))
    objective = Objective(model.scheduler, teacher, distillation=3.0 if teacher is not None else 0.0)
    with tempfile.TemporaryDirectory() as folder:
        loop.train(
            model.unet,
            objective,
            examples,
            recipe,
            accelerator=open_accelerator(recipe),
            folder=Path(folder) / "c",
            advance=done,
        )


def times(which: str, slim: Path, steps: int) -> list[float]:
    """Return the seconds of each step of a loop, without its first two."""
    torch.manual_seed(0)
    model, ends = load_model(slim, verify=False), [time.perf_counter()]
    if which == PLAIN:
        ends.extend(time.perf_counter() for _ in plain(model, steps))
    else:
        teacher = load_model("reference").unet if which == TAUGHT else None
        ours(model, steps, teacher, lambda *_, **__: ends.append(time.perf_counter()))
    return [after - before for before, after in itertools.pairwise(ends)][2:]


def memory(which: str, slim: Path) -> int:
    """Return the bytes that a process takes at most while it trains, beyond what it has imported."""
    command = [sys.executable, __file__, "--peak", which, str(slim)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])


def peak(which: str, slim: Path) -> int:
    """Print the peak of this process for `memory`."""
    before = resident()
    times(which, slim, 4)
    print(resident() - before)
    return 0


def resident() -> int:
    """Return the most bytes that this process ever held (getrusage's figure begins with the parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def main() -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--peak", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.peak:
        return peak(asked.peak[0], Path(asked.peak[1]))
    with tempfile.TemporaryDirectory() as folder:
        slim = Path(folder) / "slim"
        prune("reference", slim, PruneRecipe("magnitude", target_macs=0.5, compensate=False))
        teacher, student = (cost.stats(load_model(name).unet)["macs"] for name in ("reference", slim))
        limits = {PLAIN: 1.0, OURS: 1.05, TAUGHT: 1 + teacher / (3 * student) + 0.1}
        found: dict[str, list[float]] = {which: [] for which in limits}
        for _ in range(asked.rounds):
            for which, medians in found.items():
                medians.append(median(times(which, slim, asked.steps + 2)))
        peaks = {which: memory(which, slim) for which in limits}
    print(f"| {' | '.join(HEADS)} |\n{'|---' * len(HEADS)}|")
    for which, medians in found.items():
        ratios = sorted(one / base for one, base in zip(medians, found[PLAIN], strict=True))
        told = f"{median(ratios):.3f} [{ratios[len(ratios) // 4]:.3f}, {ratios[-1 - len(ratios) // 4]:.3f}]"
        cells = (which, seconds(median(medians)), told, f"{limits[which]:.2f}", bytes_(peaks[which]))
        print(f"| {' | '.join(cells)} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
