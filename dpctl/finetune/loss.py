"""The training loss: denoising error plus output distillation from the unpruned teacher."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpctl.diffusion import predicted_target


@dataclass(frozen=True)
class Objective:
    """E |eps - eps_slim|^2 + distillation * E |eps_teacher - eps_slim|^2, at the same noisy samples.

    Output distillation as in Hinton et al. (2015) with the network's output in the place of logits: the teacher's
    output is the conditional mean that the noise only samples, so its gradient has less variance.
    """

    scheduler: Any
    teacher: Any = None
    distillation: float = 0.0

    def __call__(self, unet: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the scalar loss of one batch: clean and noise [B, C, H, W], timesteps [B]."""
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        output = unet(noisy, timesteps).sample.float()
        target = predicted_target(self.scheduler, clean, noise, timesteps)
        loss = (output - target).square().mean()
        if self.teacher is None or self.distillation == 0.0:
            return loss
        with torch.no_grad():
            taught = self.teacher(noisy, timesteps).sample.float()
        return loss + self.distillation * (output - taught).square().mean()
