"""The widths that keep the most importance within a predicted latency."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpctl.errors import DpctlError, OutOfReach
from dpctl.latency.model import LatencyModel
from dpctl.prune import Scored
from dpctl.prune.allocation import Choice, allocate
from dpctl.prune.plan import Network, PruningPlan, Span, check_finite, in_one_unit, narrowest, select
from dpctl.prune.target import plan_levels
from dpctl.recipe import PruneRecipe
from dpctl.units import seconds


def plan_within(
    scored: Scored, recipe: PruneRecipe, model: LatencyModel, share: float, baseline_s: float
) -> tuple[PruningPlan, dict[str, Any] | None]:
    """Return the plan with the most importance whose predicted latency is at most a share of the unpruned network's.

    In the layout `stock` with the result's config. Raises OutOfReach, with the floor in seconds, for a share below it.
    """
    check_finite(scored.network, scored.scores)
    budget_s = share * baseline_s
    if scored.levels is not None:
        return plan_levels(
            scored.source,
            scored.network,
            scored.scores,
            scored.levels,
            recipe.align,
            model.predict,
            budget_s,
            lambda floor, _: (
                f"{share:.3f} ({seconds(budget_s)}) of the unpruned model's latency; the predicted floor",
                _floor(floor, baseline_s),
            ),
        )
    scores = scored.scores if scored.comparable else in_one_unit(scored.scores)
    choices = [_choice(span, scored.network, scores, recipe) for span in scored.network.spans]
    try:
        widths = allocate(choices, model.terms, budget_s - model.constant_s)
    except OutOfReach as problem:
        floor = problem.floor + model.constant_s
        told = f"{share:.3f} ({seconds(budget_s)}) of the unpruned model's latency; the predicted floor with align"
        raise OutOfReach(
            "the latency target cannot be reached",
            f"{told} {recipe.align} is {_floor(floor, baseline_s)}",
            "ask for the floor or more, lower --align or --floor, or free groups that --keep and --only hold",
            floor,
        ) from None
    return select(scored.network, scored.scores, widths), None


def check(recipe: PruneRecipe) -> None:
    """Raise a DpctlError for a recipe that cannot be planned by a latency model."""
    if recipe.scope == "local":
        todo = "leave --scope or --latency-model out"
        raise DpctlError("a latency model ranks all groups together", "--scope local", todo)


def _floor(latency_s: float, baseline_s: float) -> str:
    # Upwards: who asks for the floor that is told gets it.
    return f"{math.ceil(1000 * latency_s / baseline_s) / 1000:.3f} ({seconds(latency_s)})"


def _choice(span: Span, network: Network, scores: Mapping[str, Sequence[float]], recipe: PruneRecipe) -> Choice:
    """Return what a group may be: no narrower than the recipe's floor, with the importance that each width keeps."""
    least = narrowest(span, recipe.floor, recipe.align)
    widths = tuple(width for width in span.widths(recipe.align) if width >= least)
    kept = importances(span, scores[span.name])
    kept[0] = -network.inner_importance(span.name, scores) - span.removal
    return Choice(span.name, widths, tuple(float(kept[width // (span.segments * span.block)]) for width in widths))


def importances(span: Span, values: Sequence[float]) -> np.ndarray:
    """Return the importance that a group keeps with the best 0, 1, 2, ... blocks of channels of each of its parts."""
    blocks = np.asarray(values, dtype=float).reshape(span.segments, -1, span.block).sum(2)
    best = -np.sort(-blocks, axis=1)
    return np.concatenate([[0.0], np.cumsum(best.sum(0))])
