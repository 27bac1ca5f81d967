"""`dpctl profile`: run a few whole slim networks, and write down what their layers take on this machine."""

import dataclasses
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpctl import environment, progress
from dpctl.errors import DpctlError
from dpctl.inspect import Report
from dpctl.latency.build import Exports
from dpctl.latency.clock import Clock, Precision
from dpctl.latency.document import CONDITIONS, Profile, architecture_of, conditions, read_profile, require_fitting
from dpctl.latency.goal import check
from dpctl.latency.model import Accuracy, LatencyModel, Sample, accuracy, fit
from dpctl.latency.sampling import stratified
from dpctl.models import load_model
from dpctl.prune.plan import Network
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
    if networks + 1 < FEWEST or held_out < 0:
        got = f"{networks} networks, {held_out} held out"
        raise DpctlError("a latency model is not learnt from so few networks", got, f"time {FEWEST - 1} or more")
    if recipe.of != "unet":
        raise DpctlError("a latency file is of calls of the network", f"latency of {recipe.of}", "profile the unet")
    source = load_model(model)
    planned = PruneRecipe("magnitude", latency=recipe)
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(source, planned, Path(folder))
        architecture = architecture_of(source.unet)
        begun = _begun(out, architecture, exports, recipe, seed, resume=resume, force=force)
        network = exports.network
        wanted = {False: [network.full(), *stratified(network, networks, seed)], True: []}
        if held_out:
            wanted[True] = stratified(network, held_out, seed + 1)
        done = {False: len(begun.samples), True: len(begun.held_out)} if begun else {False: 0, True: 0}
        left = [(kind, widths) for kind in (False, True) for widths in wanted[kind][done[kind] :]]
        total = sum(map(len, wanted.values()))
        with (
            Clock(exports.baseline(), recipe, exports.rows, exports.threads, ROUGH) as clock,
            bar("profile", total, done=total - len(left)) as advance,
        ):
            found = begun or Profile(
                architecture, wanted_here(recipe, exports), environment.describe(), seed, clock.baseline_s()
            )
            for kind, widths in left:
                sample = _measured(exports, clock, widths, found.baseline_s)
                found = found.with_sample(sample, held_out=kind)
                found.write(out)
                advance(1, latency=seconds(sample.latency_s))
    return report(found, network, out)


def wanted_here(recipe: LatencyRecipe, exports: Exports) -> dict[str, Any]:
    """Return what the latency of a recipe depends on."""
    return conditions(recipe, exports.rows, exports.size, exports.threads)


def _begun(
    out: Path, architecture: str, exports: Exports, recipe: LatencyRecipe, seed: int, *, resume: bool, force: bool
) -> Profile | None:
    """Return the file to go on with; None for a new one."""
    wanted = wanted_here(recipe, exports)
    if out.exists() and resume:
        found = read_profile(out)
        require_fitting(found, architecture, wanted, out)
        if not found.is_from_here:
            got = f"{out}: {found.environment.get('processor')}, {found.environment.get('gpu') or 'no GPU'}"
            raise DpctlError("the latency file is of another machine", got, "begin another file on this one")
        if found.seed != seed:
            got = f"{out}: {found.seed}, asked for {seed}"
            raise DpctlError("the latency file is of another seed", got, "give the same --seed")
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
    return fit(network, found.samples)


def report(found: Profile, network: Network, out: Path) -> Report:
    """Return what `dpctl profile` prints: how well predictions fit, on networks not fitted on where there are any."""
    model = fitted(found, network)
    judged: Accuracy = accuracy(model, found.held_out or found.samples)
    which, whole = "held out" if found.held_out else "fitted on", found.samples[0].latency_s
    ran = ", ".join(f"{name.replace('_', ' ')} {found.conditions[name]}" for name in CONDITIONS)
    constant = f"{seconds(whole)}, of which {percent(model.constant_s / whole)} is constant"
    errors = f"median error {percent(judged.median_error)}, worst {percent(judged.worst_error)}"
    blocks = f"blocks of {model.step} channels" + (f", {model.tile} outputs at a time" if model.tile else "")
    lines = [
        f"{out}: {len(found.samples)} networks; {ran}",
        f"the unpruned network takes {constant}; kernels work in {blocks}",
        f"{len(judged.pairs)} networks {which}: rank correlation {judged.rank_correlation:.3f}, {errors}",
    ]
    return Report({"out": str(out), "step": model.step, "tile": model.tile, **dataclasses.asdict(judged)}, list(lines))
