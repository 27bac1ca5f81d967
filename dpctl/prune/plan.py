"""Scores + target -> PruningPlan: which channels stay. Pure: no model, no torch.

The paper's selection: the worst channels go independently inside each GroupNorm group, an equal number in each
(Diff-Pruning's reference code with Torch-Pruning 1.3.1). A width is therefore a multiple of the norm groups, and of
`align` where that is wanted: a staircase, over which a MACs or parameter target is searched.
"""

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from dpctl.errors import DpctlError


@dataclass(frozen=True)
class Span:
    """The channels of one group as planning sees them: `width` channels in `segments` equal contiguous parts."""

    name: str
    width: int
    segments: int

    def step(self, align: int) -> int:
        """Return the granularity of this group's width; its full width is allowed whether or not a multiple."""
        return math.lcm(self.segments, align)

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
    """What one layer costs: MACs = positions * kernel * in * out, parameters = kernel * in * out + vectors * out."""

    name: str
    positions: int
    kernel: int
    inputs: Side
    outputs: Side
    vectors: int

    def macs(self, widths: Mapping[str, int]) -> int:
        return self.positions * self.kernel * self.inputs.width(widths) * self.outputs.width(widths)

    def params(self, widths: Mapping[str, int]) -> int:
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

    def cost(self, measure: str, widths: Mapping[str, int]) -> int:
        """Return the whole network's ``"macs"`` or ``"params"`` at these widths."""
        return sum(getattr(layer, measure)(widths) for layer in self.layers)


@dataclass(frozen=True)
class PruningPlan:
    """Group name -> the channels that stay, ascending."""

    keep: Mapping[str, tuple[int, ...]]

    def widths(self) -> dict[str, int]:
        """Return group name -> number of channels that stay."""
        return {name: len(channels) for name, channels in self.keep.items()}


def width_at(span: Span, ratio: float, align: int) -> int:
    """Return the width that a ratio leaves: floor(ratio * part) channels go from each part, then up to the step."""
    part = span.width // span.segments
    # 1e-9: 0.3 * 10 must count as 3, whatever its last bit says.
    left = span.segments * (part - math.floor(ratio * part + 1e-9))
    step = span.step(align)
    return min(span.width, max(step, math.ceil(left / step) * step))


def uniform(network: Network, ratio: float, align: int) -> dict[str, int]:
    """Return the width of every group at one ratio for all."""
    return {span.name: width_at(span, ratio, align) for span in network.spans}


def widths_for_target(
    network: Network, scores: Mapping[str, Sequence[float]], measure: str, budget: float, align: int
) -> dict[str, int]:
    """Return widths whose cost (``"macs"`` or ``"params"``) is at most `budget`, and near it.

    First the smallest uniform ratio that meets the target; then, as its staircase is coarse, single steps are given
    back where they return the most importance for their cost, as long as the target holds.
    """
    whole = network.cost(measure, network.full())
    if whole <= budget:
        raise DpctlError(
            "the model meets the target already", f"{measure} {whole} of {budget:.0f}", "ask for a smaller target"
        )
    ratios = sorted(
        {0.0} | {k / n for n in {span.width // span.segments for span in network.spans} for k in range(n + 1)}
    )
    fitting = next((r for r in ratios if network.cost(measure, uniform(network, r, align)) <= budget), None)
    if fitting is None:
        floor = network.cost(measure, uniform(network, 1.0, align))
        raise DpctlError(
            "the target cannot be reached",
            f"{measure} {budget:.0f} of {whole}; the floor with align {align} is {floor} ({floor / whole:.3f})",
            "ask for more than the floor, or lower --align",
        )
    widths = uniform(network, fitting, align)
    return _give_back(network, scores, measure, budget, align, widths)


def _give_back(
    network: Network,
    scores: Mapping[str, Sequence[float]],
    measure: str,
    budget: float,
    align: int,
    widths: dict[str, int],
) -> dict[str, int]:
    """Widen single groups by single steps, the most importance per cost first, within the budget."""
    cost = network.cost(measure, widths)
    heap = [entry for span in network.spans if (entry := _step_up(network, scores, measure, align, widths, cost, span))]
    heapq.heapify(heap)
    spans = {span.name: span for span in network.spans}
    while heap:
        _, name, wider = heapq.heappop(heap)
        new_cost = network.cost(measure, widths | {name: wider})
        if new_cost > budget:
            continue  # too dear now, and dearer later: every other width only grows
        widths, cost = widths | {name: wider}, new_cost
        if entry := _step_up(network, scores, measure, align, widths, cost, spans[name]):
            heapq.heappush(heap, entry)
    return widths


def _step_up(
    network: Network,
    scores: Mapping[str, Sequence[float]],
    measure: str,
    align: int,
    widths: Mapping[str, int],
    cost: int,
    span: Span,
) -> tuple[float, str, int] | None:
    """Return (minus importance per cost, group, wider width) of the group's next step, or None at full width."""
    wider = span.wider(widths[span.name], align)
    if wider == widths[span.name]:
        return None
    values = scores[span.name]
    whole = sum(values) or 1.0
    gained = sum(values[i] for i in best(span, values, wider)) - sum(
        values[i] for i in best(span, values, widths[span.name])
    )
    added = network.cost(measure, dict(widths) | {span.name: wider}) - cost
    return -(gained / whole) / max(1, added), span.name, wider


def best(span: Span, scores: Sequence[float], width: int) -> tuple[int, ...]:
    """Return the `width` best channels, equally many from each part, ascending; ties go to the lower index."""
    part, quota = span.width // span.segments, width // span.segments
    kept: list[int] = []
    for start in range(0, span.width, part):
        ranked = sorted(range(start, start + part), key=lambda channel: (-scores[channel], channel))
        kept += ranked[:quota]
    return tuple(sorted(kept))


def select(network: Network, scores: Mapping[str, Sequence[float]], widths: Mapping[str, int]) -> PruningPlan:
    """Return the plan that keeps the best-scored channels at these widths. Raises a DpctlError on NaN scores."""
    for span in network.spans:
        if not all(math.isfinite(value) for value in scores[span.name]):
            raise DpctlError(
                "the importance of a group is not finite",
                f"group {span.name}",
                "the model or the data holds NaN or Inf: check the weights, or use another criterion",
            )
    return PruningPlan({span.name: best(span, scores[span.name], widths[span.name]) for span in network.spans})
