"""Values on weights -> scores of channels: the reduction over every layer that is coupled in a group."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpctl import progress
from dpctl.data import TrainingSet
from dpctl.errors import DpctlError
from dpctl.prune import gradients
from dpctl.prune.groups import OUT, ChannelGroup, Member
from dpctl.recipe import PruneRecipe

# The part of the schedule that the weighting `early` looks at: the steps that paint the detail.
EARLY = 0.3
Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Scoring:
    """What a criterion may look at. `images` is None for criteria that need no data."""

    unet: Any
    groups: tuple[ChannelGroup, ...]
    scheduler: Any
    images: TrainingSet | None
    recipe: PruneRecipe
    bar: progress.Bar = progress.no_bar


def slices(module: nn.Module, side: str) -> list[tuple[str, int]]:
    """Return (parameter, dimension) for each parameter of `module` that has the channels of that side."""
    if isinstance(module, nn.Embedding):
        return [("weight", 1)]
    if side == OUT:
        return [(name, 0) for name in ("weight", "bias") if getattr(module, name, None) is not None]
    return [("weight", 1)]


def reduce_over(unet: Any, group: ChannelGroup, values: Mapping[str, Tensor], reduction: str) -> Tensor:
    """Return the score of each channel of a group, [width].

    `values` has one number per weight (parameter name -> tensor of its shape). ``"sum-abs"`` is the sum of |value|
    over a channel's weights, ``"abs-sum"`` the absolute value of their sum, layer by layer; layers are added.
    """
    scores = torch.zeros(group.width, dtype=torch.float64)
    for member in group.members:
        scores.index_add_(0, torch.tensor(member.channel), _member_scores(unet, member, values, reduction))
    return scores


def _member_scores(unet: Any, member: Member, values: Mapping[str, Tensor], reduction: str) -> Tensor:
    """Return one value per entry of `member.index`."""
    whole = torch.zeros(len(member.index), dtype=torch.float64)
    for parameter, dimension in slices(unet.get_submodule(member.module), member.side):
        value = values.get(f"{member.module}.{parameter}")
        if value is None:
            continue
        picked = value.double().cpu().index_select(dimension, torch.tensor(member.index)).movedim(dimension, 0)
        picked = picked.reshape(len(member.index), -1)
        whole += picked.abs().sum(1) if reduction == "sum-abs" else picked.sum(1)
    return whole if reduction == "sum-abs" else whole.abs()


def first_order(scoring: Scoring, weighting: str) -> Scores:
    """Return the first-order Taylor importance |w * dL/dw| of each group's channels, a mean over gradients.

    `weighting` is the criterion's own, which the recipe may replace.
    """
    if scoring.recipe.reduction == "abs-sum":
        return _over_gradients(scoring, weighting, torch.abs)
    weights = dict(scoring.unet.named_parameters())
    totals: dict[str, Tensor] = {}

    def add() -> None:
        for name, weight in weights.items():
            if weight.grad is not None:
                totals[name] = totals[name] + weight.grad.abs() if name in totals else weight.grad.abs()

    _gradients(scoring, weighting, add)
    products = {name: weights[name].detach() * total for name, total in totals.items()}
    return {g.name: reduce_over(scoring.unet, g, products, "sum-abs") for g in scoring.groups}


def second_order(scoring: Scoring, weighting: str) -> Scores:
    """Return the sum over gradients of (sum of w * dL/dw)^2, layer by layer of each group's channels.

    That is the empirical Fisher information of a mask over the channel, the curvature of the loss where it is small.
    """
    return _over_gradients(scoring, weighting, torch.square)


def _over_gradients(scoring: Scoring, weighting: str, of: Callable[[Tensor], Tensor]) -> Scores:
    """Return the sum over gradients and over a group's layers of `of`(sum of w * dL/dw over a channel's weights)."""
    weights = dict(scoring.unet.named_parameters())
    scores = {group.name: torch.zeros(group.width, dtype=torch.float64) for group in scoring.groups}

    def add() -> None:
        products = {name: w.detach() * w.grad for name, w in weights.items() if w.grad is not None}
        for group in scoring.groups:
            for member in group.members:
                found = of(_member_scores(scoring.unet, member, products, "abs-sum"))
                scores[group.name].index_add_(0, torch.tensor(member.channel), found)

    _gradients(scoring, weighting, add)
    return scores


def _gradients(scoring: Scoring, weighting: str, each: Callable[[], None]) -> gradients.Active:
    recipe = scoring.recipe
    if scoring.images is None:
        raise DpctlError("the criterion needs data", recipe.criterion, "give --data, or use magnitude or random")
    name = weighting if recipe.weighting == "auto" else recipe.weighting
    chosen = gradients.Weighting(
        threshold=recipe.threshold if name == "threshold" else 0.0, early=EARLY if name == "early" else 1.0
    )
    draws = gradients.Draws(
        recipe.images, recipe.batch_size, recipe.accumulation, recipe.timesteps, chosen, recipe.seed
    )
    with scoring.bar("score", draws.work(scoring.scheduler)) as advance:
        return gradients.each_gradient(scoring.unet, scoring.scheduler, scoring.images, draws, each, advance)
