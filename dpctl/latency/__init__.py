"""Pruning to a latency: how wide may the network be to take half the time on this machine?

Without a latency model widths are planned by a share of the MACs, which is corrected by what the candidates take: each
is cut, exported and timed against the unpruned network, turn by turn. With one they are planned by the predicted
latency, and what is corrected is the prediction.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from dpctl import artifact, progress
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError
from dpctl.latency.build import Exports
from dpctl.latency.clock import Clock
from dpctl.latency.goal import Goal
from dpctl.latency.goal import check as check_goal
from dpctl.latency.predicted import Prediction, correct, open_prediction
from dpctl.latency.search import Build, Planner, choose, search
from dpctl.models import load_model
from dpctl.prune import Scored
from dpctl.recipe import LatencyRecipe, PruneRecipe, to_dict


def prune_to_latency(
    model: str, out: Path, recipe: PruneRecipe, *, force: bool = False, bar: progress.Bar = progress.no_bar
) -> Manifest:
    """Prune a model until its exported network takes what `recipe.latency` says, and write the slim model.

    Raises a DpctlError for what cannot be pruned, exported or measured, and for a target below the floor; nothing is
    written then.
    """
    from dpctl import prune as pruning

    wanted = recipe.latency
    assert wanted is not None
    pruning.check(recipe)
    goal = check_goal(wanted)
    artifact.refuse_existing(out, force=force)
    source = load_model(model)
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(source, recipe, Path(folder))
        prediction = open_prediction(wanted, source, exports)  # a wrong file is told before anything is scored
        scored = pruning.score(source, recipe, bar=bar)
        share, builds = _builds(goal, scored, recipe, exports, prediction, bar)
    chosen = choose(builds, share)
    pruned = pruning.cut(scored, chosen.candidate.plan, chosen.candidate.stock, recipe, refit=scored.refits, bar=bar)
    stats = _stats(pruned.stats, wanted, exports, share, builds, chosen)
    return pruning.write(out, source, dataclasses.replace(pruned, stats=stats), recipe, force=force)


def _builds(
    goal: Goal, scored: Scored, recipe: PruneRecipe, exports: Exports, prediction: Prediction | None, bar: progress.Bar
) -> tuple[float, list[Build]]:
    """Return the share that is asked for, and the candidates for it. Only where a file was made is it corrected."""
    assert recipe.latency is not None
    if prediction is not None and not prediction.is_from_here:
        share = goal.of(prediction.baseline_s)
        _require_smaller(share, recipe.latency)
        return share, [prediction.foretell(scored, recipe, share)]
    with Clock(exports.baseline(), recipe.latency, exports.rows, exports.threads) as clock:
        share = goal.of(clock.baseline_s())
        _require_smaller(share, recipe.latency)
        if prediction is None:
            return share, search(Planner(scored, recipe), exports, clock, share, bar)
        return share, correct(prediction, scored, recipe, exports, clock, share, bar)


def _require_smaller(share: float, wanted: LatencyRecipe) -> None:
    if share >= 1.0:
        got = f"{wanted.target} is {share:.3f} of what it takes now"
        raise DpctlError("the model meets the target already", got, "ask for less than that")


def _stats(
    stats: dict[str, Any], wanted: LatencyRecipe, exports: Exports, share: float, builds: list[Build], chosen: Build
) -> dict[str, Any]:
    """Return a cut's stats with what was asked of its latency, and what every candidate took."""
    told = {
        "asked": {**to_dict(wanted), "share": share, "rows": exports.rows, "size": list(exports.size)},
        "chosen": builds.index(chosen),
        "builds": [build.to_json() for build in builds],
    }
    name = "latency" if chosen.timed is not None else "predicted_latency"
    return stats | {
        "requested": {"target_latency": share},
        "achieved": stats["achieved"] | {name: chosen.share},
        "latency": told,
    }
