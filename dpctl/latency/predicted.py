"""Widths that meet a latency: planned by a latency model, whose predictions are corrected by what candidates take."""

from dataclasses import dataclass
from pathlib import Path

from dpctl import progress
from dpctl.errors import OutOfReach
from dpctl.latency.build import Candidate, Exports
from dpctl.latency.clock import Clock
from dpctl.latency.document import Profile, conditions, require_fitting
from dpctl.latency.model import LatencyModel
from dpctl.latency.profile import fitted, unrestricted
from dpctl.latency.search import CLOSE, Build, met_already, tell, timed
from dpctl.latency.widths import plan_within
from dpctl.models import Model
from dpctl.prune import Scored
from dpctl.prune.unpruned import unpruned_costs
from dpctl.recipe import LatencyRecipe, PruneRecipe

CORRECTIONS = 3
# A sum in another order may come out larger by this part.
TIE = 1e-9


@dataclass(frozen=True)
class Prediction:
    """A latency model of the network that is cut; `baseline_s` is what the unpruned one took when it was made."""

    model: LatencyModel
    baseline_s: float
    is_from_here: bool

    def foretell(self, scored: Scored, recipe: PruneRecipe, share: float) -> Build:
        """Return the candidate that is predicted to take a share of the unpruned network's latency, at most.

        Raises OutOfReach for a share below the predicted floor.
        """
        plan, stock = plan_within(scored, recipe, self.model, share, self.baseline_s)
        macs = scored.network.cost("macs", plan.widths()) / unpruned_costs(scored.source)["macs"]
        return Build(Candidate(plan, stock, macs), None, self.model.predict(plan.widths()) / self.baseline_s)

    def nearest(self, scored: Scored, recipe: PruneRecipe, share: float) -> Build:
        """Return the same, or where the share is below the predicted floor, the network that is the floor."""
        try:
            return self.foretell(scored, recipe, share)
        except OutOfReach as problem:
            return self.foretell(scored, recipe, (1.0 + TIE) * problem.floor / self.baseline_s)


def open_prediction(found: Profile, wanted: LatencyRecipe, source: Model, exports: Exports) -> Prediction:
    """Return what a latency file predicts of a model. Raises a DpctlError for one of something else."""
    assert wanted.model is not None
    wanted_here = conditions(wanted, exports.rows, exports.size, exports.threads)
    require_fitting(found, exports.architecture, exports.unpruned, wanted_here, Path(wanted.model))
    # Networks of all widths were timed: groups that this cut leaves alone are as wide as they are.
    network = unrestricted(source)
    free = {span.name for span in exports.network.spans}
    held = {name: width for name, width in network.full().items() if name not in free}
    return Prediction(fitted(found, network).holding(held), found.baseline_s, found.is_from_here)


def correct(
    prediction: Prediction,
    scored: Scored,
    recipe: PruneRecipe,
    exports: Exports,
    clock: Clock,
    share: float,
    bar: progress.Bar,
) -> list[Build]:
    """Build and time the predicted network, and again with a corrected target until it is close, CORRECTIONS times.

    A floor is no more than a prediction either: the network that is the floor is built where the target is below it.
    Raises a DpctlError where the network meets the target as it is.
    """
    builds: list[Build] = []
    target, full = share, scored.network.full()
    with bar("latency", 1 + CORRECTIONS) as advance:
        for _ in range(1 + CORRECTIONS):
            foretold = prediction.nearest(scored, recipe, target)
            assert foretold.predicted is not None
            if any(foretold.candidate.widths == each.candidate.widths for each in builds):
                break
            build = timed(foretold.candidate, exports, clock, foretold.predicted)
            advance(1)
            tell(len(builds) + 1, build, share)
            # What was predicted of these widths, not what was asked: a staircase may end far below that.
            target = share * foretold.predicted / build.share
            if foretold.candidate.widths == full:  # nothing is cut, and that is no candidate
                if build.share <= share:
                    raise met_already(share, build.share)
                continue
            builds.append(build)
            if abs(build.share / share - 1.0) <= CLOSE:
                break
    return builds
