"""The plan: which widths are allowed, which channels stay, and how a target is met."""

import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from dpctl.errors import DpctlError
from dpctl.prune.plan import Layer, Network, Side, Span, as_option, best, select, uniform, width_at, widths_for_target

in_parts = st.builds(
    lambda segments, part: Span("a", segments * part, segments),
    st.sampled_from([1, 2, 3, 4, 8, 32]),
    st.integers(1, 12),
)
in_blocks = st.builds(
    lambda block, number: Span("a", block * number, 1, block=block), st.sampled_from([2, 3, 8, 40]), st.integers(1, 12)
)
spans = in_parts | in_blocks
aligns = st.sampled_from([1, 2, 3, 8, 16])
ratios = st.floats(0.0, 1.0)
measures = st.sampled_from(["macs", "params", "channels"])
scopes = st.sampled_from(["local", "global"])


@st.composite
def networks(draw: st.DrawFn) -> Network:
    """A chain of layers, each from one group to the next, with a skip connection now and then and a norm each."""
    drawn = draw(st.lists(spans, min_size=1, max_size=4))
    groups = [replace(span, name=f"g{i}") for i, span in enumerate(drawn)]
    layers, before = [], Side(draw(st.integers(1, 4)))
    for i, span in enumerate(groups):
        here = Side(0, {span.name: 1})
        layers.append(Layer(f"conv{i}", draw(st.integers(1, 64)), draw(st.sampled_from([1, 9])), before, here, 1))
        layers.append(Layer(f"norm{i}", 0, 0, Side(0), here, 2))
        skipped = draw(st.sampled_from([None, *(s.name for s in groups[: i + 1])]))
        repeats = {span.name: 1}
        if skipped is not None:
            repeats[skipped] = repeats.get(skipped, 0) + 1
        before = Side(0, repeats)
    layers.append(Layer("out", draw(st.integers(1, 64)), 9, before, Side(3), 1))
    return Network(tuple(groups), tuple(layers))


@st.composite
def scored(draw: st.DrawFn) -> tuple[Network, dict[str, list[float]]]:
    network = draw(networks())
    value = st.floats(0.0, 10.0)
    return network, {
        span.name: draw(st.lists(value, min_size=span.width, max_size=span.width)) for span in network.spans
    }


def allowed(span: Span, width: int, align: int) -> bool:
    step = math.lcm(span.segments, span.block, align)
    return width == span.width or (0 < width < span.width and width % step == 0)


# --- widths ------------------------------------------------------------------------------------------------------


@given(spans, ratios, aligns)
def test_a_width_is_a_multiple_of_segments_and_alignment_or_the_full_one(span: Span, ratio: float, align: int) -> None:
    assert allowed(span, width_at(span, ratio, align), align)


@given(spans, ratios, ratios, aligns)
def test_a_larger_ratio_never_leaves_more(span: Span, one: float, other: float, align: int) -> None:
    low, high = sorted((one, other))
    assert width_at(span, high, align) <= width_at(span, low, align)


@given(spans, aligns)
def test_ratio_zero_keeps_everything(span: Span, align: int) -> None:
    assert width_at(span, 0.0, align) == span.width


@given(spans, st.integers(0, 99), aligns)
def test_no_more_goes_than_was_asked(span: Span, percent: int, align: int) -> None:
    # In whole numbers: no rounding of the test's own.
    assert 100 * (span.width - width_at(span, percent / 100, align)) <= percent * span.width


@pytest.mark.parametrize(
    ("width", "segments", "ratio", "align", "left"),
    [
        (128, 32, 0.3, 1, 96),  # the paper's CIFAR-10 network: a quarter goes from 32 norm groups of 4 ...
        (256, 32, 0.3, 1, 192),  # ... and of 8
        (512, 1, 0.3, 1, 359),  # its time embedding follows the raw ratio
        (512, 1, 0.3, 8, 360),
        (256, 1, 0.3, 16, 192),
        (10, 1, 0.3, 1, 7),  # 0.3 * 10 is 3, whatever floating point says
        (100, 1, 0.29, 1, 71),
        (12, 4, 0.5, 8, 8),  # lcm(4, 8) = 8
        (24, 8, 0.9, 16, 16),  # lcm(8, 16) = 16: nothing below
        (4, 4, 0.9, 8, 4),  # one step is more than there is
    ],
)
def test_the_staircase(width: int, segments: int, ratio: float, align: int, left: int) -> None:
    assert width_at(Span("a", width, segments), ratio, align) == left


@pytest.mark.parametrize(
    ("width", "block", "ratio", "align", "left"),
    [
        (320, 40, 0.3, 8, 240),  # two of eight heads
        (320, 40, 0.3, 16, 240),  # lcm(40, 16) = 80: two heads at a time
        (120, 40, 0.9, 16, 80),
        (40, 40, 0.9, 8, 40),  # the last one stays
        (60, 12, 0.5, 1, 36),  # 30 and up to whole blocks
    ],
)
def test_the_staircase_of_blocks(width: int, block: int, ratio: float, align: int, left: int) -> None:
    assert width_at(Span("a", width, 1, block=block), ratio, align) == left


# --- choosing ----------------------------------------------------------------------------------------------------


@given(scored(), ratios, aligns)
def test_equally_many_channels_stay_in_each_segment_and_they_are_its_best(
    drawn: tuple[Network, dict[str, list[float]]], ratio: float, align: int
) -> None:
    network, scores = drawn
    widths = uniform(network, ratio, align)
    plan = select(network, scores, widths)
    assert plan.widths() == widths
    for span in network.spans:
        kept, part = plan.keep[span.name], span.width // span.segments
        assert list(kept) == sorted(set(kept))
        if span.block > 1:
            continue
        for start in range(0, span.width, part):
            inside = [c for c in kept if start <= c < start + part]
            gone = [c for c in range(start, start + part) if c not in inside]
            assert len(inside) == widths[span.name] // span.segments
            values = scores[span.name]
            assert min(values[c] for c in inside) >= max((values[c] for c in gone), default=0.0)


@given(in_blocks, ratios, st.data())
def test_blocks_stay_whole_and_those_of_the_largest_sums_stay(span: Span, ratio: float, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.integers(0, 9), min_size=span.width, max_size=span.width))
    blocks = [range(start, start + span.block) for start in range(0, span.width, span.block)]
    kept = best(span, values, width_at(span, ratio, 1))
    staying = [block for block in blocks if block[0] in kept]
    assert kept == tuple(channel for block in staying for channel in block)
    sums = {block: sum(values[channel] for channel in block) for block in blocks}
    gone = [sums[block] for block in blocks if block not in staying]
    assert min(sums[block] for block in staying) >= max(gone, default=0)


@given(in_parts, st.data())
def test_permuting_the_channels_of_a_segment_permutes_the_choice(span: Span, data: st.DataObject) -> None:
    part = span.width // span.segments
    values = data.draw(st.permutations(range(span.width)))  # all different: no ties
    order = [start + i for start in range(0, span.width, part) for i in data.draw(st.permutations(range(part)))]
    width = span.segments * data.draw(st.integers(1, part))
    permuted = best(span, [values[i] for i in order], width)
    assert sorted(order[i] for i in permuted) == list(best(span, values, width))


def test_ties_go_to_the_lower_index() -> None:
    assert best(Span("a", 6, 2), [1.0] * 6, 4) == (0, 1, 3, 4)
    assert best(Span("a", 6, 1, block=2), [1.0] * 6, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_refused(bad: float) -> None:
    network = Network((Span("a", 2, 1),), ())
    with pytest.raises(DpctlError, match="not finite.*\n.*group a"):
        select(network, {"a": [1.0, bad]}, {"a": 1})


# --- targets -----------------------------------------------------------------------------------------------------


@given(networks(), ratios, ratios, aligns, measures)
def test_cost_falls_with_the_ratio(network: Network, one: float, other: float, align: int, measure: str) -> None:
    low, high = sorted((one, other))
    assert network.cost(measure, uniform(network, high, align)) <= network.cost(measure, uniform(network, low, align))


@given(scored(), st.floats(0.01, 0.999), aligns, measures, scopes, st.booleans())
def test_a_target_is_met_and_nothing_more_fits(
    drawn: tuple[Network, dict[str, list[float]]],
    fraction: float,
    align: int,
    measure: str,
    scope: str,
    comparable: bool,
) -> None:
    network, scores = drawn
    budget = fraction * network.cost(measure, network.full())
    assume(network.cost(measure, uniform(network, 1.0, align)) <= budget)
    widths = widths_for_target(network, scores, measure, budget, align, scope=scope, comparable=comparable)
    assert network.cost(measure, widths) <= budget
    for span in network.spans:
        assert allowed(span, widths[span.name], align)
        wider = span.wider(widths[span.name], align)
        assert wider == widths[span.name] or network.cost(measure, widths | {span.name: wider}) > budget


@given(scored(), st.floats(0.01, 0.999), aligns, measures, scopes)
def test_a_target_is_reached_exactly_when_the_floor_allows(
    drawn: tuple[Network, dict[str, list[float]]], fraction: float, align: int, measure: str, scope: str
) -> None:
    network, scores = drawn
    whole, floor = (network.cost(measure, uniform(network, ratio, align)) for ratio in (0.0, 1.0))
    if fraction * whole >= floor:
        widths_for_target(network, scores, measure, fraction * whole, align, scope=scope)
        return
    with pytest.raises(DpctlError, match=f"cannot be reached\n.*the floor with align {align} is {floor} "):
        widths_for_target(network, scores, measure, fraction * whole, align)


def two_groups(first: int, second: int) -> Network:
    """Two independent layers of 8 channels each; a channel of them costs `first` and `second` MACs."""
    sides = {name: Side(0, {name: 1}) for name in "ab"}
    layers = (Layer("a", first, 1, Side(1), sides["a"], 0), Layer("b", second, 1, Side(1), sides["b"], 0))
    return Network((Span("a", 8, 1), Span("b", 8, 1)), layers)


EVEN = [1.0] * 8


@pytest.mark.parametrize(
    ("network", "scores", "budget", "widths"),
    [
        # Five of each fit, and one more: of the group whose sixth matters more ...
        (two_groups(1, 1), {"a": [9.0] * 5 + [1.0] * 3, "b": [9.0] * 6 + [1.0] * 2}, 11, {"a": 5, "b": 6}),
        # ... of the one where they are cheaper ...
        (two_groups(2, 1), {"a": EVEN, "b": EVEN}, 14, {"a": 4, "b": 6}),
        # ... and of the other where the cheaper one is full.
        (two_groups(4, 1), {"a": EVEN, "b": EVEN}, 38, {"a": 7, "b": 8}),
    ],
)
def test_what_is_left_goes_where_it_is_worth_most(
    network: Network, scores: Mapping[str, list[float]], budget: float, widths: dict[str, int]
) -> None:
    assert widths_for_target(network, scores, "macs", budget, 1, scope="local") == widths


@pytest.mark.parametrize(
    ("network", "scores", "budget", "widths"),
    [
        # The channels that matter least go, all from one group ...
        (two_groups(1, 1), {"a": [0.1 * i for i in range(8)], "b": EVEN}, 11, {"a": 3, "b": 8}),
        # ... but a dear channel goes before a cheap one that matters less.
        (two_groups(4, 1), {"a": EVEN, "b": [0.5] * 8}, 24, {"a": 4, "b": 8}),
        # What a last dear step saves beyond the target is given back in cheap ones.
        (two_groups(4, 1), {"a": EVEN, "b": [0.2] * 8}, 33, {"a": 8, "b": 1}),
    ],
)
def test_the_least_importance_per_cost_goes(
    network: Network, scores: Mapping[str, list[float]], budget: float, widths: dict[str, int]
) -> None:
    assert widths_for_target(network, scores, "macs", budget, 1) == widths


@given(scored(), st.floats(0.05, 0.95), st.sampled_from([1, 2, 8]), measures)
def test_taking_away_is_the_greedy_order_done_step_by_step(
    drawn: tuple[Network, dict[str, list[float]]], fraction: float, align: int, measure: str
) -> None:
    """The heap with values that age gives what valuing every step anew each time gives."""
    network, scores = drawn
    budget = fraction * network.cost(measure, network.full())
    assume(network.cost(measure, uniform(network, 1.0, align)) <= budget)
    widths = network.full()
    while network.cost(measure, widths) > budget:
        steps = []
        for span in network.spans:
            narrower = span.narrower(widths[span.name], align)
            if narrower < widths[span.name]:
                kept = [
                    math.fsum(scores[span.name][i] for i in best(span, scores[span.name], width))
                    for width in (widths[span.name], narrower)
                ]
                saved = network.cost(measure, widths) - network.cost(measure, widths | {span.name: narrower})
                steps.append(((kept[0] - kept[1]) / max(1, saved), span.name, narrower))
        _, name, narrower = min(steps)
        widths[name] = narrower
    found = widths_for_target(network, scores, measure, budget, align)
    assert all(found[name] >= width for name, width in widths.items())  # the rest was given back


@given(st.integers(1, 10**12), st.integers(1, 10**12), st.integers(1, 10**12), measures)
@example(31, 900, 1000, "macs")  # on a round figure
@example(500, 501, 1000, "macs")  # more digits than three, so as not to ask for the whole
@example(1, 10**12, 10**12, "channels")
def test_the_option_that_is_named_asks_for_enough_and_not_for_all(
    cost: int, whole: int, unpruned: int, measure: str
) -> None:
    cost, whole, unpruned = sorted((cost, whole, unpruned))
    said = as_option(measure, cost, whole, unpruned)
    if cost == whole:
        assert said == "nothing can go"
        return
    option, text = said.split()
    assert option == ("--ratio" if measure == "channels" else f"--target-{measure}")
    left = 1.0 - float(text) if measure == "channels" else float(text)
    assert cost <= left * unpruned < whole
    assert left * unpruned - cost <= (1e-3 + 1e-12) * unpruned


def test_a_target_that_the_model_meets_is_refused() -> None:
    with pytest.raises(DpctlError, match="meets the target already"):
        widths_for_target(two_groups(1, 1), {"a": EVEN, "b": EVEN}, "macs", 16, 1)


@given(scored(), st.floats(0.05, 0.95), st.sampled_from([1, 8]), st.floats(0.0, 0.9))
def test_of_each_group_the_floor_stays(
    drawn: tuple[Network, dict[str, list[float]]], fraction: float, align: int, floor: float
) -> None:
    network, scores = drawn
    budget = fraction * network.cost("macs", network.full())
    least = {span.name: width_at(span, 1.0 - floor, align) for span in network.spans}
    if network.cost("macs", least) > budget:
        with pytest.raises(DpctlError, match="cannot be reached"):
            widths_for_target(network, scores, "macs", budget, align, floor=floor)
        return
    widths = widths_for_target(network, scores, "macs", budget, align, floor=floor)
    assert all(width >= least[name] for name, width in widths.items())


def test_scores_that_do_not_compare_are_taken_as_shares_of_their_group() -> None:
    # By the numbers all of "a" would go first; by shares the last three of "b" matter least.
    scores = {"a": [0.1] * 8, "b": [9.0] * 5 + [1.0] * 3}
    network = two_groups(1, 1)
    assert widths_for_target(network, scores, "macs", 13, 1) == {"a": 5, "b": 8}
    assert widths_for_target(network, scores, "macs", 13, 1, comparable=False) == {"a": 8, "b": 5}
