"""Scores + target -> PruningPlan: which channels stay. Pure: no model, no torch.

The paper's selection: the worst channels go independently inside each GroupNorm group, an equal number in each
(Diff-Pruning's reference code with Torch-Pruning 1.3.1). A width is therefore a multiple of the norm groups (or of
their size, where whole ones go), and of `align` where that is wanted: a staircase. A ratio is one for all groups; a
MACs or parameter target is met by taking single steps of that staircase, in the order of importance per cost.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dpctl.errors import DpctlError, MetAlready, OutOfReach


@dataclass(frozen=True)
class Span:
    """The channels of one group as planning sees them: `width` channels in `segments` equal contiguous parts.

    `block` contiguous channels (a head, a norm group) stay or go together; where that is more than one, there is one
    segment. A width is a multiple of `unit` besides. Fractions are of the width `base` where that is given: the
    unpruned one. An `optional` group may go altogether, and goes with the groups that it is `within`; `removal` is the
    importance that is lost then beside its channels'.
    """

    name: str
    width: int
    segments: int
    unit: int = 1
    block: int = 1
    base: int | None = None
    optional: bool = False
    within: tuple[str, ...] = ()
    removal: float = 0.0

    @property
    def whole(self) -> int:
        """The width that fractions refer to."""
        return self.width if self.base is None else self.base

    def step(self, align: int) -> int:
        """Return the granularity of this group's width; its full width is allowed whether or not a multiple."""
        return math.lcm(self.segments, self.block, self.unit, align)

    def widths(self, align: int) -> tuple[int, ...]:
        """Return every allowed width, ascending."""
        step = self.step(align)
        return (*((0,) if self.optional else ()), *range(step, self.width, step), self.width)

    def narrower(self, width: int, align: int) -> int:
        """Return the next allowed width below `width`, or `width` itself where that is the last step."""
        step = self.step(align)
        if width > step:
            return max(step, (width - 1) // step * step)
        return 0 if self.optional else width

    def wider(self, width: int, align: int) -> int:
        """Return the next allowed width above `width`, or `width` itself where that is all there is."""
        return min(self.width, width + self.step(align))


@dataclass(frozen=True)
class Side:
    """The width of one side of a layer: `fixed` + sum over groups of `repeats[group]` * kept width."""

    fixed: int
    repeats: Mapping[str, int] = field(default_factory=dict)

    def width(self, widths: Mapping[str, int]) -> int:
        return self.fixed + sum(times * widths[group] for group, times in self.repeats.items())


@dataclass(frozen=True)
class Layer:
    """What one layer costs: MACs = positions * kernel * in * out, parameters = kernel * in * out + vectors * out.

    Nothing, where one of the groups that it `needs` is gone.
    """

    name: str
    positions: int
    kernel: int
    inputs: Side
    outputs: Side
    vectors: int
    needs: tuple[str, ...] = ()

    def is_gone(self, widths: Mapping[str, int]) -> bool:
        """Tell whether the branch that the layer is in is gone."""
        return any(widths[group] == 0 for group in self.needs)

    def macs(self, widths: Mapping[str, int]) -> int:
        if self.is_gone(widths):
            return 0
        return self.positions * self.kernel * self.inputs.width(widths) * self.outputs.width(widths)

    def params(self, widths: Mapping[str, int]) -> int:
        if self.is_gone(widths):
            return 0
        out = self.outputs.width(widths)
        return self.kernel * self.inputs.width(widths) * out + self.vectors * out


@dataclass(frozen=True)
class Network:
    """Everything a plan needs to know of a network."""

    spans: tuple[Span, ...]
    layers: tuple[Layer, ...]

    def full(self) -> dict[str, int]:
        """Return the unpruned width of every group."""
        return {span.name: span.width for span in self.spans}

    def alike(self) -> dict[str, list[float]]:
        """Return scores under which every channel is worth the same: only the number of them matters."""
        return {span.name: [1.0] * span.width for span in self.spans}

    def closed(self, widths: Mapping[str, int]) -> dict[str, int]:
        """Return the widths with those at 0, too, that are within a group that goes."""
        within = {span.name: span.within for span in self.spans}
        return {name: 0 if any(widths[outer] == 0 for outer in within[name]) else n for name, n in widths.items()}

    def inner_importance(self, name: str, scores: Mapping[str, Sequence[float]]) -> float:
        """Return the importance of everything that goes with a group, beside its own channels."""
        return math.fsum(math.fsum(scores[inner.name]) for inner in self.inside.get(name, ()))

    @cached_property
    def inside(self) -> dict[str, list[Span]]:
        """The groups within each group that may go with everything in it."""
        found: dict[str, list[Span]] = {}
        for span in self.spans:
            for outer in span.within:
                found.setdefault(outer, []).append(span)
        return found

    def cost(self, measure: str, widths: Mapping[str, int]) -> int:
        """Return the whole network's ``"macs"``, ``"params"`` or ``"channels"`` at these widths."""
        if measure == "channels":
            return sum(widths.values())
        return sum(getattr(layer, measure)(widths) for layer in self.layers)

    def change(self, measure: str, widths: Mapping[str, int], name: str, width: int) -> int:
        """Return what the cost grows by (or, negative, falls by) when group `name` takes another width."""
        if measure == "channels":
            return width - widths[name]
        changed = {**widths, name: width}
        return sum(
            getattr(layer, measure)(changed) - getattr(layer, measure)(widths) for layer in self._touched.get(name, ())
        )

    @cached_property
    def _touched(self) -> dict[str, list[Layer]]:
        touched: dict[str, list[Layer]] = {}
        for layer in self.layers:
            for name in {*layer.inputs.repeats, *layer.outputs.repeats, *layer.needs}:
                touched.setdefault(name, []).append(layer)
        return touched


@dataclass(frozen=True)
class PruningPlan:
    """Group name -> the channels that stay, ascending."""

    keep: Mapping[str, tuple[int, ...]]

    def widths(self) -> dict[str, int]:
        """Return group name -> number of channels that stay."""
        return {name: len(channels) for name, channels in self.keep.items()}


def width_at(span: Span, ratio: float, align: int) -> int:
    """Return the width that a ratio leaves: floor(ratio * part) channels go from each part, then up to the step."""
    part = span.whole // span.segments
    # 1e-9: 0.3 * 10 must count as 3, whatever its last bit says.
    left = span.segments * (part - math.floor(ratio * part + 1e-9))
    step = span.step(align)
    return min(span.width, max(step, math.ceil(left / step) * step))


def uniform(network: Network, ratio: float, align: int) -> dict[str, int]:
    """Return the width of every group at one ratio for all."""
    return {span.name: width_at(span, ratio, align) for span in network.spans}


def widths_for_target(
    network: Network,
    scores: Mapping[str, Sequence[float]],
    measure: str,
    budget: float,
    align: int,
    *,
    scope: str = "global",
    comparable: bool = True,
    floor: float = 0.0,
    unpruned: float | None = None,
) -> dict[str, int]:
    """Return widths whose cost (``"macs"``, ``"params"`` or ``"channels"``) is at most `budget`, and near it.

    `scope` ``"global"``: the steps with the least importance per cost go, from the full width on, whichever group they
    are in (Molchanov et al., ICLR 2017, charge a channel its cost likewise), but of each group the fraction `floor`
    stays. ``"local"``: every group starts from the smallest uniform ratio that meets the target. Either way single
    steps are given back while the target holds. `comparable` says that the scores of different groups are in one unit,
    as a Taylor criterion's are; where they are not, each group's are divided by their sum. `unpruned` is the cost that
    the user's fractions are of, where it is not this network's own.
    Raises a DpctlError for a target that is met already or out of reach, and for NaN scores.
    """
    check_finite(network, scores)
    least = {span.name: narrowest(span, floor if scope == "global" else 0.0, align) for span in network.spans}
    _check_reach(network, measure, budget, align, least, unpruned)
    if not comparable or scope == "local":
        scores = in_one_unit(scores)
    if scope == "global":
        widths = _take_away(network, scores, measure, budget, align, least)
    else:
        widths = _smallest_uniform(network, measure, budget, align)
    return _give_back(network, scores, measure, budget, align, widths)


def in_one_unit(scores: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    """Return scores of groups that are in no common unit as parts of each group's whole importance."""
    return {name: [value / (sum(values) or 1.0) for value in values] for name, values in scores.items()}


def narrowest(span: Span, floor: float, align: int) -> int:
    """Return the narrowest width that leaves the fraction `floor` of a group."""
    return width_at(span, 1.0 - floor, align) if floor else span.widths(align)[0]


def _check_reach(
    network: Network, measure: str, budget: float, align: int, least: Mapping[str, int], unpruned: float | None
) -> None:
    whole = network.cost(measure, network.full())
    if whole <= budget:
        share = f"{whole / (unpruned or whole):.3f} of the unpruned model's"
        raise MetAlready("the model meets the target already", f"{measure} {whole}, {share}", "ask for less than that")
    floor = network.cost(measure, least)
    if floor > budget:
        option = as_option(measure, floor, whole, unpruned or whole)
        raise OutOfReach(
            "the target cannot be reached",
            f"{measure} {budget:.0f} of {whole}; the floor with align {align} is {floor} ({option})",
            "ask for the floor or more, or lower --align or --floor",
            floor,
        )


def as_option(measure: str, cost: float, whole: float, unpruned: float) -> str:
    """Return the option that asks for just above a cost, in as few digits as leave it below the `whole` network's."""
    if cost >= whole:
        return "nothing can go"
    option, text = "", ""
    for digits in range(3, 16):
        above = (math.floor(cost / unpruned * 10**digits) + 1) / 10**digits
        option = "ratio" if measure == "channels" else f"target-{measure}"
        text = f"{1.0 - above if measure == 'channels' else above:.{digits}f}"
        left = 1.0 - float(text) if measure == "channels" else float(text)
        if cost <= left * unpruned < whole:
            break
    return f"--{option} {text}"


def _smallest_uniform(network: Network, measure: str, budget: float, align: int) -> dict[str, int]:
    ratios = sorted({k / n for n in {span.whole // span.segments for span in network.spans} for k in range(n + 1)})
    plans = (uniform(network, ratio, align) for ratio in ratios)
    return next(widths for widths in plans if network.cost(measure, widths) <= budget)


def _take_away(
    network: Network,
    scores: Mapping[str, Sequence[float]],
    measure: str,
    budget: float,
    align: int,
    least: Mapping[str, int],
) -> dict[str, int]:
    """Narrow single groups by single steps, the least importance per cost first, until the budget is met.

    What a step saves only shrinks as its neighbours narrow, and what it costs only grows as its own group does. A
    value in the heap is therefore never too high, and a step that is still the least when valued again is the least.
    """
    widths = network.full()
    cost = network.cost(measure, widths)
    spans = {span.name: span for span in network.spans}

    def step_down(span: Span) -> tuple[float, str, int] | None:
        narrower = span.narrower(widths[span.name], align)
        if narrower == widths[span.name] or narrower < least[span.name]:
            return None
        lost = _importance(network, span, scores, widths[span.name]) - _importance(network, span, scores, narrower)
        return lost / max(1, -network.change(measure, widths, span.name, narrower)), span.name, narrower

    heap = [entry for span in network.spans if (entry := step_down(span))]
    heapq.heapify(heap)
    while cost > budget:
        entry = heapq.heappop(heap)
        now = step_down(spans[entry[1]])
        if now is None or (heap and now > heap[0]):
            if now is not None:
                heapq.heappush(heap, now)
            continue
        _, name, narrower = now
        cost += network.change(measure, widths, name, narrower)
        widths[name] = narrower
        if (entry := step_down(spans[name])) is not None:
            heapq.heappush(heap, entry)
    return widths


def _give_back(
    network: Network,
    scores: Mapping[str, Sequence[float]],
    measure: str,
    budget: float,
    align: int,
    widths: dict[str, int],
) -> dict[str, int]:
    """Widen single groups by single steps, the most importance per cost first, within the budget."""
    widths = dict(widths)
    cost = network.cost(measure, widths)
    spans = {span.name: span for span in network.spans}

    def step_up(span: Span) -> tuple[float, str, int] | None:
        wider = span.wider(widths[span.name], align)
        if wider == widths[span.name]:
            return None
        gained = _importance(network, span, scores, wider) - _importance(network, span, scores, widths[span.name])
        return -gained / max(1, network.change(measure, widths, span.name, wider)), span.name, wider

    heap = [entry for span in network.spans if (entry := step_up(span))]
    heapq.heapify(heap)
    while heap:
        _, name, wider = heapq.heappop(heap)
        added = network.change(measure, widths, name, wider)
        if cost + added > budget:
            continue  # too dear now, and dearer later: every other width only grows
        widths[name], cost = wider, cost + added
        if entry := step_up(spans[name]):
            heapq.heappush(heap, entry)
    return widths


def _importance(network: Network, span: Span, scores: Mapping[str, Sequence[float]], width: int) -> float:
    """Return the importance that a group keeps at a width: what is within it goes with it, and is lost too."""
    if width == 0:
        return -network.inner_importance(span.name, scores) - span.removal
    values = scores[span.name]
    return math.fsum(values[channel] for channel in best(span, values, width))


def best(span: Span, scores: Sequence[float], width: int) -> tuple[int, ...]:
    """Return the `width` best channels, equally many from each part, ascending; ties go to the lower index.

    Where channels stay or go in blocks, the blocks with the largest sums are the best.
    """
    part, quota, block = span.width // span.segments, width // span.segments // span.block, span.block
    sums = scores if block == 1 else [math.fsum(scores[start : start + block]) for start in range(0, span.width, block)]
    kept: list[int] = []
    for start in range(0, span.width // block, part // block):
        ranked = sorted(range(start, start + part // block), key=lambda number: (-sums[number], number))
        kept += ranked[:quota]
    return tuple(number * block + channel for number in sorted(kept) for channel in range(block))


def select(network: Network, scores: Mapping[str, Sequence[float]], widths: Mapping[str, int]) -> PruningPlan:
    """Return the plan that keeps the best-scored channels at these widths; what is within a group that goes goes too.

    Raises a DpctlError on NaN scores.
    """
    check_finite(network, scores)
    widths = network.closed(widths)
    return PruningPlan({span.name: best(span, scores[span.name], widths[span.name]) for span in network.spans})


def check_finite(network: Network, scores: Mapping[str, Sequence[float]]) -> None:
    """Raise a DpctlError that names the first group with a score that is NaN or Inf."""
    for span in network.spans:
        if not all(math.isfinite(value) for value in scores[span.name]):
            raise DpctlError(
                "the importance of a group is not finite",
                f"group {span.name}",
                "the weights hold NaN or Inf, or are too large: check them, or use another criterion",
            )
