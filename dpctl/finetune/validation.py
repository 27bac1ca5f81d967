"""The denoising loss on images that training never sees, by the timesteps it is at."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpctl.data import Batch, TrainingSet
from dpctl.diffusion import denoising_loss, noise_for

BUCKETS = 8


@dataclass(frozen=True)
class Validation:
    """The held-out samples at `positions`, each at one timestep of every bucket, with noise that never changes."""

    examples: TrainingSet
    positions: Sequence[int]
    scheduler: Any
    first: int  # the first timestep that the network takes
    batch_size: int
    seed: int

    def __call__(self, unet: Any, device: Any) -> Tensor:
        """Return the mean loss of a network in every bucket, [BUCKETS], from the lowest timesteps on."""
        unet.eval()
        total = torch.zeros(BUCKETS, dtype=torch.float64)
        for start in range(0, len(self.positions), self.batch_size):
            rows = range(start, min(start + self.batch_size, len(self.positions)))
            batch = self.examples.plain([self.positions[row] for row in rows])
            for bucket in range(BUCKETS):
                total[bucket] += float(self._losses(unet, batch, rows, bucket, device).double().sum())
        unet.train()
        return total / len(self.positions)

    @torch.no_grad()
    def _losses(self, unet: Any, batch: Batch, rows: range, bucket: int, device: Any) -> Tensor:
        noise = noise_for(self.seed + bucket, rows, batch.clean.shape[1:], "validate")
        timesteps = torch.tensor([self.timestep(row, bucket) for row in rows], device=device)
        given = batch.to(device)
        return denoising_loss(unet, self.scheduler, given.clean, noise.to(device), timesteps, given.conditions)

    def timestep(self, row: int, bucket: int) -> int:
        """Return the timestep of a sample in a bucket: the samples are spread evenly over each."""
        total = int(self.scheduler.config.num_train_timesteps)
        place = (bucket + (row + 0.5) / len(self.positions)) / BUCKETS
        return max(self.first, min(total - 1, int(place * total)))


def entry(step: int, losses: Tensor) -> dict[str, Any]:
    """Return what is kept of a validation after `step` steps: the loss of every bucket, and their mean."""
    buckets = losses.tolist()
    return {"step": step, "loss": sum(buckets) / len(buckets), "buckets": buckets}


def is_best(validated: Sequence[dict[str, Any]]) -> bool:
    """Tell whether the last validation has the lowest loss of all."""
    return all(validated[-1]["loss"] < earlier["loss"] for earlier in validated[:-1])


def has_stalled(validated: Sequence[dict[str, Any]], patience: int) -> bool:
    """Tell whether none of the last `patience` validations has a lower loss than the best before them; 0 never does."""
    if patience == 0 or len(validated) <= patience:
        return False
    best = min(each["loss"] for each in validated[:-patience])
    return all(each["loss"] >= best for each in validated[-patience:])
