"""How the denoising loss reacts to cuts in one group at a time, on the same images, noise and timesteps throughout."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dpctl import progress
from dpctl.blocks import block_of, by_block
from dpctl.data import Images
from dpctl.diffusion import denoising_loss, noise_for, sample_generator
from dpctl.errors import DpctlError
from dpctl.prune.criteria import magnitude
from dpctl.prune.groups import ChannelGroup, Groups, find_groups
from dpctl.prune.importance import Scoring
from dpctl.prune.plan import PruningPlan, Span, best, width_at
from dpctl.prune.surgery import kept_indices, slim
from dpctl.recipe import PruneRecipe

FRACTIONS = (0.25, 0.5, 0.75)
# On the reference model three seeds rank the 90 cuts alike (Spearman's 0.93 to 0.98); twice the images: 0.96 to 0.98.
IMAGES, TIMESTEPS = 8, 4


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


def scan(
    unet: Any,
    scheduler: Any,
    images: Images,
    *,
    fractions: Sequence[float] = FRACTIONS,
    align: int = 8,
    count: int = IMAGES,
    timesteps: int = TIMESTEPS,
    seed: int = 0,
    scores: Mapping[str, Sequence[float]] | None = None,
    bar: progress.Bar = progress.no_bar,
) -> dict[str, Any]:
    """Cut every group of `unet` by itself, for real, and return the loss after each cut as plain values.

    Of a group go the channels with the lowest `scores` (default: squared weights), equally many from each norm group
    or head. A fraction that falls on the same width as a smaller one, or takes nothing, has no row. `unet` stays.
    """
    groups = find_groups(unet).prunable
    if scores is None:
        scores = _squared_weights(unet, groups, scheduler)
    probe = open_probe(unet, scheduler, images, count=count, timesteps=timesteps, seed=seed)
    base = probe.loss(unet)
    by_name = {group.name: group for group in groups}
    names = [name for block in by_block(by_name).values() for name in block]
    spans = {group.name: Span(group.name, group.width, group.segments) for group in groups}
    cuts = [(name, width) for name in names for width in _narrower(spans[name], fractions, align)]
    rows = []
    with bar("sensitivity", len(cuts)) as advance:
        for name, width in cuts:
            loss = probe.loss(cut_one(unet, by_name[name], best(spans[name], scores[name], width)))
            rows.append(
                {"group": name, "block": block_of(name), "width": spans[name].width, "kept": width, "loss": loss}
            )
            advance(1, group=name)
    measured_on = {
        "data": images.name,
        "images": len(probe.clean),
        "timesteps": list(probe.timesteps),
        "align": align,
        "seed": seed,
    }
    return {"base_loss": base, "fractions": list(fractions), "measured_on": measured_on, "rows": rows}


def open_probe(unet: Any, scheduler: Any, images: Images, *, count: int, timesteps: int, seed: int) -> Probe:
    """Return the probe of a seed: `count` images, and timesteps in the middle of equal parts of the schedule."""
    order = torch.randperm(len(images), generator=sample_generator(seed, 0, "sensitivity-images"))[:count].tolist()
    device = next(unet.parameters()).device
    clean = images.batch(order).to(device)
    noise = noise_for(seed, order, clean.shape[1:], "sensitivity-noise").to(device)
    total = int(scheduler.config.num_train_timesteps)
    parts = min(timesteps, total)
    return Probe(scheduler, clean, noise, tuple((2 * part + 1) * total // (2 * parts) for part in range(parts)))


def cut_one(unet: Any, group: ChannelGroup, keep: Sequence[int]) -> Any:
    """Return `unet` with only the channels `keep` of one group, and every other group whole."""
    alone = Groups((group,), {})
    return slim(unet, kept_indices(unet, alone, PruningPlan({group.name: tuple(keep)})))


def _narrower(span: Span, fractions: Sequence[float], align: int) -> list[int]:
    """Return the widths that the fractions leave, the widest first, each once, without the full one."""
    return sorted({width_at(span, fraction, align) for fraction in fractions} - {span.width}, reverse=True)


def _squared_weights(unet: Any, groups: Sequence[ChannelGroup], scheduler: Any) -> dict[str, list[float]]:
    scores = magnitude.score(Scoring(unet, tuple(groups), scheduler, None, PruneRecipe()))
    return {name: values.tolist() for name, values in scores.items()}
