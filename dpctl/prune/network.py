"""UNet + groups -> the Network that planning prices: every layer's cost as a function of the groups' widths."""

from dataclasses import replace
from typing import Any

from torch import nn

from dpctl.cost import positions
from dpctl.prune.branches import find_branches, has_own_weights
from dpctl.prune.groups import Groups
from dpctl.prune.plan import Layer, Network, Side, Span
from dpctl.pruned_unet import Removed, widths


def describe(unet: Any, groups: Groups) -> Network:
    """Return spans and layer costs of `unet`; one forward pass counts the positions of each layer."""
    counted = positions(unet)
    repeats: dict[str, dict[str, int]] = {}
    for group in groups.prunable:
        for member in group.members:
            # A side holds each channel a whole number of times: twice where a tensor is concatenated with itself.
            side = repeats.setdefault(f"{member.module}.{member.side}", {})
            side[group.name] = side.get(group.name, 0) + len(member.index) // group.width
    full = {group.name: group.width for group in groups.prunable}
    needs = _needs(unet, groups)
    layers = [
        replace(_layer(name, m, counted, repeats, full), needs=needs.get(name, ()))
        for name, m in unet.named_modules()
        if has_own_weights(m)
    ]
    # A group's name is a layer in the middle of it, which needs the group itself as well.
    spans = [
        Span(
            g.name,
            g.width,
            g.segments,
            block=g.block,
            optional=g.branch is not None,
            within=tuple(outer for outer in needs.get(g.name, ()) if outer != g.name),
        )
        for g in groups.prunable
    ]
    return Network(tuple(spans), tuple(layers))


def _needs(unet: Any, groups: Groups) -> dict[str, tuple[str, ...]]:
    """Return layer -> the groups without which it is gone: those of the branches that it is in.

    Of a branch's last layer the bias stays.
    """
    holders = {group.branch: group.name for group in groups.prunable if group.branch is not None}
    needs: dict[str, tuple[str, ...]] = {}
    for branch in find_branches(unet) if holders else ():
        for layer in branch.layers - {branch.last} if branch.block in holders else ():
            needs[layer] = (*needs.get(layer, ()), holders[branch.block])
    return needs


def _layer(
    name: str, module: Any, counted: dict[str, int], repeats: dict[str, dict[str, int]], full: dict[str, int]
) -> Layer:
    if isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
        vectors = sum(1 for _ in module.parameters(recurse=False))
        return Layer(name, 0, 0, Side(0), _side(f"{name}.out", widths(module)[0], repeats, full), vectors)
    if isinstance(module, Removed):
        return Layer(name, 0, 0, Side(0), _side(f"{name}.out", widths(module)[1], repeats, full), vectors=1)
    try:
        before, after = widths(module)
    except TypeError:  # a layer of an unknown kind is in no group: its cost is what it is
        sizes = {parameter: values.numel() for parameter, values in module.named_parameters(recurse=False)}
        weight = sizes.pop("weight", 0)
        return Layer(name, counted.get(name, 0), 1, Side(weight), Side(1), vectors=sum(sizes.values()))
    kernel = module.weight.numel() // (before * after)
    bias = int(getattr(module, "bias", None) is not None)
    inputs, outputs = _side(f"{name}.in", before, repeats, full), _side(f"{name}.out", after, repeats, full)
    return Layer(name, counted.get(name, 0), kernel, inputs, outputs, vectors=bias)


def _side(key: str, size: int, repeats: dict[str, dict[str, int]], full: dict[str, int]) -> Side:
    times = repeats.get(key, {})
    return Side(size - sum(count * full[group] for group, count in times.items()), times)
