"""Planted curves of FID over latency, where the answer is known."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpctl.bench.compare import Estimate
from dpctl.bench.front import Point, compare_curves, compared, equal_latency_steps, front, measured, verdict
from dpctl.bench.metrics import Figure

ROUNDS, RESAMPLES = 12, 400
STEPS = (5, 10, 20, 50)
Curve = Callable[[float], float]


def figure(value: float, spread: float, seed: int = 0, resamples: int = RESAMPLES) -> Figure:
    """Return a FID with replicates around it: the same seed, the same deviations."""
    deviations = np.random.default_rng(seed).normal(0, spread, resamples)
    low, high = value - 1.96 * spread, value + 1.96 * spread
    return Figure(value, low, high, 1000, "real images", "lower", tuple((value + deviations).tolist()))


def point(subject: str, steps: int, latency_s: float, fid: float, spread: float = 0.1, seed: int = 0) -> Point:
    """Return a point whose rounds drift, the same drift for every point, and vary a little by themselves."""
    drift = np.geomspace(1, 1.5, ROUNDS)
    own = np.random.default_rng([seed, steps, *subject.encode()]).lognormal(0, 0.01, ROUNDS)
    rounds = latency_s * drift * own / np.median(drift * own)
    return measured(subject, steps, dict(enumerate(rounds.tolist(), 1)), figure(fid, spread, seed))


def curve(subject: str, step_s: float, fid: Curve, **more: float) -> list[Point]:
    """Return the points of a subject that takes `step_s` a step and has `fid(latency)`."""
    return [point(subject, n, n * step_s, fid(n * step_s), **more) for n in STEPS]  # type: ignore[arg-type]


def names(points: Sequence[Point]) -> list[str]:
    return [each.subject for each in points]


# --- one point against another ----------------------------------------------------------------------------------------


def test_a_drift_that_both_share_hides_no_difference() -> None:
    fast, slow = point("fast", 10, 1.0, 5), point("slow", 10, 1.1, 5)
    assert fast.latency_s.high > slow.latency_s.low  # alone, their intervals overlap
    assert compared(fast, slow) == (-1, 0)
    assert compared(slow, fast) == (1, 0)


def test_without_rounds_and_replicates_the_intervals_must_not_overlap() -> None:
    def plain(latency: tuple[float, float], fid: tuple[float, float]) -> Point:
        estimate = Estimate(sum(latency) / 2, *latency, 10)
        return Point("plain", 10, estimate, Figure(sum(fid) / 2, *fid, 100, "real images", "lower", ()))

    base = plain((1, 2), (5, 6))
    assert compared(plain((0.5, 0.9), (6.1, 7)), base) == (-1, 1)
    assert compared(plain((0.5, 1.1), (5.9, 7)), base) == (0, 0)


def test_only_rounds_that_both_took_are_compared() -> None:
    one, other = point("one", 10, 1.0, 5), point("other", 10, 1.1, 5)
    # The rounds that the other missed were quiet ones: its median alone would be far off.
    late = measured("other", 10, {r: t for r, t in other.rounds.items() if r > ROUNDS // 2}, other.fid)
    assert compared(one, late) == (-1, 0)
    assert compared(late, one) == (1, 0)


def test_fid_of_the_same_samples_is_paired() -> None:
    one, other = point("one", 10, 1.0, 5.0, spread=1), point("other", 10, 1.0, 5.2, spread=1)
    assert compared(one, other)[1] == -1  # 0.2 apart, and both intervals are 4 wide
    assert compared(one, point("other", 10, 1.0, 5.2, spread=1, seed=1))[1] == 0
    few = dataclasses.replace(other, fid=dataclasses.replace(other.fid, count=10))
    assert compared(one, few)[1] == 0


# --- the front --------------------------------------------------------------------------------------------------------


def test_the_front_of_a_known_picture() -> None:
    points = [
        point("fast", 5, 1, 20),
        point("beaten by fast", 5, 2, 21),
        point("middle", 10, 3, 10),
        point("as good, slower", 10, 4, 10),
        point("as fast, worse", 10, 3, 12),
        point("best", 20, 9, 5),
    ]
    assert names(front(points)) == ["fast", "middle", "best"]


def test_without_a_significant_difference_both_are_on_the_front() -> None:
    points = [point("one", 10, 1.0, 5.0), point("other", 10, 1.0, 5.05, seed=1)]
    assert names(front(points)) == ["one", "other"]
    assert front([]) == ()


def test_a_point_off_the_front_drops_nobody() -> None:
    # By intervals: `first` beats `second` by latency, `second` beats `third` by FID, and `first` does not beat `third`.
    def plain(name: str, latency: tuple[float, float], fid: tuple[float, float]) -> Point:
        estimate = Estimate(sum(latency) / 2, *latency, 10)
        return Point(name, 10, estimate, Figure(sum(fid) / 2, *fid, 100, "real images", "lower", ()))

    first = plain("first", (1.0, 1.4), (5, 9))
    second = plain("second", (1.5, 1.9), (5, 6))
    third = plain("third", (1.2, 1.8), (7, 8))
    assert compared(first, second) == (-1, 0)
    assert compared(second, third) == (0, -1)
    assert compared(first, third) == (0, 0)
    assert names(front([second, third])) == ["second"]
    assert names(front([first, second, third])) == ["first", "third"]


def test_points_that_beat_one_another_in_a_circle_all_stay() -> None:
    def ring(name: str, replicates: list[float]) -> Point:
        figure_ = Figure(1.0, 0.0, 2.0, 100, "real images", "lower", tuple(replicates))
        return Point(name, 10, Estimate(1.0, 1.0, 1.0, 5), figure_)

    # Latencies by round, each pair of points with rounds of its own in common.
    rounds = {"a": {1: 1.0, 3: 2.0}, "b": {1: 2.0, 2: 1.0}, "c": {2: 2.0, 3: 1.0}}
    points = [dataclasses.replace(ring(name, [1.0] * 5), rounds=taken) for name, taken in rounds.items()]
    assert [compared(points[i], points[(i + 1) % 3])[0] for i in range(3)] == [-1, -1, -1]
    assert names(front(points)) == ["a", "b", "c"]


place = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(0, 3))


def placed(places: Sequence[tuple[int, int, int]]) -> list[Point]:
    return [point(f"p{i}", 10, 1.1**x, float(y), 0.3, seed) for i, (x, y, seed) in enumerate(places)]


@settings(max_examples=25)
@given(st.lists(place, min_size=1, max_size=6), st.randoms(use_true_random=False), st.integers(-6, 6))
def test_neither_order_nor_unit_changes_the_front(places: list[tuple[int, int, int]], random, power: int) -> None:
    points = placed(places)
    expected = set(names(front(points)))
    assert expected
    shuffled = random.sample(points, len(points))
    assert names(front(shuffled)) == [each.subject for each in shuffled if each.subject in expected]
    unit = 2.0**power
    scaled = [measured(p.subject, 10, {r: t * unit for r, t in p.rounds.items()}, p.fid) for p in points]
    assert set(names(front(scaled))) == expected


@settings(max_examples=25)
@given(st.lists(place, min_size=1, max_size=6), st.integers(0, 5), st.booleans())
def test_a_point_that_the_front_beats_changes_nothing(
    places: list[tuple[int, int, int]], which: int, slower: bool
) -> None:
    points = placed(places)
    expected = front(points)
    model = expected[which % len(expected)]
    rounds = {r: t * (1.3 if slower else 1.0) for r, t in model.rounds.items()}
    fid = dataclasses.replace(model.fid, replicates=tuple(r + (not slower) for r in model.fid.replicates))
    worse = measured("worse", 10, rounds, fid)
    assert sorted(compared(model, worse)) == [-1, 0]
    assert front([*points, worse]) == expected
    assert front([worse, *points]) == expected


# --- curves -----------------------------------------------------------------------------------------------------------


def falling(level: float, slope: float = 4.0) -> Curve:
    """Return a FID that is linear in log latency, as the curves between their points: `level` at 100 ms."""
    return lambda latency_s: level - slope * math.log(latency_s / 0.1)


def test_a_slim_curve_below_dominates() -> None:
    slim, base = curve("slim", 0.01, falling(8)), curve("base", 0.02, falling(10))
    found = compare_curves(slim, base)
    assert found.kind == "dominates"
    assert (found.from_s, found.to_s) == pytest.approx((0.1, 0.5))
    assert found.difference is not None
    assert found.difference.value == pytest.approx(-2, abs=0.1)
    assert found.difference.low < -2 < found.difference.high < 0


def test_the_other_way_round_it_is_dominated() -> None:
    slim, base = curve("slim", 0.01, falling(10)), curve("base", 0.02, falling(8))
    assert compare_curves(slim, base).kind == "is dominated"
    assert compare_curves(base, slim).kind == "dominates"


@pytest.mark.parametrize("below", [True, False])
def test_curves_that_cross_have_a_range_each(below: bool) -> None:
    flat, steep = falling(10, slope=1), falling(10 + 3 * math.log(2), slope=4)  # they meet at 200 ms
    slim, base = curve("slim", 0.01, flat if below else steep), curve("base", 0.02, steep if below else flat)
    found = compare_curves(slim, base)
    assert (found.kind, found.below) == ("ranges", below)
    assert found.crossing_s == pytest.approx(0.2, rel=0.03)


def test_the_same_curve_at_half_the_step_is_no_difference() -> None:
    # A model that is twice as fast and needs twice the steps has bought nothing.
    found = compare_curves(curve("slim", 0.01, falling(9), seed=1), curve("base", 0.02, falling(9), seed=2))
    assert found.kind == "no difference"
    assert found.difference is not None
    assert found.difference.holds(0.0)


def test_curves_that_are_better_by_turns() -> None:
    def wave(latency_s: float) -> float:
        return 9 + 3 * (0.15 < latency_s < 0.3)

    found = compare_curves(curve("slim", 0.01, wave), curve("base", 0.01, lambda _: 10))
    assert found.kind == "mixed"


def test_nothing_is_extrapolated() -> None:
    slim, base = curve("slim", 0.001, falling(5)), curve("base", 0.02, falling(8))
    found = compare_curves(slim, base)
    assert (found.kind, found.below) == ("apart", True)
    assert (found.from_s, found.to_s) == pytest.approx((0.05, 0.1))
    assert (compare_curves(base, slim).kind, compare_curves(base, slim).below) == ("apart", False)


def test_one_number_of_steps_is_compared_within_the_other_curve() -> None:
    base = [point("base", 12, 0.12, 8), point("base", 20, 0.2, 6)]
    middle = math.sqrt(0.12 * 0.2)  # half-way in log latency: FID 7
    found = compare_curves([point("slim", 20, middle, 6)], base)
    assert found.kind == "dominates"
    assert found.from_s == found.to_s == pytest.approx(middle)
    assert found.difference is not None
    assert found.difference.value == pytest.approx(-1)


def test_curves_that_just_fail_to_meet_are_compared_there() -> None:
    def alone(each: Point) -> Point:
        value = each.latency_s.value
        return dataclasses.replace(each, latency_s=Estimate(value, 0.99 * value, 1.01 * value, 9), rounds={})

    base = [alone(point("base", 12, 0.1201, 8)), alone(point("base", 20, 0.2, 6))]
    found = compare_curves([alone(point("slim", 20, 0.12, 9))], base)
    assert found.kind == "is dominated"
    assert found.from_s == pytest.approx(0.12, rel=1e-3)
    assert found.difference is not None
    assert found.difference.value == pytest.approx(1)
    assert compare_curves([alone(point("slim", 20, 0.11, 9))], base).kind == "apart"


def test_fid_of_other_samples_is_not_compared() -> None:
    slim = curve("slim", 0.01, falling(8))
    base = curve("base", 0.02, falling(10))
    base[2] = dataclasses.replace(base[2], fid=dataclasses.replace(base[2].fid, count=10))
    assert compare_curves(slim, base).kind == "unpaired"
    bare = [dataclasses.replace(p, fid=dataclasses.replace(p.fid, replicates=())) for p in slim]
    assert compare_curves(bare, bare).kind == "unpaired"


@settings(max_examples=15)
@given(st.integers(6, 12), st.permutations(range(4)), st.integers(-5, 5))
def test_neither_order_nor_unit_changes_the_comparison(level: int, order: list[int], power: int) -> None:
    slim, base = curve("slim", 0.01, falling(9)), curve("base", 0.02, falling(level, slope=2), seed=1)
    expected, unit = compare_curves(slim, base), 2.0**power
    assert compare_curves([slim[i] for i in order], [base[i] for i in order]) == expected

    def scaled(points: Sequence[Point]) -> list[Point]:
        return [measured(p.subject, 1, {r: t * unit for r, t in p.rounds.items()}, p.fid) for p in points]

    found = compare_curves(scaled(slim), scaled(base))
    assert (found.kind, found.below) == (expected.kind, expected.below)
    assert found.at_s == pytest.approx(expected.at_s * unit)


def test_two_models_of_one_curve_differ_about_as_rarely_as_it_says() -> None:
    # Each experiment measures both curves anew: errors of the points as large as their replicates say.
    generator = np.random.default_rng(0)

    def experiment() -> str:
        def noisy(subject: str, step_s: float) -> list[Point]:
            found = []
            for n in STEPS:
                fid = falling(9)(n * step_s) + generator.normal(0, 0.3)
                replicates = tuple((fid + generator.normal(0, 0.3, 200)).tolist())
                figure_ = Figure(fid, fid - 0.6, fid + 0.6, 1000, "real images", "lower", replicates)
                latency = n * step_s
                found.append(Point(subject, n, Estimate(latency, latency, latency, 1), figure_))
            return found

        return compare_curves(noisy("slim", 0.01), noisy("base", 0.02)).kind

    kinds = [experiment() for _ in range(200)]
    assert 0.89 <= kinds.count("no difference") / len(kinds) <= 0.99


# --- words ------------------------------------------------------------------------------------------------------------


def test_the_verdict_is_one_sentence_for_every_kind() -> None:
    slim, base = curve("slim", 0.01, falling(8)), curve("base", 0.02, falling(10))
    same = curve("base", 0.02, falling(8), seed=1)
    flat, steep = falling(10, slope=1), falling(10 + 3 * math.log(2), slope=4)
    crossing = curve("slim", 0.01, flat), curve("base", 0.02, steep)
    cases = {
        r"slim dominates base with fewer steps: from 100 ms to 500 ms its FID is nowhere significantly worse, and at "
        r"\d+ ms it is lower by 2\S* \[1\.\S+, 2\.\S+\]": (slim, base),
        r"base is dominated by slim with fewer steps: from 100 ms to 500 ms .* nowhere significantly better, and at "
        r"\d+ ms it is higher by 2\S* \[1\.\S+, 2\.\S+\]": (base, slim),
        r"each has its range: slim is better below (19|20)\d ms, base with fewer steps above "
        r"\(compared from 100 ms to 500 ms\)": crossing,
        r"each has its range: base is better above (19|20)\d ms, slim with fewer steps below .*": crossing[::-1],
        r"slim and base with fewer steps show no significant difference in FID at equal latency, "
        r"from 100 ms to 500 ms": (slim, same),
        r"slim and fast share no latency: fast ends at 5 ms and slim begins at 50 ms; measure slim with fewer steps or "
        r"fast with more": (slim, curve("fast", 0.0001, falling(8))),
        r"slim and base with fewer steps cannot be compared: their FID is not of the same samples": (
            slim,
            [dataclasses.replace(p, fid=figure(p.fid.value, 0.1, resamples=7)) for p in base],
        ),
        r"slim dominates base with fewer steps: at 200 ms its FID is lower by 1\S* \[\S+, \S+\]": (
            [point("slim", 20, 0.2, 8)],
            [point("base", 5, 0.1, 9), point("base", 20, 0.4, 9)],
        ),
    }
    for words, (ours, theirs) in cases.items():
        found = verdict(compare_curves(ours, theirs), ours[0].subject, theirs[0].subject, "ort")
        assert re.fullmatch(rf"In ort, {words}\.", found), found


# --- the fair number of steps -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base_step_s", "slim_latency_s", "overhead_s", "steps", "expected"),
    [
        (0.01, 0.12, 0.0, 20, 12),
        (0.1, 0.6, 0.3, 20, 3),  # 0.6 - 0.3 is a little less than 3 * 0.1 in floating point
        (0.01, 0.129, 0.0, 20, 12),  # no more time than the slim model has
        (0.01, 0.129, 0.05, 20, 7),
        (0.01, 0.005, 0.0, 20, 1),
        (0.01, 0.12, 0.5, 20, 1),
        (0.01, 0.9, 0.0, 20, 20),  # a slim model that is slower gives nothing to spare
    ],
)
def test_the_steps_that_fit(
    base_step_s: float, slim_latency_s: float, overhead_s: float, steps: int, expected: int
) -> None:
    assert equal_latency_steps(base_step_s, slim_latency_s, overhead_s, steps) == expected
