"""MACs against milliseconds, layer by layer: what of the MAC saving became time, and which layers did not follow.

Two profiles of one forward pass, on the same backend and at the same batch size, are put side by side by module path.
Everything here is pure, and adds up: the layers, the others and what has no MACs are the whole pass and all its MACs.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from runtime.layers import JOINED, LayerTime

OTHER = "other"


@dataclass(frozen=True)
class Layer:
    """A module before and after pruning; MACs at batch 1.

    `followed` is the saved share of the time over the saved share of the MACs: 1 where the time followed them, None
    where no MACs were saved or no time was seen. `lost_s` is the time that would have been saved beyond that which was,
    had it followed.
    """

    name: str
    macs_before: int
    macs_after: int
    latency_before_s: float
    latency_after_s: float
    followed: float | None
    lost_s: float


@dataclass(frozen=True)
class Kind:
    """The time of one kind of operator, over all modules without MACs."""

    name: str
    latency_before_s: float
    latency_after_s: float


@dataclass(frozen=True)
class Comparison:
    """A candidate's layers beside the baseline's.

    `whole` is the pass: its `followed` is the share of the MAC saving that became time. `layers` have MACs, in the
    order in which they run; `other` has those that are not in both profiles, or not in both networks. `without_macs` is
    all else (norms, activations, resampling, concatenation, changes of layout), and `kinds` says what, the longest
    first.
    """

    whole: Layer
    layers: tuple[Layer, ...]
    other: Layer
    without_macs: Kind
    kinds: tuple[Kind, ...]

    @property
    def lagging(self) -> tuple[Layer, ...]:
        """The layers that did not follow, those that lost most time first."""
        lost = [layer for layer in self.layers if layer.followed is not None and layer.lost_s > 0]
        return tuple(sorted(lost, key=lambda layer: -layer.lost_s))


def compare(
    before: Iterable[LayerTime],
    after: Iterable[LayerTime],
    macs_before: Mapping[str, int],
    macs_after: Mapping[str, int],
) -> Comparison:
    """Return the layers of a candidate (`after`) beside those of the baseline, MACs by module path (`cost`)."""
    heavy = {name: max(macs_before.get(name, 0), macs_after.get(name, 0)) for name in {**macs_before, **macs_after}}
    times, kinds = zip(*(_split(profile, heavy) for profile in (before, after)), strict=True)
    shared = [name for name in times[0] if name in times[1] and name in macs_before and name in macs_after]
    sides = [(macs_before, times[0]), (macs_after, times[1])]
    apart = [name for name in heavy if name not in set(shared)]
    spent = [sum(each.values()) for each in kinds]
    whole = [sum(each.values()) + rest for each, rest in zip(times, spent, strict=True)]
    return Comparison(
        whole=_layer("whole", sum(macs_before.values()), sum(macs_after.values()), *whole),
        layers=tuple(_layer(name, macs_before[name], macs_after[name], *(t[name] for t in times)) for name in shared),
        other=_layer(
            OTHER,
            *(sum(macs.get(name, 0) for name in apart) for macs, _ in sides),
            *(sum(time.get(name, 0.0) for name in apart) for _, time in sides),
        ),
        without_macs=Kind("without MACs", *spent),
        kinds=_kinds(*kinds),
    )


def _split(profile: Iterable[LayerTime], heavy: Mapping[str, int]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the time by module with MACs, and by kind of what has none."""
    layers: dict[str, float] = {}
    kinds: dict[str, float] = {}
    for part in profile:
        # A kernel that does the work of several modules counts under the heaviest of them.
        name = max(part.name.split(JOINED), key=lambda each: heavy.get(each, 0))
        where, key = (layers, name) if heavy.get(name) else (kinds, part.kind)
        where[key] = where.get(key, 0.0) + part.latency_s
    return layers, kinds


def _layer(name: str, macs_before: int, macs_after: int, before_s: float, after_s: float) -> Layer:
    left = macs_after / macs_before if macs_before else 1.0
    seen = before_s > 0 and left < 1
    followed = (1 - after_s / before_s) / (1 - left) if seen else None
    return Layer(name, macs_before, macs_after, before_s, after_s, followed, after_s - before_s * left)


def _kinds(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[Kind, ...]:
    found = [Kind(name, before.get(name, 0.0), after.get(name, 0.0)) for name in {**before, **after}]
    return tuple(sorted(found, key=lambda kind: -max(kind.latency_before_s, kind.latency_after_s)))
