"""Quality over latency: which points are on the front, and which of two curves is better at equal latency.

Pure functions over figures. All points that are compared must be of one batch size and one number of samples. FID and
latency: lower is better.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from dpctl import units
from dpctl.bench.compare import CONFIDENCE, Estimate, interval, paired_ratio
from dpctl.bench.metrics import Figure

# Latencies at which two curves are compared, evenly over the logarithm, beside their own points.
GRID = 65


@dataclass(frozen=True)
class Point:
    """One subject at one number of steps: the latency of a batch, and the FID of its samples.

    `rounds` has the latency of every measured round: what was measured in the same round is compared side by side.
    Without it, as with a FID without replicates, intervals that do not overlap are a significant difference.
    """

    subject: str
    num_inference_steps: int
    latency_s: Estimate
    fid: Figure
    rounds: Mapping[int, float] = field(default_factory=dict)


def measured(subject: str, num_inference_steps: int, rounds: Mapping[int, float], fid: Figure) -> Point:
    """Return the point of latencies by round: their median, with its bootstrap interval."""
    values = list(rounds.values())
    return Point(subject, num_inference_steps, paired_ratio(values, [1.0] * len(values)), fid, dict(rounds))


# --- the front --------------------------------------------------------------------------------------------------------


def front(points: Sequence[Point]) -> tuple[Point, ...]:
    """Return the points on the front of FID over latency, in the order given.

    A point is off the front only if a point *on* the front is significantly better in one of the two and not
    significantly worse in the other. Both halves lean towards keeping a point: who drops one must show it. That the
    witness is itself on the front matters because "no significant difference" is not transitive: otherwise a point
    could be dropped by one that is dropped too, with nobody left who beats it, and another measurement of something
    worthless would change the front. (Points that beat one another in a circle, which paired intervals do not rule
    out, all stay.)
    """
    signs = {(i, j): compared(a, b) for i, a in enumerate(points) for j, b in enumerate(points[:i])}
    beats = {pair for pair, found in signs.items() if min(found) < 0 and max(found) <= 0}
    beats |= {(j, i) for (i, j), found in signs.items() if max(found) > 0 and min(found) >= 0}
    open_, on = set(range(len(points))), set[int]()
    while open_:
        # Whom nobody beats who may still be on the front, is on it, and whom it beats is off.
        found_on = {i for i in open_ if not any((j, i) in beats for j in open_)} or set(open_)
        on |= found_on
        open_ -= found_on | {i for i in open_ if any((j, i) in beats for j in found_on)}
    return tuple(point for i, point in enumerate(points) if i in on)


def compared(one: Point, other: Point) -> tuple[int, int]:
    """Return for latency and FID -1 where `one` is significantly lower, 1 where it is higher, and 0 for neither."""
    shared = sorted(one.rounds.keys() & other.rounds.keys())
    if shared:
        ratio = paired_ratio([one.rounds[r] for r in shared], [other.rounds[r] for r in shared])
        latency = _sign(ratio.low, ratio.high, 1.0)
    else:
        latency = _apart(one.latency_s, other.latency_s)
    if _pair_up([one.fid, other.fid]):
        low, high = interval(np.subtract(one.fid.replicates, other.fid.replicates))
        return latency, _sign(low, high, 0.0)
    return latency, _apart(one.fid, other.fid)


def _sign(low: float, high: float, middle: float) -> int:
    return (low > middle) - (high < middle)


def _apart(one: Estimate | Figure, other: Estimate | Figure) -> int:
    return (one.low > other.high) - (one.high < other.low)


def _pair_up(figures: Sequence[Figure]) -> bool:
    """Tell whether the replicates of all are of the same resamples of as many samples."""
    kinds = {(figure.count, len(figure.replicates)) for figure in figures}
    return len(kinds) == 1 and bool(figures[0].replicates)


# --- a slim model against the unpruned one with fewer steps -----------------------------------------------------------

Kind = Literal["dominates", "is dominated", "ranges", "mixed", "no difference", "apart", "unpaired"]


@dataclass(frozen=True)
class Comparison:
    """Two curves of FID over latency, "ours" against "theirs", over the latencies [from_s, to_s] that both cover.

    `difference` is our FID minus theirs where it is clearest, at `at_s`. Of "ranges", ours is better on one side of
    `crossing_s`: `below` tells which. Of "apart", [from_s, to_s] is the gap between the two, and `below` tells whether
    ours is the faster one.
    """

    kind: Kind
    from_s: float = math.nan
    to_s: float = math.nan
    at_s: float = math.nan
    difference: Estimate | None = None
    crossing_s: float = math.nan
    below: bool = False


def compare_curves(ours: Sequence[Point], theirs: Sequence[Point]) -> Comparison:
    """Compare the FID of two subjects at equal latency, each at one or more numbers of steps.

    Between its points a curve is linear in FID over log latency; beyond them there is none. The bootstrap draws
    samples, for all points the same, and rounds. Its band holds at all latencies at once with 95 %, since the verdict
    says "nowhere" and "somewhere": single intervals side by side would find a difference too often. Curves that just
    fail to meet, at latencies without a significant difference, are compared there.
    """
    if not _pair_up([point.fid for point in (*ours, *theirs)]):
        return Comparison("unpaired")
    first, second = (sorted(points, key=lambda point: point.latency_s.value) for points in (ours, theirs))
    low = max(first[0].latency_s.value, second[0].latency_s.value)
    high = min(first[-1].latency_s.value, second[-1].latency_s.value)
    if low > high:
        below = first[-1].latency_s.value < second[0].latency_s.value
        ends = (first[-1], second[0]) if below else (first[0], second[-1])
        if compared(*ends)[0]:
            return Comparison("apart", high, low, below=below)
        low = high = math.sqrt(low * high)
    knots = [p.latency_s.value for p in (*first, *second) if low < p.latency_s.value < high]
    grid = np.unique(np.log([*np.geomspace(low, high, GRID), *knots] if low < high else [low]))
    return _judged(grid, *_differences(first, second, grid))


def _differences(ours: Sequence[Point], theirs: Sequence[Point], grid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return our FID minus theirs at the log latencies of the grid [G], and in each resample [R, G]."""
    points = [*ours, *theirs]
    fid = np.array([point.fid.replicates for point in points]).T
    latency = _resampled_latencies(points, len(fid))
    split = len(ours)

    def difference(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return _curve(x[:split], y[:split], grid) - _curve(x[split:], y[split:], grid)

    value = difference(
        np.log([point.latency_s.value for point in points]), np.array([point.fid.value for point in points])
    )
    return value, np.array([difference(x, y) for x, y in zip(latency, fid, strict=True)])


def _resampled_latencies(points: Sequence[Point], resamples: int) -> np.ndarray:
    """Return the log latency of every point [R, K], by the rounds that all have; where there are none, as measured."""
    shared = sorted(set.intersection(*(set(point.rounds) for point in points)))
    if not shared:
        return np.tile(np.log([point.latency_s.value for point in points]), (resamples, 1))
    rounds = np.log([[point.rounds[r] for point in points] for r in shared])
    drawn = np.random.default_rng(0).integers(len(shared), size=(resamples, len(shared)))
    return np.median(rounds[drawn], axis=1)


def _curve(x: np.ndarray, y: np.ndarray, grid: np.ndarray) -> np.ndarray:
    # In a resample the ends may lie a little inside the grid: there the curve stays at its last value.
    order = np.argsort(x, kind="stable")
    return np.interp(grid, x[order], y[order])


def _judged(grid: np.ndarray, value: np.ndarray, resamples: np.ndarray) -> Comparison:
    """Return the comparison of differences [G] with their resamples [R, G] at the log latencies of the grid."""
    # The simultaneous band: as wide, in standard errors, as the largest deviation of 95 % of the resamples.
    deviation = resamples - resamples.mean(axis=0)
    error = deviation.std(axis=0)
    scaled = np.divide(np.abs(deviation), error, out=np.zeros_like(deviation), where=error > 0)
    half = float(np.quantile(scaled.max(axis=1), CONFIDENCE)) * error
    better, worse = np.flatnonzero(value + half < 0), np.flatnonzero(value - half > 0)
    # Where the difference is clearest: the largest number of half widths.
    clearest = int(np.argmax(np.abs(value) - half))
    found = Estimate(
        float(value[clearest]),
        float(value[clearest] - half[clearest]),
        float(value[clearest] + half[clearest]),
        len(resamples),
    )
    low, high, at = (float(np.exp(x)) for x in (grid[0], grid[-1], grid[clearest]))
    if len(better) and len(worse):
        below, above = better[-1] < worse[0], worse[-1] < better[0]
        if not (below or above):
            return Comparison("mixed", low, high, at, found)
        start, stop = (better[-1], worse[0]) if below else (worse[-1], better[0])
        crossing = _crossing(grid[start : stop + 1], value[start : stop + 1])
        return Comparison("ranges", low, high, at, found, crossing, bool(below))
    kind: Kind = "dominates" if len(better) else "is dominated" if len(worse) else "no difference"
    return Comparison(kind, low, high, at, found)


def _crossing(grid: np.ndarray, value: np.ndarray) -> float:
    """Return the first latency at which a difference that changes its sign is 0."""
    after = int(np.flatnonzero(np.sign(value) != np.sign(value[0]))[0])
    share = value[after - 1] / (value[after - 1] - value[after])
    return float(np.exp(grid[after - 1] + share * (grid[after] - grid[after - 1])))


def verdict(found: Comparison, ours: str, theirs: str, backend: str) -> str:
    """Say in a sentence what a comparison of a slim model with the unpruned one with fewer steps came to."""
    other = f"{theirs} with fewer steps"
    start, end = units.seconds(found.from_s), units.seconds(found.to_s)
    span = f"at {start}" if start == end else f"from {start} to {end}"
    if found.kind == "unpaired":
        told = f"{ours} and {other} cannot be compared: their FID is not of the same samples"
    elif found.kind == "apart":
        slow, fast = (theirs, ours) if found.below else (ours, theirs)
        gap = f"{fast} ends at {start} and {slow} begins at {end}"
        told = f"{ours} and {theirs} share no latency: {gap}; measure {slow} with fewer steps or {fast} with more"
    elif found.kind == "no difference":
        told = f"{ours} and {other} show no significant difference in FID at equal latency, {span}"
    elif found.kind == "ranges":
        better, rest = ("below", "above") if found.below else ("above", "below")
        where = f"{ours} is better {better} {units.seconds(found.crossing_s)}, {other} {rest}"
        told = f"each has its range: {where} (compared {span})"
    elif found.kind == "mixed":
        told = f"neither dominates: {ours} and {other} are better by turns {span}"
    else:
        told = f"{ours} {found.kind}{' by' * (found.kind == 'is dominated')} {other}: {_amount(found, span)}"
    return f"In {backend}, {told}."


def _amount(found: Comparison, span: str) -> str:
    """Say how much lower or higher our FID is, where one of the two dominates."""
    assert found.difference is not None
    low, high = sorted(abs(edge) for edge in (found.difference.low, found.difference.high))
    side, other_side = ("lower", "worse") if found.kind == "dominates" else ("higher", "better")
    amount = f"{side} by {abs(found.difference.value):.3g} [{low:.3g}, {high:.3g}]"
    if not span.startswith("from"):
        return f"{span} its FID is {amount}"
    where = f"at {units.seconds(found.at_s)} it is {amount}"
    return f"{span} its FID is nowhere significantly {other_side}, and {where}"


def equal_latency_steps(base_step_s: float, slim_latency_s: float, overhead_s: float, steps: int) -> int:
    """Return how many steps the unpruned model can take within the time of a slim one: 1 at least, `steps` at most.

    `slim_latency_s` is the slim model's whole batch in `steps` steps, `overhead_s` what the unpruned model's takes
    beside its steps. Rounded down: the baseline must not get more time than what it is compared with.
    """
    fit = (slim_latency_s - overhead_s) / base_step_s
    return max(1, min(steps, math.floor(fit * (1 + 1e-12))))
