"""Images to score, fit and measure a network on, and its denoising loss on the same ones every time."""

import math
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpctl.data import Images, open_data, require_pixels
from dpctl.diffusion import denoising_loss, noise_for, require_image_to_image, sample_generator
from dpctl.errors import DpctlError
from dpctl.recipe import PruneRecipe
from dpctl.signature import sample_size


def takes_images(unet: Any) -> bool:
    """Tell whether images alone give the loss of a network."""
    with suppress(DpctlError):
        require_fed(unet, "", "")
        return True
    return False


def open_images(unet: Any, recipe: PruneRecipe, failed: str, todo: str) -> Images:
    """Open the recipe's data for a network; a DpctlError says that it `failed` where images alone give no loss."""
    require_fed(unet, failed, todo)
    return open_data(recipe.data, channels=unet.config.in_channels, size=sample_size(unet.config))


def require_fed(unet: Any, failed: str, todo: str) -> None:
    """Raise a DpctlError, which says that it `failed`, unless images alone give the loss of a network."""
    try:
        require_image_to_image(unet.config)
        require_pixels(unet.config.in_channels)
    except DpctlError as problem:
        raise DpctlError(
            failed,
            f"{problem.failed}: {problem.got}",
            f"{todo}: images alone do not give the loss of such a model",
        ) from None


@dataclass(frozen=True)
class Probe:
    """Images [B, C, H, W], noise of their shape and timesteps that every cut is measured on."""

    scheduler: Any
    clean: Tensor
    noise: Tensor
    timesteps: tuple[int, ...]

    def loss(self, unet: Any) -> float:
        """Return the mean denoising loss over images and timesteps. Raises a DpctlError where it is not finite."""
        total = 0.0
        for t in self.timesteps:
            with torch.no_grad():
                timesteps = torch.full((len(self.clean),), t, dtype=torch.long, device=self.clean.device)
                total += float(denoising_loss(unet, self.scheduler, self.clean, self.noise, timesteps).mean())
        if not math.isfinite(total):
            raise DpctlError(
                "the denoising loss is not finite",
                f"{total} over the timesteps {list(self.timesteps)}",
                "the weights or the data hold NaN or Inf: check the model",
            )
        return total / len(self.timesteps)


def open_probe(
    unet: Any, scheduler: Any, images: Images, *, count: int, timesteps: int, seed: int, stream: str = "sensitivity"
) -> Probe:
    """Return the probe of a seed: `count` images, and timesteps in the middle of equal parts of the schedule."""
    order = torch.randperm(len(images), generator=sample_generator(seed, 0, f"{stream}-images"))[:count].tolist()
    device = next(unet.parameters()).device
    clean = images.batch(order).to(device)
    noise = noise_for(seed, order, clean.shape[1:], f"{stream}-noise").to(device)
    total = int(scheduler.config.num_train_timesteps)
    parts = min(timesteps, total)
    return Probe(scheduler, clean, noise, tuple((2 * part + 1) * total // (2 * parts) for part in range(parts)))
