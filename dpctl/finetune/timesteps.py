"""Which timestep each sample of a step is noised to: a function of the seed, its global index and what was seen."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dpctl.diffusion import sample_generator


class Timesteps(Protocol):
    """A way to draw timesteps. Its state is part of a checkpoint."""

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the timesteps [B], int64, of global sample indices, and the weight [B] of each one's loss."""

    def observe(self, timesteps: Tensor, losses: Tensor) -> None:
        """Take in the loss [B] that each timestep [B] of a whole step had, over all processes."""

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""


class Uniform:
    """Every timestep from `first` on alike."""

    def __init__(self, first: int, total: int) -> None:
        self._first, self._total = first, total

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        places = [float(torch.rand((), generator=sample_generator(seed, index, "timestep"))) for index in indices]
        timesteps = (torch.tensor(places) * self._total).long().clamp(self._first, self._total - 1)
        return timesteps, torch.ones(len(timesteps))

    def observe(self, timesteps: Tensor, losses: Tensor) -> None:
        """Learn nothing."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


def make_timesteps(name: str, first: int, total: int) -> Timesteps:
    """Return the sampling of this name over the timesteps first ... total - 1."""
    return Uniform(first, total)
