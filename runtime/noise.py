"""The randomness of sampling: every sample has its own, so that none depends on the batch it is drawn in."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dpctl.diffusion import noise_for, sample_generator


def initial_noise(seed: int, indices: Sequence[int], shape: Sequence[int]) -> Tensor:
    """Return the noise [B, *shape] that sampling starts from; row i depends on (seed, indices[i]) only."""
    return noise_for(seed, indices, shape)


def step_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per sample for schedulers that add noise at each step.

    Their stream is not the one of `initial_noise`: the first step would add the very noise it started from.
    """
    return [sample_generator(seed, index, "steps") for index in indices]


def image_generators(seed: int, indices: Sequence[int]) -> list[torch.Generator]:
    """Return one generator per image, as diffusers' pipelines take them: `generator=image_generators(seed, range(8))`.

    A pipeline draws from them all that it needs, first noise and steps, so that image i is the same in every batch.
    """
    return [sample_generator(seed, index, "pipeline") for index in indices]
