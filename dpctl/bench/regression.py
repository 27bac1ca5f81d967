"""Two benchmarks of one baseline against one another: which figures of the candidates have become worse?

Between two runs the machine drifts, so what is compared are first of all figures that were paired within each run: the
speed-ups over the baseline, which took its turns in the same rounds. Everything here is pure and seeded.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpctl import units
from dpctl.bench.compare import RESAMPLES, interval
from dpctl.bench.document import read_result
from dpctl.bench.metrics import Figure
from dpctl.bench.result import EAGER, BenchResult, Condition, Quality, Row, Turn
from dpctl.bench.stability import FEWEST_ROUNDS
from dpctl.errors import DpctlError, GateError

# What runs the network or the loop around it; the other libraries change neither time nor pictures.
LIBRARIES = ("torch", "diffusers", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")
# The peak of one and the same network moved by 3.2 MB between runs: pages and the allocator's.
MEMORY_NOISE_BYTES = 4_000_000
# Two medians of equal ratios may differ by this.
ROUNDING = 1e-9
MACHINE = ("system", "processor", "gpu", "governor", "workers")


@dataclass(frozen=True)
class Place:
    """The subject that a figure is of, and the condition where it has one."""

    model: str
    backend: str
    batch_size: int | None = None
    num_inference_steps: int | None = None

    def __str__(self) -> str:
        batch = "" if self.batch_size is None else f", batch {self.batch_size}"
        steps = "" if self.num_inference_steps is None else f", {self.num_inference_steps} steps"
        return f"{self.model} / {self.backend}{batch}{steps}"


@dataclass(frozen=True)
class Change:
    """One figure in the old and the new run; `change` is new / old - 1, None where old is not positive.

    `low` and `high` are the change's bootstrap 95 % interval, for memory the change with the noise on either side, and
    None for what has none. Only what `gates` counts as a regression.
    """

    place: Place
    figure: str
    unit: str
    better: str
    gates: bool
    old: float
    new: float
    change: float | None
    low: float | None = None
    high: float | None = None

    @property
    def worse_by(self) -> float:
        """The change as a fraction of the old figure, positive where it is for the worse."""
        change = self.change or 0.0
        return -change if self.better == "higher" else change

    @property
    def significant(self) -> bool:
        """Whether the interval excludes no change; a file's size has none."""
        if self.low is None or self.high is None:
            return self.old != self.new
        return self.low > ROUNDING or self.high < -ROUNDING

    def regressed(self, most: float) -> bool:
        """Tell whether this is a regression beyond the fraction `most`."""
        return self.gates and self.significant and self.worse_by > most


@dataclass(frozen=True)
class Comparison:
    """All changes from the old run to the new one; `lost` is what the new one was asked for and does not have."""

    changes: tuple[Change, ...]
    lost: tuple[str, ...]
    notes: tuple[str, ...]

    def regressions(self, most: float) -> tuple[Change, ...]:
        """Return what is worse by more than the fraction `most`, the worst first."""
        found = [change for change in self.changes if change.regressed(most)]
        return tuple(sorted(found, key=lambda change: -change.worse_by))


def compare(old: BenchResult, new: BenchResult) -> Comparison:
    """Compare what both runs measured: rows of the same model name, backend, batch size and number of steps.

    Raises a DpctlError that names every difference where the runs are unlike (machine, threads, libraries, scheduler,
    baseline), and one where they have no candidate in common.
    """
    require_sound(old, "OLD")
    require_sound(new, "NEW")
    require_alike(old, new)
    require_candidates(old, new)
    changes = (*_speed(old, new), *_files(old, new), *_quality(old, new))
    return Comparison(changes, tuple(_lost(old, new)), tuple(_notes(old, new, changes)))


def compare_files(old: Path, new: Path, most: float | None) -> Comparison:
    """Read and compare two bench.json; `most` is the regression that will be allowed, checked before anything is read.

    Raises what reading and comparing raise, and a DpctlError where no speed-up could meet or miss the gate.
    """
    if most is not None and not 0.0 <= most < math.inf:
        raise DpctlError("the allowed regression is no fraction", f"{most}", "give 0 or more: 0.05 is 5 %")
    found = compare(read_result(old), read_result(new))
    if most is not None and not any(change.unit == "x" and change.gates for change in found.changes):
        got = f"fewer than {FEWEST_ROUNDS} rounds in common with the baseline in one of the files"
        raise DpctlError("no speed-up can be judged", got, "measure both with --rounds 20 or more")
    return found


def require_sound(result: BenchResult, which: str) -> None:
    """Raise a DpctlError for a file whose values no benchmark can have written."""
    lists = [result.recipe.get(name) for name in ("batch_sizes", "num_inference_steps")]
    times = [turn.latency_s for subject in result.subjects for turn in subject.turns]
    figures = [figure for each in result.quality for figure in each.figures.values()]
    values = [value for each in figures for value in (each.value, each.low, each.high, *each.replicates)]
    wrong = [
        *(["no models"] if not result.models else []),
        *(["a recipe without batch sizes or steps"] if not all(isinstance(each, list) for each in lists) else []),
        *(["latencies that are not positive"] if not all(math.isfinite(t) and t > 0 for t in times) else []),
        *(["quality figures that are not finite"] if not all(map(math.isfinite, values)) else []),
    ]
    if wrong:
        raise DpctlError("the benchmark file is damaged", f"{which} has {', '.join(wrong)}", "measure again")


def require_alike(old: BenchResult, new: BenchResult) -> None:
    """Raise a DpctlError that names everything in which the two runs are not comparable."""
    theirs, ours = facts(old), facts(new)
    names = [name for name in theirs | ours if theirs.get(name) != ours.get(name)]
    if names:
        apart = [f"{name}: {theirs.get(name) or 'none'} in OLD, {ours.get(name) or 'none'} in NEW" for name in names]
        todo = "measure both with the same baseline, options, libraries and machine, then compare"
        raise DpctlError("the two benchmarks are unlike", "; ".join(apart), todo)


def facts(result: BenchResult) -> dict[str, Any]:
    """Return what two runs must agree on, by name; candidates, rounds and sample counts may differ."""
    environment, libraries = result.environment, result.environment.get("libraries", {})
    python = ".".join(str(environment.get("python", "")).split(".")[:2])
    return {
        "baseline": result.baseline.name,
        "the baseline's digest": result.baseline.digest,
        "scheduler": result.recipe.get("scheduler"),
        "guidance scale": result.recipe.get("guidance_scale"),
        # What they say counts, and not where they stand.
        "prompts": environment.get("prompts_digest") or result.recipe.get("prompts"),
        "precision": result.recipe.get("precision", "fp32"),
        "threads": result.threads,
        **{name: environment.get(name) for name in MACHINE},
        "Python": python,
        **{name: libraries.get(name) for name in LIBRARIES},
    }


def require_candidates(old: BenchResult, new: BenchResult) -> None:
    """Raise a DpctlError where no candidate was measured in both runs."""
    theirs, ours = ([model.name for model in result.models[1:]] for result in (old, new))
    if not set(theirs) & set(ours):
        got = f"{', '.join(theirs) or 'none'} in OLD, {', '.join(ours) or 'none'} in NEW"
        todo = (
            "give the candidate's directory the same name in both runs: a model is called by the last part of its path"
        )
        raise DpctlError("the two benchmarks have no candidate in common", got, todo)
    if not _paired_rows(old, new):
        got = "no subject with turns at the same batch size and number of steps in both"
        raise DpctlError("the two benchmarks have nothing in common", got, "measure both with the same options")


def _key(row: Row) -> tuple[str, str, int, int]:
    return row.model, row.backend, row.batch_size, row.num_inference_steps


def _paired_rows(old: BenchResult, new: BenchResult) -> list[tuple[Row, Row]]:
    theirs = {_key(row): row for row in old.rows}
    return [(theirs[_key(row)], row) for row in new.rows if _key(row) in theirs]


def gate(found: Comparison, most: float | None) -> None:
    """Raise a GateError where something is worse by more than the fraction `most` or missing; None allows all."""
    if most is None or not (found.regressions(most) or found.lost):
        return
    worse = [
        f"{each.figure} of {each.place}: worse by {units.percent(each.worse_by)}" for each in found.regressions(most)
    ]
    got = "; ".join([*worse, *(f"missing in NEW: {each}" for each in found.lost)])
    todo = "mend it, or measure again with more --rounds if you doubt it; allow more with --max-regression"
    raise GateError(f"NEW is worse than OLD beyond --max-regression {most:g}", got, todo)


# --- the figures ---------------------------------------------------------------------------------------------------


def _speed(old: BenchResult, new: BenchResult) -> Iterator[Change]:
    """Yield the speed-ups, the latency and the memory of each row.

    An absolute latency gates nothing: set against the change of the baseline's own, it is the speed-up's change.
    """
    noise = memory_noise(old, new)
    for before, after in _paired_rows(old, new):
        place = Place(after.model, after.backend, after.batch_size, after.num_inference_steps)
        yield from _speed_up("speed-up over the baseline", place, after.backend, old, new)
        if after.backend != EAGER:
            yield from _speed_up("speed-up over eager", place, EAGER, old, new)
        latencies = (_latencies(result, place) for result in (old, new))
        yield _medians(place, "latency p50 (unpaired)", "s", "lower", False, *latencies)
        if before.peak_memory_bytes and after.peak_memory_bytes:
            counts = after.model != new.baseline.name
            yield _memory(place, before.peak_memory_bytes, after.peak_memory_bytes, noise, counts)


def memory_noise(old: BenchResult, new: BenchResult) -> int:
    """Return by how many bytes a peak moves by itself: the most that the baseline's did, whose network is the same."""
    pairs = [
        (b.peak_memory_bytes, a.peak_memory_bytes) for b, a in _paired_rows(old, new) if a.model == new.baseline.name
    ]
    return max([MEMORY_NOISE_BYTES, *(abs(after - before) for before, after in pairs if before and after)])


def _memory(place: Place, old: int, new: int, noise: int, counts: bool) -> Change:
    change, margin = new / old - 1.0, noise / old
    within = change - margin, change + margin
    return Change(place, "peak memory", "bytes", "lower", counts, float(old), float(new), change, *within)


def _speed_up(figure: str, place: Place, over: str, old: BenchResult, new: BenchResult) -> Iterator[Change]:
    before, after = (_ratios(result, place, over) for result in (old, new))
    if before and after:
        enough = min(len(before), len(after)) >= FEWEST_ROUNDS
        yield _medians(place, figure, "x", "higher", enough, before, after)


def _ratios(result: BenchResult, place: Place, over: str) -> list[float]:
    """Return baseline time / subject time of every round that both took, as `BenchResult.speed_up` pairs them."""
    if (place.model, place.backend) == (result.baseline.name, over):
        return []
    ours, theirs = (
        _turns(result, place),
        _turns(result, dataclasses.replace(place, model=result.baseline.name, backend=over)),
    )
    return [theirs[r].latency_s / ours[r].latency_s for r in sorted(ours.keys() & theirs.keys())]


def _latencies(result: BenchResult, place: Place) -> list[float]:
    return [turn.latency_s for turn in _turns(result, place).values()]


def _turns(result: BenchResult, place: Place) -> dict[int, Turn]:
    subject = result.subject(place.model, place.backend)
    assert place.batch_size is not None  # a place in the table of turns has both
    assert place.num_inference_steps is not None
    return subject.measured(Condition(place.batch_size, place.num_inference_steps)) if subject else {}


def _medians(
    place: Place, figure: str, unit: str, better: str, gates: bool, old: Sequence[float], new: Sequence[float]
) -> Change:
    """Return the change of a median over rounds; the rounds of the two runs are drawn apart, as nothing pairs them."""
    before, after = (float(np.median(values)) for values in (old, new))
    random = np.random.default_rng(0)
    drawn = [np.asarray(each)[random.integers(len(each), size=(RESAMPLES, len(each)))] for each in (old, new)]
    low, high = interval(np.median(drawn[1], axis=1) / np.median(drawn[0], axis=1) - 1.0)
    return Change(place, figure, unit, better, gates, before, after, after / before - 1.0, low, high)


def _files(old: BenchResult, new: BenchResult) -> Iterator[Change]:
    for after in new.subjects:
        before = old.subject(after.model, after.backend)
        if before is not None and before.file_bytes > 0:
            sizes = float(before.file_bytes), float(after.file_bytes)
            place = Place(after.model, after.backend)
            yield Change(place, "file", "bytes", "lower", True, *sizes, sizes[1] / sizes[0] - 1.0)


def _quality(old: BenchResult, new: BenchResult) -> Iterator[Change]:
    """Yield the change of every quality figure that was taken in the same way in both runs."""
    for before, after in _paired_quality(old, new):
        place = Place(after.model, after.backend, None, after.num_inference_steps)
        for name in sorted(before.figures.keys() & after.figures.keys()):
            one, other = before.figures[name], after.figures[name]
            if _unlike(name, one, other, old, new):
                continue
            told = (name, "", other.better, one.value > 0, one.value, other.value)
            if one.value <= 0:  # an unbiased estimate of a distance may be: then no fraction of it says anything
                yield Change(place, *told, None)
                continue
            low, high = _apart(one, other, paired=old.recipe.get("seed") == new.recipe.get("seed"))
            yield Change(place, *told, other.value / one.value - 1.0, low / one.value, high / one.value)


def _paired_quality(old: BenchResult, new: BenchResult) -> list[tuple[Quality, Quality]]:
    theirs, ours = ({_kind(each): each for each in result.quality} for result in (old, new))
    return [(theirs[key], each) for key, each in ours.items() if key in theirs]


def _kind(each: Quality) -> tuple[str, int, str | None]:
    """Return what samples are compared by: exact backends draw a model's own, an approximation others."""
    return each.model, each.num_inference_steps, each.approximation


def _unlike(name: str, one: Figure, other: Figure, old: BenchResult, new: BenchResult) -> str | None:
    """Return why a quality figure cannot be compared, or None: a FID of fewer samples is larger."""
    if one.count != other.count:
        return f"{name} of {one.count} samples in OLD, of {other.count} in NEW: not compared"
    if one.against != other.against or (old.features or {}) != (new.features or {}):
        return f"{name} against {one.against} in OLD, {other.against} in NEW, or by other features: not compared"
    return None


def _apart(one: Figure, other: Figure, *, paired: bool) -> tuple[float, float]:
    """Return the interval of other - one.

    Runs of one seed draw their samples from the same noise and resample them alike, so that their replicates pair up.
    Others are drawn apart.
    """
    before, after = (np.asarray(figure.replicates, dtype=float) for figure in (one, other))
    if not before.size or not after.size:
        return other.low - one.high, other.high - one.low
    if paired and before.size == after.size:
        return interval(after - before)
    random = np.random.default_rng(0)
    return interval(random.choice(after, RESAMPLES) - random.choice(before, RESAMPLES))


# --- what is not there -----------------------------------------------------------------------------------------------


def _lost(old: BenchResult, new: BenchResult) -> Iterator[str]:
    """Yield what the old run has and the new one was asked for and has not: nobody's gate should pass on that."""
    for before in old.subjects:
        after = new.subject(before.model, before.backend)
        if before.failure is None and after is not None and after.failure is not None:
            yield f"{after.name}: {after.failure}"
    if not new.recipe.get("samples"):
        return
    found = {_kind(each): each for each in new.quality}
    for earlier in old.quality:
        key = _kind(earlier)
        if key[0] not in {model.name for model in new.models} or key[1] not in new.recipe["num_inference_steps"]:
            continue
        later = found.get(key)
        for name in sorted(earlier.figures.keys() - (later.figures.keys() if later else set())):
            reason = later.left_out.get(name, "not measured") if later else "no samples were drawn"
            yield f"{earlier.model}, {key[1]} steps: {name}: {reason}"


def _notes(old: BenchResult, new: BenchResult, changes: Iterable[Change]) -> Iterator[str]:
    """Yield what a reader must know beside the table."""
    if new.created < old.created:
        yield f"NEW was measured before OLD ({new.created}, {old.created}): are the two files the wrong way round?"
    theirs, ours = ({f"{s.model} / {s.backend}" for s in result.subjects} for result in (old, new))
    alone = [(name, "OLD") for name in sorted(theirs - ours)] + [(name, "NEW") for name in sorted(ours - theirs)]
    for name, which in alone:
        yield f"{name} is in {which} alone: not compared"
    if any(change.unit == "x" and not change.gates for change in changes):
        yield f"speed-ups of fewer than {FEWEST_ROUNDS} rounds gate nothing: their intervals are too narrow"
    for before, after in _paired_quality(old, new):
        for name in sorted(before.figures.keys() & after.figures.keys()):
            reason = _unlike(name, before.figures[name], after.figures[name], old, new)
            if reason:
                yield f"{after.model}, {after.num_inference_steps} steps: {reason}"
    for result, which in ((old, "OLD"), (new, "NEW")):
        yield from (f"{which}: {warning}" for warning in result.warnings)
