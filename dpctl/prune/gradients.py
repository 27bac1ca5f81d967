"""Gradients of the denoising loss at the timesteps that count (paper, section 4.2), a small batch at a time.

The threshold follows the paper's definition: a timestep counts if L_t / L_max > T. (The reference code tests after
`backward()`, so that the first timestep below the threshold still counts there; here it does not.)

The reference code takes one batch with one noise through every timestep. Its gradients of neighbouring timesteps are
nearly the same ones. Here every image has a noise and a timestep of its own, spread evenly over those that count: a
few hundred of them give scores that agree with a full pass better than two full passes do (docs/pruning.md).
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpctl import progress
from dpctl.data import TrainingSet
from dpctl.diffusion import denoising_loss, first_timestep, noise_for, sample_generator
from dpctl.errors import DpctlError

# Images that the loss of each timestep is looked up on, to tell which timesteps count.
LOOKED_AT = 8


@dataclass(frozen=True)
class Weighting:
    """Which timesteps count: those with L_t / L_max > `threshold` among the first fraction `early` of the schedule."""

    threshold: float = 0.0
    early: float = 1.0

    def active(self, losses: dict[int, float], total: int) -> tuple[int, ...]:
        """Return the timesteps that count, of a schedule of `total`."""
        return tuple(t for t in active_timesteps(losses, self.threshold) if t < self.early * total)


@dataclass(frozen=True)
class Draws:
    """How many images are drawn, and how many of them make one gradient: `accumulation` batches of `batch_size`.

    `timesteps` is the number of parts of the schedule that count, or do not, as a whole.
    """

    images: int
    batch_size: int
    accumulation: int
    timesteps: int
    weighting: Weighting
    seed: int

    def work(self, scheduler: Any) -> int:
        """Return the number of images that pass through the network, for a progress bar."""
        looked_at = LOOKED_AT * len(timestep_grid(scheduler, self.timesteps)) if self.weighting.threshold else 0
        return self.images + looked_at


@dataclass(frozen=True)
class Active:
    """The parts of the schedule that count, by the first timestep of each, among all; and the losses that told."""

    timesteps: tuple[int, ...]
    grid: tuple[int, ...]
    losses: dict[int, float]


def each_gradient(
    unet: Any,
    scheduler: Any,
    images: TrainingSet,
    draws: Draws,
    each: Callable[[], None],
    advance: progress.Advance = progress.silent,
) -> Active:
    """Call `each` after every gradient of the denoising loss, which lies in `.grad` then and is cleared after.

    Image i of a seed has its noise and its timestep whatever the batch size. No graph is kept from one batch to the
    next: the memory is that of one training step. Raises a DpctlError where a loss or a gradient is not finite.
    """
    active = find_active(unet, scheduler, images, draws, advance)
    order, timesteps = draw(images, scheduler, active, draws)
    device = next(unet.parameters()).device
    unet.requires_grad_(True).zero_grad(set_to_none=True)
    try:
        for group in _portions(range(len(order)), draws.batch_size * draws.accumulation):
            for batch in _split(group, draws.batch_size):
                seen = images.plain([order[i] for i in batch]).to(device)
                noise = noise_for(draws.seed, batch, seen.clean.shape[1:], "score-noise").to(device)
                given = (seen.clean, noise, timesteps[list(batch)].to(device), seen.conditions)
                losses = denoising_loss(unet, scheduler, *given)
                _require_losses(timesteps[list(batch)].tolist(), losses.tolist())
                (losses.sum() / len(group)).backward()
                advance(len(batch))
            found = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
            require_finite(found, f"images {group[0]} to {group[-1]} of the draw")
            each()
            unet.zero_grad(set_to_none=True)
    finally:
        unet.zero_grad(set_to_none=True)
    return active


def find_active(
    unet: Any, scheduler: Any, images: TrainingSet, draws: Draws, advance: progress.Advance = progress.silent
) -> Active:
    """Return the timesteps that count; a threshold takes a forward pass over the schedule."""
    grid = timestep_grid(scheduler, draws.timesteps, first_timestep(unet))
    losses = dict.fromkeys(grid, 1.0)  # alike, as long as nobody asks
    if draws.weighting.threshold:
        order = _order(images, LOOKED_AT, draws.seed, "score-losses")
        device = next(unet.parameters()).device
        batches = _split(range(len(order)), draws.batch_size)
        seen = [images.plain([order[i] for i in batch]).to(device) for batch in batches]
        noise = noise_for(draws.seed, range(len(order)), seen[0].clean.shape[1:], "score-losses").to(device)
        for t in grid:
            timesteps = torch.full((len(order),), t, dtype=torch.long, device=device)
            with torch.no_grad():
                given = zip(seen, noise.split(draws.batch_size), timesteps.split(draws.batch_size), strict=True)
                parts = [denoising_loss(unet, scheduler, b.clean, n, at, b.conditions) for b, n, at in given]
            losses[t] = float(torch.cat(parts).mean())
            advance(len(order))
    active = draws.weighting.active(losses, int(scheduler.config.num_train_timesteps))
    return Active(active, tuple(grid), losses if draws.weighting.threshold else {})


def draw(images: TrainingSet, scheduler: Any, active: Active, draws: Draws) -> tuple[list[int], Tensor]:
    """Return the image and the timestep of every draw: the timesteps evenly over those that count, in random order."""
    total = int(scheduler.config.num_train_timesteps)
    ends = dict(itertools.pairwise([*active.grid, total]))
    counted = torch.cat([torch.arange(t, ends[t]) for t in active.timesteps])
    generator = sample_generator(draws.seed, 0, "score-timesteps")
    places = (torch.arange(draws.images) + torch.rand(draws.images, generator=generator)) / draws.images
    chosen = counted[(places * len(counted)).long().clamp(max=len(counted) - 1)]
    return (
        _order(images, draws.images, draws.seed, "score-images"),
        chosen[torch.randperm(draws.images, generator=generator)],
    )


def _order(images: TrainingSet, count: int, seed: int, stream: str) -> list[int]:
    """Return `count` images in random order; where there are fewer they come again, with other noise."""
    order: list[int] = torch.randperm(len(images), generator=sample_generator(seed, 0, stream)).tolist()
    return [order[i % len(order)] for i in range(count)]


def _portions(whole: range, size: int) -> list[range]:
    """Return as few equal parts as there can be of at most `size` (lengths differ by one at most)."""
    parts = -(-len(whole) // size)
    return [whole[i * len(whole) // parts : (i + 1) * len(whole) // parts] for i in range(parts)]


def _split(whole: range, size: int) -> list[range]:
    return [whole[i : i + size] for i in range(0, len(whole), size)]


def timestep_grid(scheduler: Any, count: int, first: int = 0) -> list[int]:
    """Return `count` timesteps evenly over the training schedule from `first` on; all where it has fewer."""
    total = int(scheduler.config.num_train_timesteps) - first
    count = min(count, total)
    return [first + step * total // count for step in range(count)]


def active_timesteps(losses: dict[int, float], threshold: float) -> tuple[int, ...]:
    """Return the timesteps with L_t / L_max > T. Raises a DpctlError where a loss is not finite."""
    _require_losses(list(losses), list(losses.values()))
    largest = max(losses.values())
    return tuple(t for t, loss in losses.items() if loss > threshold * largest)


def _require_losses(timesteps: Sequence[int], losses: Sequence[float]) -> None:
    bad = next((t for t, loss in zip(timesteps, losses, strict=True) if not 0 <= loss < float("inf")), None)
    if bad is not None:
        raise DpctlError(
            "the denoising loss is not finite",
            f"{dict(zip(timesteps, losses, strict=True))[bad]} at timestep {bad}",
            "the weights hold NaN or Inf, or are too large: check the model",
        )


def require_finite(gradients: Mapping[str, Tensor], where: str) -> None:
    """Raise a DpctlError that names the first gradient with NaN or Inf in it; `where` says which timestep or batch."""
    bad = next((name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())), None)
    if bad is not None:
        raise DpctlError(
            "a gradient is not finite",
            f"d(loss)/d({bad}) at {where}",
            "the weights are too large for a backward pass: check the model, or use --criterion magnitude or random",
        )
