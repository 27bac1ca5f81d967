"""Denoising gradients over timesteps, and which timesteps count (paper, section 4.2).

The threshold follows the paper's definition: a timestep counts if L_t / L_max > T. (The reference code tests after
`backward()`, so that the first timestep below the threshold still counts there; here it does not.)
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpctl import progress
from dpctl.data import Images
from dpctl.diffusion import denoising_loss, noise_for, sample_generator
from dpctl.errors import DpctlError


@dataclass(frozen=True)
class Weighting:
    """Which timesteps count: those with L_t / L_max > `threshold` among the first fraction `early` of the schedule."""

    threshold: float = 0.0
    early: float = 1.0

    def active(self, losses: dict[int, float], total: int) -> tuple[int, ...]:
        """Return the timesteps that count, of a schedule of `total`."""
        return tuple(t for t in active_timesteps(losses, self.threshold) if t < self.early * total)


@dataclass(frozen=True)
class Gradients:
    """Parameter name -> d(sum over active t of L_t)/d(parameter), and how the timesteps were chosen."""

    by_name: dict[str, Tensor]
    losses: dict[int, float]
    active: tuple[int, ...]


def timestep_grid(scheduler: Any, count: int) -> list[int]:
    """Return `count` timesteps evenly over the training schedule, the first included; all where it has fewer."""
    total = int(scheduler.config.num_train_timesteps)
    count = min(count, total)
    return [step * total // count for step in range(count)]


def active_timesteps(losses: dict[int, float], threshold: float) -> tuple[int, ...]:
    """Return the timesteps with L_t / L_max > T. Raises a DpctlError where a loss is not finite."""
    bad = [t for t, loss in losses.items() if not 0 <= loss < float("inf")]
    if bad:
        raise DpctlError(
            "the denoising loss is not finite",
            f"timestep {bad[0]}",
            "the weights hold NaN or Inf, or are too large: check the model",
        )
    largest = max(losses.values())
    return tuple(t for t, loss in losses.items() if loss > threshold * largest)


def accumulate(
    unet: Any,
    scheduler: Any,
    images: Images,
    *,
    count: int,
    timesteps: int,
    weighting: Weighting,
    seed: int,
    each: Callable[[], None] | None = None,
    advance: progress.Advance = progress.silent,
) -> Gradients:
    """Return the gradients of the denoising loss, summed over the timesteps that matter.

    One batch of `count` images with one fixed noise serves all timesteps, as in the reference code; `timesteps` of
    them are looked at. No graph is kept over timesteps, so the memory is that of one training step. With `each`, the
    gradients are not summed: it is called after every timestep's, which lie in `.grad` and are then cleared.
    """
    order = torch.randperm(len(images), generator=sample_generator(seed, 0, "score-images"))[:count].tolist()
    device = next(unet.parameters()).device
    clean = images.batch(order).to(device)
    noise = noise_for(seed, order, clean.shape[1:], "score-noise").to(device)

    # Which timesteps matter: a forward pass over the grid.
    losses: dict[int, float] = {}
    grid = timestep_grid(scheduler, timesteps)
    for t in grid:
        with torch.no_grad():
            losses[t] = float(_loss_at(unet, scheduler, clean, noise, t))
        advance(1)

    # Their gradients: autograd adds up in .grad, one timestep's graph at a time.
    active = weighting.active(losses, int(scheduler.config.num_train_timesteps))
    unet.requires_grad_(True).zero_grad(set_to_none=True)
    for t in grid:
        if t in active:
            _loss_at(unet, scheduler, clean, noise, t).backward()
            require_finite({name: p.grad for name, p in unet.named_parameters() if p.grad is not None}, f"timestep {t}")
            if each is not None:
                each()
                unet.zero_grad(set_to_none=True)
        advance(1)
    gradients = {name: p.grad.detach().clone() for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad(set_to_none=True)
    return Gradients(gradients, losses, active)


def require_finite(gradients: Mapping[str, Tensor], where: str) -> None:
    """Raise a DpctlError that names the first gradient with NaN or Inf in it; `where` says which timestep or batch."""
    bad = next((name for name, gradient in gradients.items() if not bool(gradient.isfinite().all())), None)
    if bad is not None:
        raise DpctlError(
            "a gradient is not finite",
            f"d(loss)/d({bad}) at {where}",
            "the weights are too large for a backward pass: check the model, or use --criterion magnitude or random",
        )


def _loss_at(unet: Any, scheduler: Any, clean: Tensor, noise: Tensor, timestep: int) -> Tensor:
    timesteps = torch.full((len(clean),), timestep, dtype=torch.long, device=clean.device)
    return denoising_loss(unet, scheduler, clean, noise, timesteps).mean()
