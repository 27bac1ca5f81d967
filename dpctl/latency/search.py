"""Widths that meet a latency: planned by a share of the MACs, which is corrected by what candidates take."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dpctl import progress
from dpctl.errors import MetAlready, OutOfReach
from dpctl.latency.build import Candidate, Exports
from dpctl.latency.clock import Clock, Timed
from dpctl.prune import Scored
from dpctl.prune.plan import select
from dpctl.prune.unpruned import unpruned_costs
from dpctl.recipe import PruneRecipe
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
# How often a target below the floor is halved back towards the whole network.
REFINEMENTS = 12


@dataclass(frozen=True)
class Build:
    """A candidate, what it took, and what a latency model said of it, as a share of the unpruned network's latency.

    One of a model that was made elsewhere is not timed.
    """

    candidate: Candidate
    timed: Timed | None
    predicted: float | None = None

    @property
    def share(self) -> float:
        """The share of the unpruned network's latency: measured, or where it was not timed, predicted."""
        found = self.predicted if self.timed is None else self.timed.ratio.value
        assert found is not None
        return found

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values, without the widths."""
        predicted = {} if self.predicted is None else {"predicted": self.predicted}
        return {"macs": self.candidate.macs, **predicted, **(self.timed.to_json() if self.timed is not None else {})}


class Planner:
    """Plans cuts of a scored model to shares of the unpruned MACs; `whole` is the model as it is."""

    def __init__(self, scored: Scored, recipe: PruneRecipe) -> None:
        self._scored, self._recipe = scored, recipe
        self._unpruned_macs = unpruned_costs(scored.source)["macs"]
        self.whole = as_it_is(scored)

    def cut(self, macs: float) -> Candidate | None:
        """Plan a cut to a share of the MACs, or to the least that any widths come to; None where nothing can go."""
        found = self._planned(macs)
        low, high = macs, self.whole.macs
        for _ in range(REFINEMENTS if found is None else 0):
            middle = (low + high) / 2
            more = self._planned(middle)
            low, high = (middle, high) if more is None else (low, middle)
            found = more or found
        return found

    def _planned(self, macs: float) -> Candidate | None:
        try:
            plan, stock = self._scored.plan(dataclasses.replace(self._recipe, latency=None, target_macs=macs))
        except (OutOfReach, MetAlready):  # below the floor; of as many MACs as there are
            return None
        return Candidate(plan, stock, self._scored.network.cost("macs", plan.widths()) / self._unpruned_macs)


def as_it_is(scored: Scored) -> Candidate:
    """Return the model with nothing cut: of one that was pruned before less than all of the unpruned MACs."""
    full = scored.network.full()
    macs = scored.network.cost("macs", full) / unpruned_costs(scored.source)["macs"]
    return Candidate(select(scored.network, scored.scores, full), None, macs)


def search(planner: Planner, exports: Exports, clock: Clock, share: float, bar: progress.Bar) -> list[Build]:
    """Build and time candidates until one is close to the target, or no other widths lie between; BUILDS at most.

    A model that was pruned before is timed first, as it is. Raises a DpctlError where that meets the target.
    """
    builds: list[Build] = []
    whole = (1.0, 1.0)
    if planner.whole.macs < 1.0:
        took = timed(planner.whole, exports, clock)
        tell(0, took, share)
        if took.share <= share:
            raise met_already(share, took.share)
        whole = (took.share, planner.whole.macs)
    with bar("latency", BUILDS) as advance:
        while len(builds) < BUILDS:
            candidate = _unseen(planner, builds, propose(builds, share, whole))
            if candidate is None:
                break
            builds.append(timed(candidate, exports, clock))
            tell(len(builds), builds[-1], share)
            advance(1)
            if abs(builds[-1].share / share - 1.0) <= CLOSE:
                break
    return builds


def timed(candidate: Candidate, exports: Exports, clock: Clock, predicted: float | None = None) -> Build:
    """Export a candidate and time it."""
    return Build(candidate, clock.time(exports.of_widths(candidate.widths, candidate.stock)), predicted)


def tell(number: int, build: Build, share: float) -> None:
    """Say what a candidate took; number 0 is the model as it is."""
    assert build.timed is not None
    found, which = build.timed.ratio, f"build {number}" if number else "as it is"
    before = f" (predicted {build.predicted:.3f})" if build.predicted is not None else ""
    progress.say(
        f"{which}: {percent(build.candidate.macs)} of the MACs take {found.value:.3f} "
        f"[{found.low:.3f}, {found.high:.3f}] of the latency{before}; asked {share:.3f}"
    )


def _unseen(planner: Planner, builds: list[Build], asked: float) -> Candidate | None:
    """Return the candidate nearest above a share of the MACs that was not built yet; None where there is none.

    Widths are a staircase: the step below what is asked for may have been built, and the one above it not.
    """
    seen = [each.candidate.widths for each in builds]
    wide = min((each.candidate.macs for each in builds if each.candidate.macs > asked), default=planner.whole.macs)
    for part in range(STAIRS):
        candidate = planner.cut(asked + (wide - asked) * part / STAIRS)
        if candidate is None or candidate.macs >= wide:
            return None
        if candidate.widths not in seen:
            return candidate
    return None


def met_already(asked: float, share: float) -> MetAlready:
    """Return the error for a model that takes no more than what is asked for."""
    got = f"{asked:.3f} of the unpruned model's latency is asked for, and it takes {share:.3f}"
    return MetAlready("the model meets the target already", got, "ask for less than that")


def propose(builds: list[Build], share: float, whole: tuple[float, float] = (1.0, 1.0)) -> float:
    """Return the share of the MACs to try next: by a straight line through two candidates next to the target.

    `whole` is what the model takes as it is, and its MACs, both shares of the unpruned one's.
    """
    points = sorted((build.share, build.candidate.macs) for build in builds)
    above = [*(point for point in points if point[0] >= share), whole]
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
    """Return the candidate nearest to the target; OutOfReach with the floor where none is fast enough."""
    fast = [build for build in builds if build.share <= (1.0 + ALLOWED) * share]
    if not builds:
        got = f"{share:.3f} of the unpruned model's latency; at this alignment nothing can go"
        raise OutOfReach("the latency target cannot be reached", got, "lower --align", 1.0)
    if not fast:
        floor = min(build.share for build in builds)
        stock = any(build.candidate.stock for build in builds)
        more = "use --layout free" if stock else "free groups that --keep and --only hold"
        raise OutOfReach(
            "the latency target cannot be reached",
            f"{share:.3f} of the unpruned model's latency; the narrowest that was tried takes {floor:.3f}",
            f"ask for {floor:.3f} or more, lower --align, or {more}",
            floor,
        )
    return min(fast, key=lambda build: abs(build.share - share))
