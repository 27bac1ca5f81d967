"""Pruning to a latency: how wide may the network be to take half the time on this machine?

Widths are planned by a share of the MACs that is bisected on what the networks really take: every candidate is cut,
exported and timed against the unpruned network, turn by turn.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpctl import artifact, progress
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError
from dpctl.latency.build import Candidate, Exports
from dpctl.latency.clock import Clock, Timed
from dpctl.latency.goal import check as check_goal
from dpctl.models import load_model
from dpctl.recipe import LatencyRecipe, PruneRecipe, to_dict
from dpctl.units import percent

BUILDS = 8
# A candidate this close to the target ends the search; the result may be this far above it.
CLOSE, ALLOWED = 0.02, 0.05
# Of the unpruned network's latency that no narrower network is spared, before anything is known of it; and how much
# further than the candidates say the next one goes while all are too slow.
CONSTANT = 0.2
BEYOND = 1.05
# How many widths between two candidates are looked at for some that were not built.
STAIRS = 8


@dataclass(frozen=True)
class Build:
    """A candidate and what it took."""

    candidate: Candidate
    timed: Timed

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, without the widths."""
        return {"macs": self.candidate.macs, **self.timed.to_json()}


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
    scored = pruning.score(source, recipe, bar=bar)
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(source, scored, recipe, Path(folder))
        with Clock(exports.baseline(), wanted, exports.rows, exports.threads) as clock:
            share = goal.of(clock.baseline_s())
            _require_smaller(share, wanted)
            builds = search(exports, clock, share, bar)
    chosen = choose(builds, share)
    plan, stock = chosen.candidate.plan, chosen.candidate.stock
    pruned = pruning.cut(scored, plan, stock, recipe, refit=scored.refits, bar=bar)
    stats = _stats(pruned.stats, wanted, exports, share, builds, chosen)
    return pruning.write(out, source, dataclasses.replace(pruned, stats=stats), recipe, force=force)


def _require_smaller(share: float, wanted: LatencyRecipe) -> None:
    if share >= 1.0:
        got = f"{wanted.target} is {share:.3f} of what it takes now"
        raise DpctlError("the model meets the target already", got, "ask for less than that")


def search(exports: Exports, clock: Clock, share: float, bar: progress.Bar) -> list[Build]:
    """Build and time candidates until one is close to the target, or no other widths lie between; BUILDS at most."""
    builds: list[Build] = []
    with bar("latency", BUILDS) as advance:
        while len(builds) < BUILDS:
            candidate = _unseen(exports, builds, propose(builds, share))
            if candidate is None:
                break
            builds.append(Build(candidate, clock.time(exports.build(candidate))))
            found = builds[-1].timed.ratio
            progress.say(
                f"build {len(builds)}: {percent(candidate.macs)} of the MACs take {found.value:.3f} "
                f"[{found.low:.3f}, {found.high:.3f}] of the latency; asked {share:.3f}"
            )
            advance(1)
            if abs(found.value / share - 1.0) <= CLOSE:
                break
    return builds


def _unseen(exports: Exports, builds: list[Build], asked: float) -> Candidate | None:
    """Return the candidate nearest above a share of the MACs that was not built yet; None where there is none.

    Widths are a staircase: the step below what is asked for may have been built, and the one above it not.
    """
    seen = [each.candidate.widths for each in builds]
    wide = min((each.candidate.macs for each in builds if each.candidate.macs > asked), default=1.0)
    for part in range(STAIRS):
        candidate = exports.cut(asked + (wide - asked) * part / STAIRS)
        if candidate is None or candidate.macs >= wide:
            return None
        if candidate.widths not in seen:
            return candidate
    return None


def propose(builds: list[Build], share: float) -> float:
    """Return the share of the MACs to try next: by a straight line through two candidates next to the target."""
    points = sorted((build.timed.ratio.value, build.candidate.macs) for build in builds)
    above = [*(point for point in points if point[0] >= share), (1.0, 1.0)]
    below = [point for point in points if point[0] < share]
    high, wide = above[0]
    if below:
        low, narrow = below[-1]
    elif builds and above[1] > above[0]:
        # All are above: what the last two tell goes on below them, and a little further, so that the next is not.
        low, narrow = above[1]
        return max(0.0, wide - BEYOND * (wide - narrow) * (high - share) / (high - low))
    else:
        low, narrow = min(CONSTANT, share / 2), 0.0
    return narrow + (wide - narrow) * (share - low) / (high - low)


def choose(builds: list[Build], share: float) -> Build:
    """Return the candidate nearest to the target; a DpctlError with the floor where none is fast enough."""
    fast = [build for build in builds if build.timed.ratio.value <= (1.0 + ALLOWED) * share]
    if not fast:
        floor = min(build.timed.ratio.value for build in builds) if builds else 1.0
        raise DpctlError(
            "the latency target cannot be reached",
            f"{share:.3f} of the unpruned model's latency; the narrowest that was tried takes {floor:.3f}",
            f"ask for {floor:.3f} or more, lower --align, or free groups that --keep and --only hold",
        )
    return min(fast, key=lambda build: abs(build.timed.ratio.value - share))


def _stats(
    stats: dict[str, Any], wanted: LatencyRecipe, exports: Exports, share: float, builds: list[Build], chosen: Build
) -> dict[str, Any]:
    """Return a cut's stats with what was asked of its latency, and what every candidate took."""
    measured = chosen.timed.to_json()
    told = {
        "asked": {**to_dict(wanted), "share": share, "rows": exports.rows, "size": list(exports.size)},
        "measured": measured,
        "builds": [build.to_json() for build in builds],
    }
    return stats | {
        "requested": {"target_latency": share},
        "achieved": stats["achieved"] | {"latency": measured["ratio"]},
        "latency": told,
    }
