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
from dpctl.errors import MetAlready
from dpctl.latency.build import Exports
from dpctl.latency.clock import Clock
from dpctl.latency.document import Profile, read_profile
from dpctl.latency.goal import Goal, require_backend
from dpctl.latency.goal import check as check_goal
from dpctl.latency.predicted import Prediction, correct, open_prediction
from dpctl.latency.search import Build, Planner, choose, met_already, search
from dpctl.latency.widths import check as check_planned
from dpctl.models import Model, load_model
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

    pruning.check(recipe)
    wanted, goal = recipe.latency, check(recipe)
    assert wanted is not None
    artifact.refuse_existing(out, force=force)
    found = _require_here(wanted)
    source = load_model(model)
    with tempfile.TemporaryDirectory() as folder:
        # A wrong file is told before anything is scored.
        exports, prediction = _opened(source, recipe, found, Path(folder))
        scored = pruning.score(source, recipe, bar=bar)
        share, builds = _builds(goal, scored, recipe, exports, prediction, bar)
    chosen = choose(builds, share)
    pruned = pruning.cut(scored, chosen.candidate.plan, chosen.candidate.stock, recipe, refit=scored.refits, bar=bar)
    if not pruned.kept:
        raise met_already(share, chosen.share)
    stats = _stats(pruned.stats, wanted, exports, found, share, builds, chosen)
    pruned, more = dataclasses.replace(pruned, stats=stats), pruning.scanned(source, recipe, bar)
    return pruning.write(out, source, pruned, recipe, force=force, **more)


def check(recipe: PruneRecipe) -> Goal:
    """Return the goal of a recipe's latency. Raises a DpctlError for what no model could be cut by."""
    assert recipe.latency is not None
    goal = check_goal(recipe.latency)
    if recipe.latency.model is not None:
        check_planned(recipe)
        read_profile(Path(recipe.latency.model))
    return goal


def rehearse(model: str, recipe: PruneRecipe) -> None:
    """Raise what a model and a recipe would be refused for before anything is scored or timed."""
    check(recipe)
    assert recipe.latency is not None
    found = _require_here(recipe.latency)
    with tempfile.TemporaryDirectory() as folder:
        _opened(load_model(model), recipe, found, Path(folder))


def _require_here(wanted: LatencyRecipe) -> Profile | None:
    """Return the latency file of a recipe, if any. Raises a DpctlError where what is to be measured cannot run here."""
    found = read_profile(Path(wanted.model)) if wanted.model is not None else None
    if found is None or found.is_from_here:
        require_backend(wanted)
    if found is not None and (told := found.elsewhere()):
        what = "predictions may be off" if found.is_from_here else "latencies are predicted, and not measured here"
        progress.say(f"{wanted.model} was made elsewhere ({told}): {what}")
    return found


def _opened(
    source: Model, recipe: PruneRecipe, found: Profile | None, folder: Path
) -> tuple[Exports, Prediction | None]:
    """Return what exports candidates and, where there is a latency file, what that predicts of the model."""
    wanted = recipe.latency
    assert wanted is not None
    if found is None:
        return Exports(source, recipe, folder), None
    if wanted.threads is None:  # as many as the file is of
        wanted = dataclasses.replace(wanted, threads=found.conditions["threads"])
    exports = Exports(source, dataclasses.replace(recipe, latency=wanted), folder)
    return exports, open_prediction(found, wanted, source, exports)


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
        got = f"{wanted.target} is {share:.3f} of what the unpruned model takes"
        raise MetAlready("the model meets the target already", got, "ask for less than that")


def _stats(
    stats: dict[str, Any],
    wanted: LatencyRecipe,
    exports: Exports,
    profile: Profile | None,
    share: float,
    builds: list[Build],
    chosen: Build,
) -> dict[str, Any]:
    """Return a cut's stats with what was asked of its latency, and what every candidate took."""
    where = {"threads": exports.threads, "rows": exports.rows, "size": list(exports.size)}
    told: dict[str, Any] = {
        "asked": {**to_dict(wanted), "share": share, **where},
        "chosen": builds.index(chosen),
        "builds": [build.to_json() for build in builds],
    }
    if profile is not None:
        told["profile"] = {"digest": profile.digest, "elsewhere": profile.elsewhere()}
    name = "latency" if chosen.timed is not None else "predicted_latency"
    return stats | {
        "requested": {"target_latency": share},
        "achieved": stats["achieved"] | {name: chosen.share},
        "latency": told,
    }


def profile_digest(wanted: LatencyRecipe) -> str | None:
    """Return the digest of the latency file that a recipe plans by; None without one."""
    return read_profile(Path(wanted.model)).digest if wanted.model is not None else None


def planned_by(manifest: Manifest) -> str | None:
    """Return the digest of the latency file that a cut was planned by; None without one."""
    digest = manifest.stats.get("latency", {}).get("profile", {}).get("digest")
    return str(digest) if digest is not None else None
