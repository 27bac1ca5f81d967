"""`--layout stock`: one width per level, so that the result is a plain diffusers class with its ordinary config.

Level 0 stays whole (the timestep's sinusoid has its width) and attention loses whole heads. Neighbouring levels of one
width share their residual stream and stay of one width. Which channels stay is still the criterion's choice, group by
group; only how many is one number for a whole level.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from dpctl.errors import DpctlError
from dpctl.models import build_unet
from dpctl.prune.groups import Groups
from dpctl.prune.plan import Network, Side, Span
from dpctl.pruned_unet import widths

# So many plans are priced in about a second.
COMBINATIONS = 20_000


@dataclass(frozen=True)
class Tie:
    """A group's width is `times` the width of its level."""

    level: str
    times: int


@dataclass(frozen=True)
class Levels:
    """How the groups of a network hang on the widths of its levels; `names` has one name for levels of one width."""

    config: dict[str, Any]
    names: tuple[str, ...]
    ties: dict[str, Tie]

    @property
    def full(self) -> dict[str, int]:
        """The unpruned width of every level by name."""
        return dict(zip(self.names, self.config["block_out_channels"], strict=True))

    def group_widths(self, chosen: Mapping[str, int]) -> dict[str, int]:
        """Return the width of every group, given those of the levels by name; level 0 stays."""
        new = self.full | dict(chosen)
        return {name: tie.times * new[tie.level] for name, tie in self.ties.items()}

    def stock_config(self, chosen: Mapping[str, int]) -> dict[str, Any]:
        """Return the stock config with these widths of the levels."""
        new = self.full | dict(chosen)
        return _with_widths(self.config, [new[name] for name in self.names])

    def expresses(self, unet: Any, chosen: Mapping[str, int]) -> bool:
        """Tell whether the stock class has the layers of `unet` at these widths.

        It leaves a shortcut's convolution out where the widths on both sides happen to be the same.
        """
        return set(on_meta(self.stock_config(chosen)).state_dict()) == set(unet.state_dict())


def find_levels(unet: Any, groups: Groups) -> Levels:
    """Find which level each group's width follows: widen one level of the config and see what grows with it.

    Raises a DpctlError for a network that is no stock one, or with a group that follows no single level.
    """
    if getattr(unet.config, "channels", None):
        raise DpctlError(
            "--layout stock needs an unpruned model", f"a {type(unet).__name__}", "prune the model it was made from"
        )
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    config["_class_name"] = type(unet).__name__
    names = _level_names(config["block_out_channels"])
    if len(set(names)) == 1:
        raise DpctlError(
            "--layout stock cannot narrow this model",
            f"every level has the width of level 0: {list(config['block_out_channels'])}",
            "use --layout free",
        )
    found: dict[str, Tie] = {}
    for level in dict.fromkeys(names):
        factor, wider = _widened(config, names, level)
        for group in groups.prunable:
            before, after = (widths(network.get_submodule(group.name))[-1] for network in (unet, wider))
            if after == before:
                continue
            width = dict(zip(names, config["block_out_channels"], strict=True))[level]
            if after != factor * before or group.width % width or group.name in found:
                raise _inexpressible(group.name, f"does not follow the width of {level} alone")
            found[group.name] = Tie(level, group.width // width)
    for group in groups.prunable:
        if group.name not in found:
            raise _inexpressible(group.name, "follows no level")
    return Levels(config, names, found)


def _level_names(full: Sequence[int]) -> tuple[str, ...]:
    """Return the name of every level; neighbours of one width have one name."""
    names: list[str] = []
    for level, width in enumerate(full):
        names.append(names[-1] if level and width == full[level - 1] else f"level {level}")
    return tuple(names)


def _widened(config: Mapping[str, Any], names: Sequence[str], level: str) -> tuple[int, nn.Module]:
    """Return a factor and the network in which one level is wider by it, with no new coincidence of widths."""
    full = config["block_out_channels"]
    factor = next(m for m in (2, 3, 5, 7, 11, 13, 17) if not {m * width for width in full} & set(full))
    new = [factor * width if name == level else width for name, width in zip(names, full, strict=True)]
    return factor, on_meta(_with_widths(config, new))


def tied(network: Network, scores: Mapping[str, Sequence[float]], levels: Levels) -> tuple[Network, dict[str, Any]]:
    """Return network and scores with the levels above 0 as the only groups.

    The score of a level's r-th channel is the sum over its groups of their r-th best: what keeping one more is worth.
    """
    spans, values = [], {}
    by_name = {span.name: span for span in network.spans}
    for level, width in levels.full.items():
        if level == levels.names[0]:
            continue
        members = {name: tie for name, tie in levels.ties.items() if tie.level == level}
        # A level's width must suit the parts of each of its groups and hold whole heads.
        unit = math.lcm(*(_unit(by_name[name], tie) for name, tie in members.items()))
        whole = max(by_name[name].whole // tie.times for name, tie in members.items())
        spans.append(Span(level, width, 1, unit, base=whole))
        ranked = {name: _ranked(scores[name], by_name[name].block) for name in members}
        values[level] = [
            math.fsum(sum(ranked[name][r * tie.times : (r + 1) * tie.times]) for name, tie in members.items())
            for r in range(width)
        ]
    layers = tuple(
        replace(layer, inputs=_tied_side(layer.inputs, levels), outputs=_tied_side(layer.outputs, levels))
        for layer in network.layers
    )
    return Network(tuple(spans), layers), values


def search(
    network: Network,
    scores: Mapping[str, Sequence[float]],
    price: Callable[[dict[str, int]], float],
    budget: float,
    align: int,
    expresses: Callable[[dict[str, int]], bool],
) -> dict[str, int]:
    """Return the widths of the levels that keep the most importance within the budget and that the class can have.

    `price` is what a network of these widths costs. Networks have few levels of different widths, so every combination
    is looked at. Raises `BelowFloor` where none fits.
    """
    while math.prod(len(span.widths(align)) for span in network.spans) > COMBINATIONS:
        align *= 2
    kept = {s.name: {w: math.fsum(scores[s.name][:w]) for w in s.widths(align)} for s in network.spans}
    combinations = [dict(zip(kept, found, strict=True)) for found in itertools.product(*kept.values())]
    costs = [price(found) for found in combinations]
    fitting = [found for found, cost in zip(combinations, costs, strict=True) if cost <= budget]
    fitting.sort(key=lambda found: -math.fsum(kept[name][width] for name, width in found.items()))
    chosen = next((found for found in fitting if expresses(found)), None)
    if chosen is None:
        by_cost = sorted(zip(costs, combinations, strict=True), key=lambda pair: pair[0])
        floor = next((cost for cost, found in by_cost if cost > budget and expresses(found)), costs[-1])
        raise BelowFloor(floor, costs[-1], align)
    return chosen


class BelowFloor(Exception):
    """No widths that the class can have are within a budget: `floor` is the least cost beyond it, of the `whole`."""

    def __init__(self, floor: float, whole: float, align: int) -> None:
        super().__init__(floor, whole, align)
        self.floor, self.whole, self.align = floor, whole, align


def _unit(span: Span, tie: Tie) -> int:
    """Return what a level's width must be a multiple of for this group."""
    step = span.step(1)
    return step // math.gcd(step, tie.times)


def _ranked(values: Sequence[float], block: int) -> list[float]:
    """Return a group's scores, best first; of heads, head by head."""
    blocks = [sorted(values[i : i + block], reverse=True) for i in range(0, len(values), block)]
    return [value for block in sorted(blocks, key=sum, reverse=True) for value in block]


def _tied_side(side: Side, levels: Levels) -> Side:
    fixed, repeats = side.fixed, dict[str, int]()
    for name, times in side.repeats.items():
        tie = levels.ties[name]
        if tie.level == levels.names[0]:
            fixed += times * tie.times * levels.full[tie.level]
        else:
            repeats[tie.level] = repeats.get(tie.level, 0) + times * tie.times
    return Side(fixed, repeats)


def _with_widths(config: Mapping[str, Any], new: Sequence[int]) -> dict[str, Any]:
    """Return a config with other widths of its levels and heads of the old width."""
    changed = {**config, "block_out_channels": list(new)}
    if config["_class_name"] == "UNet2DConditionModel":
        # There `attention_head_dim` is the number of heads (diffusers' issue 2011), one for all levels or one each.
        heads, old = config["attention_head_dim"], config["block_out_channels"]
        each = [heads] * len(old) if isinstance(heads, int) else heads
        changed["attention_head_dim"] = [
            max(1, width * n // before) for n, width, before in zip(each, new, old, strict=True)
        ]
    return changed


def on_meta(config: Mapping[str, Any]) -> nn.Module:
    """Build a stock network without weights."""
    with torch.device("meta"):
        return build_unet(dict(config))


def _inexpressible(name: str, why: str) -> DpctlError:
    return DpctlError("the stock config cannot express this cut", f"the group {name} {why}", "use --layout free")
