"""The training loss: the denoising error, and the errors to what the unpruned teacher gives at the same samples."""

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpctl.data import Batch
from dpctl.diffusion import predict, predicted_target, trained_schedule
from dpctl.errors import DpctlError
from dpctl.finetune.features import Features, match, read_kept
from dpctl.models import Model
from dpctl.recipe import FinetuneRecipe

DENOISING, DISTILLATION, FEATURES = "denoising", "distillation", "features"


@dataclass(frozen=True)
class Objective:
    """denoising * E w_t |eps - eps_slim|^2 + distillation * E |eps_teacher - eps_slim|^2 + features, at one x_t each.

    Output distillation as in Hinton et al. (2015) with the network's output in the place of logits: the teacher's
    output is the conditional mean that the noise only samples, so its gradient has less variance. For the third term
    see `dpctl.finetune.features`; eps stands for whatever the network predicts. Of the denoising error alone,
    `min_snr_gamma` weights the timesteps. A term of weight 0 costs nothing.
    """

    scheduler: Any
    teacher: Any = None
    denoising: float = 1.0
    distillation: float = 0.0
    feature_distillation: float = 0.0
    features: Features | None = None
    min_snr_gamma: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scheduler", trained_schedule(self.scheduler))
        if self.min_snr_gamma is not None:
            _require_snr(self.scheduler)
        if self.teacher is None and (self.distillation or self.feature_distillation):
            raise ValueError("distillation without a teacher")
        if self.features is None and self.feature_distillation:
            raise ValueError("feature distillation without features")

    @property
    def weights(self) -> dict[str, float]:
        """Return the terms that count, and their weights."""
        named = {DENOISING: self.denoising, DISTILLATION: self.distillation, FEATURES: self.feature_distillation}
        return {name: weight for name, weight in named.items() if weight != 0.0}

    def __call__(self, unet: Any, batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the loss of each sample of a batch, [B]: noise [B, C, H, W], timesteps [B]."""
        return self.total(self.terms(unet, batch, noise, timesteps))

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of `terms`, [B]."""
        loss: Tensor = sum(weight * terms[name] for name, weight in self.weights.items())  # type: ignore[assignment]
        return loss

    def terms(self, unet: Any, batch: Batch, noise: Tensor, timesteps: Tensor) -> dict[str, Tensor]:
        """Return each term that counts, before its weight, for each sample of a batch: name -> [B]."""
        noisy = self.scheduler.add_noise(batch.clean, noise, timesteps)
        with self._watching(unet) as features:
            output = predict(unet, noisy, timesteps, batch.conditions)
        terms = {}
        if self.denoising:
            target = predicted_target(self.scheduler, batch.clean, noise, timesteps)
            terms[DENOISING] = self._timestep_weights(timesteps) * _mean_square(output - target)
        if not (self.distillation or self.feature_distillation):
            return terms
        with torch.no_grad(), self._watching(self.teacher) as taught_features:
            taught = predict(self.teacher, noisy, timesteps, batch.conditions)
        if self.distillation:
            terms[DISTILLATION] = _mean_square(output - taught)
        if self.feature_distillation and self.features is not None:
            # The zero is for processes that wait for one another: the output layer gets a gradient, whatever the terms.
            terms[FEATURES] = self.features.error(features, taught_features) + 0.0 * output.flatten(1).mean(1)
        return terms

    def _watching(self, network: Any) -> Any:
        wanted = self.features if self.feature_distillation else None
        return wanted.watching(network) if wanted is not None else nullcontext({})

    def _timestep_weights(self, timesteps: Tensor) -> Tensor | float:
        return 1.0 if self.min_snr_gamma is None else min_snr(self.scheduler, timesteps, self.min_snr_gamma)


def open_objective(source: Model, unet: Any, teacher: Model | None, recipe: FinetuneRecipe) -> Objective:
    """Return the loss of a recipe for `unet`, of the architecture of `source`; a DpctlError as `match` raises it."""
    if teacher is None:
        return Objective(source.scheduler, denoising=recipe.denoising, min_snr_gamma=recipe.min_snr_gamma)
    features = None
    if recipe.feature_distillation:
        features = match(unet, teacher.unet, read_kept(source.directory), read_kept(teacher.directory))
    weights = (recipe.denoising, recipe.distillation, recipe.feature_distillation)
    return Objective(source.scheduler, teacher.unet, *weights, features, recipe.min_snr_gamma)


def min_snr(scheduler: Any, timesteps: Tensor, gamma: float) -> Tensor:
    """Return the min-SNR weight of the denoising error at each timestep, [B].

    Hang et al. (arXiv 2303.09556), section 3.4: the error in x_0 weighs min(SNR, gamma), which for the same error in
    eps is divided by SNR, for that in v by SNR + 1. With SNR = abar / (1 - abar) they are written here so that a
    schedule may begin or end in SNR = infinity or 0.
    """
    kept = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()  # abar_t: what is left of the image
    lost = 1.0 - kept
    kind = scheduler.config.prediction_type
    if kind == "epsilon":
        return (gamma * lost / kept).clamp(max=1.0)
    if kind == "v_prediction":
        return torch.minimum(kept, gamma * lost)
    return (kept / lost).clamp(max=gamma)


def _mean_square(error: Tensor) -> Tensor:
    return error.square().flatten(1).mean(1)


def _require_snr(scheduler: Any) -> None:
    if not hasattr(scheduler, "alphas_cumprod"):
        raise DpctlError(
            "the signal-to-noise ratio of this schedule is not known",
            type(scheduler).__name__,
            "train without --min-snr-gamma, or use a scheduler of the DDPM family",
        )
