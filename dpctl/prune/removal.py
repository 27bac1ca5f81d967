"""What a branch is worth as a whole, measured: the sum of its channels' first-order scores says too little.

A first-order score says what the loss does where a channel changes a little. That ranks channels, and narrow cuts; it
is far below what the loss does when all of a branch goes. So each branch is taken out for once, on the same images,
noise and timesteps, and half of it for the exchange rate between loss and importance.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpctl import progress
from dpctl.prune.groups import Groups
from dpctl.prune.plan import Network, PruningPlan, Span, best
from dpctl.prune.probe import Probe
from dpctl.prune.surgery import kept_indices, slim

# Images and timesteps of a measurement.
IMAGES, TIMESTEPS = 16, 8


def with_removals(
    network: Network,
    unet: Any,
    groups: Groups,
    scores: Mapping[str, Sequence[float]],
    probe: Probe,
    align: int,
    bar: progress.Bar = progress.no_bar,
) -> Network:
    """Return the network whose branches lose, where they go, what the loss says beside the scores of their channels.

    Importance per loss is what half of every branch loses of both, over all of them together. `unet` stays.
    """

    def worth(name: str) -> float:
        return math.fsum(scores[name]) + network.inner_importance(name, scores)

    base = probe.loss(unet)
    by_name = {group.name: group for group in groups.prunable}
    optional = [span for span in network.spans if span.optional]
    rises: dict[str, float] = {}
    lost = risen = 0.0
    with bar("branches", 2 * len(optional)) as advance:
        for span in optional:
            half = best(span, scores[span.name], _half(span, align))
            lost += math.fsum(scores[span.name]) - math.fsum(scores[span.name][channel] for channel in half)
            for keep in (half, ()):
                alone = Groups((by_name[span.name],), {})
                cut = slim(unet, kept_indices(unet, alone, PruningPlan({span.name: keep})), whole=alone.whole)
                rises[span.name] = probe.loss(cut) - base
                risen += rises[span.name] if keep else 0.0
                advance(1, group=span.name)
    if risen <= 0.0 or lost <= 0.0:
        return network  # half of a branch does no harm: nothing is known beside the scores
    return replace(
        network,
        spans=tuple(
            replace(span, removal=max(0.0, rises[span.name] * lost / risen - worth(span.name)))
            if span.optional
            else span
            for span in network.spans
        ),
    )


def _half(span: Span, align: int) -> int:
    """Return the allowed width next to half of a group's, and not none."""
    return min((width for width in span.widths(align) if width), key=lambda width: abs(2 * width - span.width))
