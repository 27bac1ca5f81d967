"""`dpctl profile`: run a few whole slim networks, and write down what their layers take on this machine."""

import dataclasses
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpctl import environment, progress
from dpctl.errors import DpctlError
from dpctl.inspect import Report
from dpctl.latency.build import Exports
from dpctl.latency.clock import Clock, Precision
from dpctl.latency.document import (
    CONDITIONS,
    Profile,
    conditions,
    read_profile,
    require_fitting,
    require_writable,
)
from dpctl.latency.goal import check, require_backend
from dpctl.latency.model import Accuracy, LatencyModel, Sample, accuracy, fit
from dpctl.latency.sampling import stratified
from dpctl.models import Model, load_model
from dpctl.prune.plan import Network
from dpctl.prune.target import trace
from dpctl.recipe import LatencyRecipe, PruneRecipe
from dpctl.units import percent, seconds
from runtime.layers import JOINED

# Passes that a layer's time is the median of.
PASSES = 15
# Four or five coefficients of a layer, from nearly twice as many networks at least, the unpruned one among them.
FEWEST = 8
# A single network may be known this badly: the fit is over many.
ROUGH = Precision(enough=0.04, too_wide=0.3)


def profile(
    model: str,
    out: Path,
    recipe: LatencyRecipe,
    *,
    networks: int = 24,
    held_out: int = 0,
    seed: int = 0,
    resume: bool = False,
    force: bool = False,
    bar: progress.Bar = progress.no_bar,
) -> Report:
    """Time `networks` networks narrower than a model, and `held_out` more to judge predictions by, into a file.

    The file is written after each, so that a run that was stopped goes on with `resume`. Raises a DpctlError for what
    cannot be exported or measured, and for a file that is there and of something else.
    """
    check(recipe)
    require_backend(recipe)
    require_writable(out)
    if networks + 1 < FEWEST or held_out < 0:
        got = f"{networks} networks, {held_out} held out"
        raise DpctlError("a latency model is not learnt from so few networks", got, f"time {FEWEST - 1} or more")
    if recipe.of != "unet":
        raise DpctlError("a latency file is of calls of the network", f"latency of {recipe.of}", "profile the unet")
    source = load_model(model)
    planned = PruneRecipe("magnitude", latency=recipe)
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(source, planned, Path(folder))
        network = exports.network
        wanted = {False: [network.full(), *stratified(network, networks, seed)], True: []}
        if held_out:
            wanted[True] = stratified(network, held_out, seed + 1)
        found = _begun(out, exports, recipe, wanted, resume=resume, force=force)
        done = {False: len(found.samples), True: len(found.held_out)} if found else {False: 0, True: 0}
        left = [(kind, widths) for kind in (False, True) for widths in wanted[kind][done[kind] :]]
        if found is None or left:
            total = sum(map(len, wanted.values()))
            with (
                Clock(exports.baseline(), recipe, exports.rows, exports.threads, ROUGH) as clock,
                bar("profile", total, done=total - len(left)) as advance,
            ):
                found = found or _begin(exports, recipe, seed, clock)
                for kind, widths in left:
                    sample = _measured(exports, clock, widths, found.baseline_s)
                    found = found.with_sample(sample, held_out=kind)
                    found.write(out)
                    advance(1, latency=seconds(sample.latency_s))
    return report(found, network, out)


def _begin(exports: Exports, recipe: LatencyRecipe, seed: int, clock: Clock) -> Profile:
    """Return a file without networks."""
    made_on, baseline_s = environment.describe(), clock.baseline_s()
    conditions = wanted_here(recipe, exports)
    return Profile(exports.architecture, conditions, made_on, seed, baseline_s, unpruned=exports.unpruned)


def unrestricted(source: Model) -> Network:
    """Return the network with all groups that `profile` times at other widths."""
    return trace(source, PruneRecipe("magnitude", latency=LatencyRecipe(), depth=True))[1]


def wanted_here(recipe: LatencyRecipe, exports: Exports) -> dict[str, Any]:
    """Return what the latency of a recipe depends on."""
    return conditions(recipe, exports.rows, exports.size, exports.threads)


def _begun(
    out: Path,
    exports: Exports,
    recipe: LatencyRecipe,
    networks: Mapping[bool, Sequence[Mapping[str, int]]],
    *,
    resume: bool,
    force: bool,
) -> Profile | None:
    """Return the file to go on with; None for a new one. `networks` are those to time and, under True, to hold out."""
    if out.exists() and resume:
        found = read_profile(out)
        require_fitting(found, exports.architecture, exports.unpruned, wanted_here(recipe, exports), out)
        if elsewhere := found.elsewhere():
            raise DpctlError(
                "the latency file is of another machine", f"{out}: {elsewhere}", "begin another file on this one"
            )
        # Widths are stratified over all networks: a few of one number and a few of another are neither.
        timed = {False: found.samples, True: found.held_out}
        if any([s.widths for s in timed[kind]] != list(networks[kind][: len(timed[kind])]) for kind in timed):
            got = f"{out}: seed {found.seed}, {len(found.samples)} timed, {len(found.held_out)} held out"
            todo = "give the same --networks, --held-out and --seed, or begin another file"
            raise DpctlError("the latency file is of other networks", got, todo)
        return found
    if out.exists() and not force:
        raise DpctlError("the output is there already", str(out), "go on with --resume, or replace it with --force")
    return None


def _measured(exports: Exports, clock: Clock, widths: Mapping[str, int], baseline_s: float) -> Sample:
    """Time one network; what the machine did meanwhile is taken out by the unpruned network's turns in between."""
    directory = exports.of_widths(widths)
    timed, layers = clock.profile(directory, PASSES)
    drift = baseline_s / timed.baseline_s
    known = {layer.name for layer in exports.network.layers}
    found: dict[str, float] = {}
    for layer in layers:
        # A kernel that does the work of several modules counts under the first that has weights.
        names = layer.name.split(JOINED)
        name = next((name for name in names if name in known), names[0])
        found[name] = found.get(name, 0.0) + layer.latency_s * drift
    return Sample(dict(widths), found, timed.ratio.value * baseline_s)


def fitted(found: Profile, network: Network) -> LatencyModel:
    """Return the model that a file's networks give. Raises a DpctlError where they are too few."""
    if len(found.samples) < FEWEST:
        got = f"{len(found.samples)} networks"
        raise DpctlError("the latency file has too few networks", got, "go on with `dpctl profile --resume`")
    full = network.full()
    if any(sample.widths.keys() != full.keys() for sample in (*found.samples, *found.held_out)):
        got = "widths of other groups of channels than are found now"
        raise DpctlError("the latency file does not fit the model", got, "make it again with `dpctl profile`")
    return fit(network, found.samples)


def report(found: Profile, network: Network, out: Path) -> Report:
    """Return what `dpctl profile` prints: how well predictions fit, on networks not fitted on where there are any."""
    model = fitted(found, network)
    judged: Accuracy = accuracy(model, found.held_out or found.samples)
    which, whole = "held out" if found.held_out else "fitted on", found.baseline_s
    ran = ", ".join(f"{name.replace('_', ' ')} {found.conditions[name]}" for name in CONDITIONS)
    constant = f"{seconds(whole)}, of which {percent(model.constant_s / whole)} is constant"
    errors = f"median error {percent(judged.median_error)}, worst {percent(judged.worst_error)}"
    blocks = f"blocks of {model.step} channels" + (f", {model.tile} outputs at a time" if model.tile else "")
    rank = "too few to rank" if judged.rank_correlation is None else f"rank correlation {judged.rank_correlation:.3f}"
    lines = [
        f"{out}: {len(found.samples)} networks; {ran}",
        f"the unpruned network takes {constant}; kernels work in {blocks}",
        f"{len(judged.pairs)} networks {which}: {rank}, {errors}",
    ]
    return Report({"out": str(out), "step": model.step, "tile": model.tile, **dataclasses.asdict(judged)}, list(lines))
