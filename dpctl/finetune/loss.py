"""The training loss: denoising error plus output distillation from the unpruned teacher."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpctl.data import Batch
from dpctl.diffusion import predict, predicted_target


@dataclass(frozen=True)
class Objective:
    """denoising * E |eps - eps_slim|^2 + distillation * E |eps_teacher - eps_slim|^2, at the same noisy samples.

    Output distillation as in Hinton et al. (2015) with the network's output in the place of logits: the teacher's
    output is the conditional mean that the noise only samples, so its gradient has less variance.
    """

    scheduler: Any
    teacher: Any = None
    denoising: float = 1.0
    distillation: float = 0.0

    def __call__(self, unet: Any, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the loss of each sample of a batch, [B]: noise [B, C, H, W], timesteps [B]."""
        noisy = self.scheduler.add_noise(batch.clean, noise, timesteps)
        output = predict(unet, noisy, timesteps, batch.conditions)
        target = predicted_target(self.scheduler, batch.clean, noise, timesteps)
        loss = self.denoising * (output - target).square().flatten(1).mean(1)
        if self.teacher is None or self.distillation == 0.0:
            return loss
        with torch.no_grad():
            taught = predict(self.teacher, noisy, timesteps, batch.conditions)
        return loss + self.distillation * (output - taught).square().flatten(1).mean(1)
