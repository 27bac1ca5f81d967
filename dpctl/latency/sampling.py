"""Which networks a latency model is learnt from: whole ones, stratified over sizes and widths of each group."""

from collections.abc import Sequence

import numpy as np

from dpctl.prune.plan import Network

# The smallest part of the widths that a network is asked to have, and how far its groups lie from one another.
NARROWEST, SPREAD = 0.2, 0.3
# The part of the networks in which a branch that may go is gone.
GONE = 0.1


def stratified(network: Network, count: int, seed: int, align: int = 1) -> list[dict[str, int]]:
    """Return the widths of `count` networks, a Latin hypercube over the groups around sizes that cover the range.

    Network i is about as wide as the i-th of `count` equal parts of the range says, and each group takes each part of
    its spread once over the networks (McKay, Beckman and Conover, Technometrics 21(2), 1979): every width of a group is
    seen beside wide and narrow ones of its neighbours. Each branch that may go is gone from a few of them.
    """
    generator = np.random.default_rng(seed)
    sizes = NARROWEST + (1.0 - NARROWEST) * (np.arange(count) + generator.random(count)) / count
    found: list[dict[str, int]] = [{} for _ in range(count)]
    for span in network.spans:
        offsets = SPREAD * (2 * (generator.permutation(count) + generator.random(count)) / count - 1)
        for widths, part in zip(found, np.clip(sizes + offsets, 0.0, 1.0), strict=True):
            widths[span.name] = nearest([width for width in span.widths(align) if width], part * span.width)
    for span in network.spans:
        for number in generator.permutation(count)[: round(GONE * count)] if span.optional else ():
            found[number][span.name] = 0
    found = [network.closed(widths) for widths in found]
    # Not from small to large: what is measured first should not be of one kind.
    return [found[number] for number in generator.permutation(count)]


def nearest(widths: Sequence[int], wanted: float) -> int:
    """Return the allowed width next to a wanted one."""
    return min(widths, key=lambda width: (abs(width - wanted), width))
