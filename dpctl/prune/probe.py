"""Images to score, fit and measure a network on, and its denoising loss on the same ones every time."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dpctl import environment, progress
from dpctl.data import TrainingSet, open_training_set, require_trainable
from dpctl.diffusion import denoising_loss, noise_for, sample_generator
from dpctl.errors import DpctlError
from dpctl.models import Model
from dpctl.recipe import LoopRecipe, PruneRecipe


def takes_data(source: Model) -> bool:
    """Tell whether a data set gives the loss of a model."""
    with suppress(DpctlError):
        require_trainable(source)
        return True
    return False


def open_images(
    source: Model, recipe: PruneRecipe, most: int, failed: str, todo: str, bar: progress.Bar = progress.no_bar
) -> TrainingSet:
    """Open the recipe's data for a model, of which `most` are encoded where it works in latent space.

    A DpctlError says that it `failed` where no data set gives the model's loss.
    """
    require_fed(source, failed, todo)
    seen = LoopRecipe(data=recipe.data, seed=recipe.seed, flip=False)
    return open_training_set(source, seen, cache=environment.cache("data"), bar=bar, most=most)


def require_fed(source: Model, failed: str, todo: str) -> None:
    """Raise a DpctlError, which says that it `failed`, unless a data set gives the loss of a model."""
    try:
        require_trainable(source)
    except DpctlError as problem:
        got = f"{problem.failed}: {problem.got}"
        raise DpctlError(failed, got, f"{todo}: no data set gives the loss of such a model") from None


@dataclass(frozen=True)
class Probe:
    """Clean samples [B, C, H, W], their conditions, noise and the timesteps that every cut is measured on."""

    scheduler: Any
    clean: Tensor
    noise: Tensor
    timesteps: tuple[int, ...]
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def loss(self, unet: Any) -> float:
        """Return the mean denoising loss over images and timesteps. Raises a DpctlError where it is not finite."""
        return float(self.losses(unet).mean())

    def losses(self, unet: Any) -> Tensor:
        """Return the denoising loss of each image [B], the mean over timesteps, in double precision."""
        total = torch.zeros(len(self.clean), dtype=torch.float64)
        for t in self.timesteps:
            with torch.no_grad():
                timesteps = torch.full((len(self.clean),), t, dtype=torch.long, device=self.clean.device)
                given = (self.clean, self.noise, timesteps, self.conditions)
                total += denoising_loss(unet, self.scheduler, *given).cpu().double()
        if not total.isfinite().all():
            raise DpctlError(
                "the denoising loss is not finite",
                f"{float(total.mean())} over the timesteps {list(self.timesteps)}",
                "the weights or the data hold NaN or Inf: check the model",
            )
        return total / len(self.timesteps)


def open_probe(
    unet: Any,
    scheduler: Any,
    images: TrainingSet,
    *,
    count: int,
    timesteps: int,
    seed: int,
    stream: str = "sensitivity",
) -> Probe:
    """Return the probe of a seed: `count` images, and timesteps in the middle of equal parts of the schedule."""
    order = torch.randperm(len(images), generator=sample_generator(seed, 0, f"{stream}-images"))[:count].tolist()
    device = next(unet.parameters()).device
    seen = images.plain(order).to(device)
    noise = noise_for(seed, order, seen.clean.shape[1:], f"{stream}-noise").to(device)
    total = int(scheduler.config.num_train_timesteps)
    parts = min(timesteps, total)
    middles = tuple((2 * part + 1) * total // (2 * parts) for part in range(parts))
    return Probe(scheduler, seen.clean, noise, middles, seen.conditions)
