"""What a model was before any pruning: the costs and widths that fractions refer to."""

from dataclasses import replace
from typing import Any

from dpctl import cost
from dpctl.errors import DpctlError
from dpctl.models import Model, build_unet
from dpctl.prune.groups import OUT, ChannelGroup, Groups
from dpctl.prune.plan import Network
from dpctl.pruned_unet import Removed, widths
from dpctl.signature import PRUNED


def unpruned_costs(source: Model) -> dict[str, int]:
    """Return the costs that target fractions refer to: of the model as it was before any pruning."""
    recorded = source.manifest.stats.get("unpruned") if source.manifest is not None else None
    if recorded:
        return recorded
    base = _base(source.unet)
    return cost.stats(source.unet if base is None else base)


def unpruned_widths(source: Model, network: Network) -> dict[str, int]:
    """Return the unpruned width of every group: by the manifest of an earlier cut, else by the base config."""
    full, recorded, base = network.full(), _recorded(source), _base(source.unet)
    if recorded or base is None:
        return {name: recorded.get(name, [width])[0] for name, width in full.items()}
    # A group may be a part of its layer's outputs (GEGLU's value and gate are one), the same part before and after. The
    # layer may be gone, with the branch that it ends.
    there = dict(source.unet.named_modules())
    before = {name: widths(base.get_submodule(name))[-1] for name in full}
    now = {name: widths(there[name])[-1] if name in there else width for name, width in full.items()}
    return {name: width * before[name] // now[name] for name, width in full.items()}


def refer(network: Network, source: Model) -> Network:
    """Return the network with its fractions referring to the unpruned widths."""
    before = unpruned_widths(source, network)
    return replace(network, spans=tuple(replace(span, base=before[span.name]) for span in network.spans))


def named_as_before(groups: Groups, source: Model) -> Groups:
    """Return the groups by the names that they had in an earlier cut: the layer of the name may be gone since."""
    recorded = _recorded(source)

    def named(group: ChannelGroup) -> ChannelGroup:
        outputs = {member.module for member in group.members if member.side == OUT}
        left = {name: source.unet.get_submodule(name) for name in outputs}
        outputs |= {f"{name}.{module.last}" for name, module in left.items() if isinstance(module, Removed)}
        return replace(group, name=next((name for name in recorded if name in outputs), group.name))

    return replace(groups, prunable=tuple(named(group) for group in groups.prunable)) if recorded else groups


def earlier_cuts(source: Model) -> dict[str, list[int]]:
    """Return group name -> [unpruned, present] width of what is narrower than it was, as the manifest has it."""
    return {name: list(pair) for name, pair in _recorded(source).items() if pair[0] != pair[1]}


def _recorded(source: Model) -> dict[str, list[int]]:
    return source.manifest.stats.get("widths", {}) if source.manifest is not None else {}


def unpruned_network(source: Model) -> Any:
    """Return the network that a model was before any pruning, in eval mode with fresh weights; None if it is that.

    Raises a DpctlError where the manifest tells of a larger one but not of which.
    """
    config = unpruned_config(source)
    found = unpruned_unet(source.unet) if config is None else build_unet(config).eval()
    was = source.manifest.stats.get("unpruned") if source.manifest is not None else None
    if was and (known := cost.stats(source.unet if found is None else found)["macs"]) != was["macs"]:
        got = f"one of {known} MACs; it had {was['macs']} before an earlier dpctl pruned it in the layout stock"
        raise DpctlError("the unpruned network is not known", got, "prune the model that it was made from")
    return found


def unpruned_config(source: Model) -> dict[str, Any] | None:
    """Return the config of the unpruned network where only the manifest knows it: a stock config is the slim one's."""
    return source.manifest.stats.get("unpruned_config") if source.manifest is not None else None


def unpruned_unet(unet: Any) -> Any:
    """Return the network that a freely pruned one was, in eval mode with fresh weights; None for a stock class."""
    base = getattr(unet.config, "base_config", None)
    return build_unet({**base, "_class_name": type(unet).__name__.removeprefix(PRUNED)}).eval() if base else None


def _base(unet: Any) -> Any:
    """Return the unpruned network of a freely pruned one, without weights; None for a stock class."""
    # A pruned model without our manifest (its unet/ alone, or saved by stock diffusers): count, compute nothing.
    import torch

    with torch.device("meta"):
        return unpruned_unet(unet)
