"""Noise, timesteps, target and denoising loss: shared by scoring, training and sampling.

Letters are the paper's (DDPM, arXiv 2006.11239): x_0 the clean image, t the timestep, x_t the noisy one.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpctl.errors import DpctlError
from dpctl.signature import unet_arguments


def sample_generator(seed: int, index: int, stream: str = "sample") -> torch.Generator:
    """Return the CPU generator that belongs to sample `index` of `seed`.

    A sample's randomness is a function of (seed, stream, index) alone: never of the batch size, the
    process count or what was drawn before. `stream` keeps training, scoring and sampling apart.
    """
    mixed = hashlib.blake2b(f"{stream}/{seed}/{index}".encode(), digest_size=8).digest()
    # The Mersenne Twister behind torch's CPU generator takes 32 bits of seed.
    return torch.Generator().manual_seed(int.from_bytes(mixed[:4], "little"))


def noise_for(seed: int, indices: Sequence[int], shape: Sequence[int], stream: str = "sample") -> Tensor:
    """Return standard normal noise [B, *shape] whose row i depends on (seed, indices[i]) only."""
    return torch.stack([torch.randn(tuple(shape), generator=sample_generator(seed, i, stream)) for i in indices])


def trained_schedule(scheduler: Any) -> Any:
    """Return what adds noise as in training: x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (DDPM equation 4).

    A pipeline carries the sampler that it is to be drawn with, and those of the Euler kind scale x_t otherwise (they
    scale it back before the network sees it). Others than those with DDPM's betas are returned as they are.
    """
    import diffusers

    known = {"beta_schedule", "prediction_type"} <= set(scheduler.config)
    if not known or isinstance(scheduler, diffusers.DDPMScheduler):
        return scheduler
    return diffusers.DDPMScheduler.from_config(scheduler.config)


def predicted_target(scheduler: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
    """Return what the network has to predict, as the scheduler's `prediction_type` says. [B, C, H, W]"""
    kind = scheduler.config.get("prediction_type")
    if kind == "epsilon":
        return noise
    if kind == "sample":
        return clean
    if kind == "v_prediction":
        return scheduler.get_velocity(clean, noise, timesteps)
    raise DpctlError(
        "unknown prediction type",
        f"{kind!r} in the scheduler's config",
        "use a scheduler with prediction_type epsilon, sample or v_prediction",
    )


def first_timestep(unet: Any) -> int:
    """Return the first timestep that a network can take: a Fourier embedding takes its logarithm."""
    return 1 if unet.config.get("time_embedding_type") == "fourier" else 0


def denoising_loss(
    unet: Any,
    scheduler: Any,
    clean: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    conditions: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the mean squared denoising error of each sample, [B] (DDPM equation 14)."""
    predicted = predict(unet, scheduler.add_noise(clean, noise, timesteps), timesteps, conditions)
    target = predicted_target(scheduler, clean, noise, timesteps)
    return (predicted - target).square().flatten(1).mean(1)


def predict(unet: Any, noisy: Tensor, timesteps: Tensor, conditions: Mapping[str, Tensor] | None = None) -> Tensor:
    """Return a network's output [B, C, H, W], float32, under its conditions by their names in the signature."""
    output: Tensor = unet(noisy, timesteps, **unet_arguments(conditions or {})).sample
    return output.float()
