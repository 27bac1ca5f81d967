"""UNet -> coupled channel groups, from Torch-Pruning's DepGraph. The only file that imports torch_pruning.

DepGraph (Fang et al., CVPR 2023) traces which slices of which layers have to go together. Only its groups are used:
its selector averages the importance over norm groups, which is not the paper's (see plan.py).
"""

import math
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from dpctl.cost import example_inputs, without_weights
from dpctl.errors import DpctlError
from dpctl.prune.branches import branch_of, find_branches
from dpctl.pruned_unet import Removed
from dpctl.signature import unet_arguments

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
    groups, attention heads) must keep equal numbers of channels; in a group that is cut `whole`, every `block`
    contiguous channels stay or go together instead, and the norms or the attention around them have fewer parts.
    Without any of its channels the branch of the block `branch` is gone, where there is one that may go.
    """

    name: str
    width: int
    segments: int
    members: tuple[Member, ...]
    block: int = 1
    whole: bool = False
    branch: str | None = None


@dataclass(frozen=True)
class Groups:
    """All groups of a network; name -> reason of those left alone, and of those whose norm groups cannot go whole."""

    prunable: tuple[ChannelGroup, ...]
    left_alone: dict[str, str]
    in_parts: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> frozenset[str]:
        """The sides ``"<module>.<side>"`` that lose whole norm groups or heads."""
        return frozenset(f"{m.module}.{m.side}" for group in self.prunable if group.whole for m in group.members)


def find_groups(unet: Any, *, heads: bool = False, norm_groups: bool = False, depth: bool = False) -> Groups:
    """Trace `unet`, without its weights, and return its coupled channel groups in the order of the trace.

    With `heads` and `norm_groups` whole ones of these go, where they fit, instead of a part of each. With `depth` a
    residual branch may go altogether.
    """
    unet = without_weights(unet)
    order = {module: name for name, module in unet.named_modules()}
    constants = _layers_for_constants(order)
    graph, raw = _traced(unet, constants)
    order |= {layer: f"{order[removed]}.{removed.last}" for removed, layer in constants.items()}
    left = {f"{order[removed]}.{removed.last}": order[removed] for removed in constants}
    found, left_alone, in_parts = [], {}, dict[str, str]()
    for group in raw:
        name = order[group[0].dep.target.module]
        members, reason = _members(graph, group, order, left)
        width, members = _folded(len(group[0].idxs), members)
        segments = _segments(unet, members)
        if reason is None and not all(_evenly(member, width) for member in members):
            reason = "a layer has only some of its channels"  # scale and shift of one norm from one layer
        if reason is None:
            found.append(ChannelGroup(name, width, segments, members))
        else:
            left_alone[name] = reason
    if heads:
        found = [_in_heads(unet, group) for group in found]
    if norm_groups:
        found, in_parts = _in_norm_groups(unet, found)
    if depth:
        found = _with_branches(unet, found)
    for g in found:
        if g.width % g.segments:
            left_alone[g.name] = f"its width {g.width} is no multiple of {g.segments} norm groups or heads"
    return _without(found, left_alone, in_parts)


def _with_branches(unet: Any, groups: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    """Return the groups, each with the block whose branch it is the width of, if it is."""
    branches = find_branches(unet)
    found = []
    for group in groups:
        sides = [f"{member.module}.{member.side}" for member in group.members]
        branch = branch_of(branches, (member.module for member in group.members), sides)
        found.append(replace(group, branch=branch.block) if branch is not None else group)
    return found


def _layers_for_constants(modules: Mapping[Any, str]) -> dict[Any, nn.Module]:
    """Return, for what is left of each block that went before, a layer to trace in the place of its constant."""
    found: dict[Any, nn.Module] = {}
    for module in modules:
        if isinstance(module, Removed):
            width = len(module.bias)
            kind = nn.Linear(width, width) if module.alone else nn.Conv2d(width, width, 1)
            found[module] = kind.to("meta")
    return found


@contextmanager
def _branches_again(constants: Mapping[Any, nn.Module]) -> Iterator[None]:
    """Let each constant be what a layer gives of what passes by: DepGraph loses its way at bare parameters."""
    for removed, layer in constants.items():
        removed.traced, removed.constant = layer, layer.__call__
    try:
        yield
    finally:
        for removed in constants:
            del removed.traced, removed.constant


def _traced(unet: Any, constants: Mapping[Any, nn.Module]) -> tuple[Any, list[Any]]:
    """Return DepGraph's graph of a network and its groups. Raises a DpctlError for a network that does not run."""
    import torch_pruning

    graph = torch_pruning.DependencyGraph()
    inputs = unet_arguments(example_inputs(unet))
    with (
        torch.enable_grad(),
        warnings.catch_warnings(),
        _plain_resampling(),
        _differentiable(unet),
        _branches_again(constants),
    ):
        warnings.simplefilter("ignore")
        try:
            graph.build_dependency(unet, inputs, output_transform=lambda output: output.sample, verbose=False)
        except Exception as problem:  # a config can be wrong in every way that a network can fail
            reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
            raise DpctlError(
                "the network cannot be run", reason, "check that diffusers itself runs a model of this config"
            ) from None
        return graph, list(graph.get_all_groups(ignored_layers=[], root_module_types=[nn.Conv2d, nn.Linear]))


def restrict(groups: Groups, keep: Sequence[str], only: Sequence[str], removed: Sequence[str] = ()) -> Groups:
    """Leave alone the groups that a glob of `keep` names, and those that none of `only` names where that is given.

    A glob names a group by any module whose outputs are among its channels. No branch goes altogether that holds a
    module which `keep` names, or a group that is left alone. Raises a DpctlError for a glob that names none; it may be
    of the blocks `removed`, whose branches went before.
    """
    produced = {g.name: [m.module for m in g.members if m.side == OUT] for g in groups.prunable}
    for pattern in (*keep, *only):
        known = any(fnmatchcase(module, pattern) for modules in produced.values() for module in modules)
        if not known and not any(pattern.startswith(f"{block}.") for block in removed):
            near = ", ".join(sorted({name.partition(".")[0] for name in produced}))
            raise DpctlError(
                "a pattern names no module that can be pruned", repr(pattern), f"give globs over the modules of {near}"
            )

    def named(group: ChannelGroup, patterns: Sequence[str]) -> str | None:
        return next((p for p in patterns for module in produced[group.name] if fnmatchcase(module, p)), None)

    left_alone = dict(groups.left_alone)
    for group in groups.prunable:
        if (kept_by := named(group, keep)) is not None:
            left_alone[group.name] = f"kept by {kept_by}"
        elif only and named(group, only) is None:
            left_alone[group.name] = "not among those asked for"
    held = [module for modules in produced.values() for module in modules if any(fnmatchcase(module, p) for p in keep)]
    held += [g.name for g in groups.prunable if g.name in left_alone]
    prunable = [replace(g, branch=None) if _holds(g, held) else g for g in groups.prunable]
    restricted = _without(prunable, left_alone, groups.in_parts)
    if not restricted.prunable:
        raise DpctlError("no group is left to prune", f"keep {list(keep)}, only {list(only)}", "name fewer, or others")
    return restricted


def _holds(group: ChannelGroup, modules: Iterable[str]) -> bool:
    """Tell whether the branch that a group is the width of, if it is, has one of these modules inside."""
    inside, shortcut = f"{group.branch}.", f"{group.branch}.conv_shortcut"
    return group.branch is not None and any(name.startswith(inside) and name != shortcut for name in modules)


def _without(groups: Sequence[ChannelGroup], left_alone: dict[str, str], in_parts: dict[str, str]) -> Groups:
    return Groups(
        tuple(group for group in groups if group.name not in left_alone),
        left_alone,
        {name: reason for name, reason in in_parts.items() if name not in left_alone},
    )


@contextmanager
def _differentiable(unet: nn.Module) -> Iterator[None]:
    """Let gradients reach every parameter for as long as DepGraph traces: of frozen layers it sees nothing."""
    frozen = [parameter for parameter in unet.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _plain_resampling() -> Iterator[None]:
    """Show DepGraph another resampling in the place of diffusers' FIR filters, for as long as it traces.

    The filters fold channels into the batch and take every second pixel, which DepGraph reads as every second channel.
    To the channels they are what any resampling is: each on its own.
    """
    from diffusers.models import downsampling, resnet, upsampling

    modules: tuple[Any, ...] = (downsampling, resnet, upsampling)
    original = upsampling.upfirdn2d_native
    for module in modules:
        module.upfirdn2d_native = _resampled
    try:
        yield
    finally:
        for module in modules:
            module.upfirdn2d_native = original


def _resampled(tensor: Tensor, kernel: Tensor, up: int = 1, down: int = 1, pad: tuple[int, int] = (0, 0)) -> Tensor:
    """Return `tensor` [B, C, H, W] in the size that `upfirdn2d_native` gives it."""
    size = [
        (length * up + sum(pad) - taps) // down + 1 for length, taps in zip(tensor.shape[2:], kernel.shape, strict=True)
    ]
    return nn.functional.interpolate(tensor, size=size)


def _members(
    graph: Any, group: Any, order: Mapping[Any, str], left: Mapping[str, str]
) -> tuple[tuple[Member, ...], str | None]:
    """Return a group's members, and the reason why it must be left alone, if there is one.

    `left` has the block of each last layer whose constant is left.
    """
    members = []
    for item in group:
        module = item.dep.target.module
        if module not in order:
            if isinstance(module, nn.Parameter):
                return (), "a bare parameter is coupled to it"
            continue  # concatenations, reshapes and other operations have no weights
        if order[module] == "conv_out" and graph.is_out_channel_pruning_fn(item.dep.handler):
            return (), "it is the network's output"
        if not isinstance(module, (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm, nn.Embedding)):
            return (), f"a {type(module).__name__} is coupled to it"
        if isinstance(module, nn.Conv2d) and module.groups != 1:
            return (), "a grouped convolution is coupled to it"
        side = OUT if graph.is_out_channel_pruning_fn(item.dep.handler) else IN
        if (order[module], side) == ("time_embedding.linear_1", IN):
            return (), "it is added to the timestep's sinusoid, whose width is fixed"
        if order[module] in left and side == IN:
            continue  # a constant reads nothing
        name = left.get(order[module], order[module])
        members.append(Member(name, side, tuple(item.idxs), tuple(item.root_idxs)))
    return tuple(members), None


def _folded(width: int, members: tuple[Member, ...]) -> tuple[int, tuple[Member, ...]]:
    """Return width and members with the halves of the first member as one, where the others have one of them.

    A layer that gives two tensors at once (GEGLU's value and gate, scale and shift of a norm) holds channel c at the
    positions c and width / 2 + c. DepGraph counts its outputs and finds the others coupled to one half.
    """
    half, others = width // 2, members[1:]
    if not others or width % 2 or any(len(member.index) != half for member in others):
        return width, members
    if any(len({channel // half for channel in member.channel}) != 1 for member in others):
        return width, members
    return half, tuple(
        Member(m.module, m.side, m.index, tuple(channel % half for channel in m.channel)) for m in members
    )


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
        if is_inner(member):
            parts = math.lcm(parts, unet.get_submodule(member.module.rpartition(".")[0]).heads)
    return parts


def _in_heads(unet: Any, group: ChannelGroup) -> ChannelGroup:
    """Return a group cut in whole heads, where it is the inner width of an attention that has several."""
    if not any(is_inner(member) for member in group.members) or group.segments == 1:
        return group
    return replace(group, segments=1, block=group.width // group.segments, whole=True)


def _in_norm_groups(unet: Any, groups: Sequence[ChannelGroup]) -> tuple[list[ChannelGroup], dict[str, str]]:
    """Return the groups, cut in whole norm groups where they fit, and name -> reason of those cut in parts.

    A norm either keeps its number of groups, and each of its channel groups loses a part of each, or all of them lose
    whole norm groups: what one of them cannot do, the others do not do either.
    """
    norms: dict[str, list[tuple[ChannelGroup, Member]]] = {}
    block: dict[str, int] = {}
    for group in groups:
        for member in group.members:
            norm = unet.get_submodule(member.module)
            if isinstance(norm, nn.GroupNorm):
                norms.setdefault(member.module, []).append((group, member))
                block[group.name] = math.lcm(block.get(group.name, 1), norm.num_channels // norm.num_groups)
    in_parts = {
        group.name: "its norms have no whole groups in common below its full width"
        for group in groups
        if block.get(group.name, 0) >= group.width
    }
    for name, holders in norms.items():
        mixed = _mixed(unet.get_submodule(name), holders, block)
        in_parts |= dict.fromkeys(mixed, f"a norm group of {name} has channels of others too")
    while more := _beside(norms, in_parts):
        in_parts |= more
    whole = block.keys() - in_parts.keys()
    return [replace(g, segments=1, block=block[g.name], whole=True) if g.name in whole else g for g in groups], in_parts


def _mixed(
    norm: nn.GroupNorm, holders: Sequence[tuple[ChannelGroup, Member]], block: Mapping[str, int]
) -> dict[str, None]:
    """Return the channel groups of which a block does not consist of whole groups of this norm."""
    owners: list[tuple[str, int]] = [("", 0)] * norm.num_channels  # "": left alone
    for group, member in holders:
        for position, channel in zip(member.index, member.channel, strict=True):
            owners[position] = (group.name, channel // block[group.name])
    size = norm.num_channels // norm.num_groups
    parts = [dict.fromkeys(owners[start : start + size]) for start in range(0, norm.num_channels, size)]
    return {name: None for part in parts if len(part) > 1 for name, _ in part if name}


def _beside(norms: Mapping[str, Sequence[tuple[ChannelGroup, Member]]], in_parts: Mapping[str, str]) -> dict[str, str]:
    """Return the groups that share a norm with one that is cut in parts, each with the reason."""
    found = {}
    for name, holders in norms.items():
        first = next((group.name for group, _ in holders if group.name in in_parts), None)
        for group, _ in holders if first is not None else ():
            if group.name not in in_parts:
                found[group.name] = f"it shares {name} with {first}, which is cut in parts"
    return found


def is_inner(member: Member) -> bool:
    """Tell whether a member is the inner width of an attention, which its heads share."""
    return member.side == OUT and member.module.endswith((".to_q", ".to_k", ".to_v"))
