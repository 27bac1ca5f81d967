"""UNet -> coupled channel groups, from Torch-Pruning's DepGraph. The only file that imports torch_pruning.

DepGraph (Fang et al., CVPR 2023) traces which slices of which layers have to go together. Only its groups are used:
its selector averages the importance over norm groups, which is not the paper's (see plan.py).
"""

import math
import warnings
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dpctl.cost import example_inputs

OUT, IN = "out", "in"


@dataclass(frozen=True)
class Member:
    """One side of one module: position `index[j]` there belongs to channel `channel[j]` of the group."""

    module: str
    side: str
    index: tuple[int, ...]
    channel: tuple[int, ...]


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that live and die together.

    `name` is the module whose outputs they are, `width` their number. `segments` contiguous parts of equal size (norm
    groups, attention heads) must keep equal numbers of channels.
    """

    name: str
    width: int
    segments: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Groups:
    """All groups of a network, and those left alone: name -> reason."""

    prunable: tuple[ChannelGroup, ...]
    left_alone: dict[str, str]


def find_groups(unet: Any) -> Groups:
    """Trace `unet` and return its coupled channel groups in the order of the network's modules."""
    import torch_pruning

    order = {module: name for name, module in unet.named_modules()}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch_pruning.DependencyGraph()
        graph.build_dependency(unet, example_inputs(unet), output_transform=lambda output: output.sample, verbose=False)
        raw = list(graph.get_all_groups(ignored_layers=[], root_module_types=[nn.Conv2d, nn.Linear]))
    prunable, left_alone = [], {}
    for group in raw:
        name = order[group[0].dep.target.module]
        members, reason = _members(graph, group, order)
        width, segments = len(group[0].idxs), _segments(unet, members)
        if reason is None and not all(_evenly(member, width) for member in members):
            reason = "a layer has only some of its channels"  # scale and shift of one norm from one layer
        if reason is None and width % segments:
            reason = f"its width {width} is no multiple of {segments} norm groups or heads"
        if reason is None:
            prunable.append(ChannelGroup(name, width, segments, members))
        else:
            left_alone[name] = reason
    return Groups(tuple(prunable), left_alone)


def _members(graph: Any, group: Any, order: dict[Any, str]) -> tuple[tuple[Member, ...], str | None]:
    """Return a group's members, and the reason why it must be left alone, if there is one."""
    members = []
    for item in group:
        module = item.dep.target.module
        if module not in order:
            if isinstance(module, nn.Parameter):
                return (), "a bare parameter is coupled to it"
            continue  # concatenations, reshapes and other operations have no weights
        if order[module] == "conv_out" and graph.is_out_channel_pruning_fn(item.dep.handler):
            return (), "it is the network's output"
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.Embedding)):
            return (), f"a {type(module).__name__} is coupled to it"
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            return (), "a grouped convolution is coupled to it"
        side = OUT if graph.is_out_channel_pruning_fn(item.dep.handler) else IN
        members.append(Member(order[module], side, tuple(item.idxs), tuple(item.root_idxs)))
    return tuple(members), None


def _evenly(member: Member, width: int) -> bool:
    """Tell whether a member has every channel of the group, all equally often."""
    counts = Counter(member.channel)
    return len(counts) == width and len(set(counts.values())) == 1


def _segments(unet: Any, members: tuple[Member, ...]) -> int:
    """Return into how many equal parts the group's channels fall: norm groups, or heads of an attention."""
    parts = 1
    for member in members:
        module = unet.get_submodule(member.module)
        if isinstance(module, nn.GroupNorm):
            parts = math.lcm(parts, module.num_groups)
        if member.side == OUT and member.module.endswith((".to_q", ".to_k", ".to_v")):
            parts = math.lcm(parts, unet.get_submodule(member.module.rpartition(".")[0]).heads)
    return parts
