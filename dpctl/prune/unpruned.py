"""What a model was before any pruning: the costs and widths that fractions refer to."""

from dataclasses import replace
from typing import Any

from dpctl import cost
from dpctl.models import Model, build_unet
from dpctl.prune.plan import Network
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
    from dpctl.pruned_unet import widths

    # A group may be a part of its layer's outputs (GEGLU's value and gate are one), the same part before and after.
    now, before = ({name: widths(unet.get_submodule(name))[-1] for name in full} for unet in (source.unet, base))
    return {name: width * before[name] // now[name] for name, width in full.items()}


def refer(network: Network, source: Model) -> Network:
    """Return the network with its fractions referring to the unpruned widths."""
    before = unpruned_widths(source, network)
    return replace(network, spans=tuple(replace(span, base=before[span.name]) for span in network.spans))


def earlier_cuts(source: Model) -> dict[str, list[int]]:
    """Return group name -> [unpruned, present] width of what is narrower than it was, as the manifest has it."""
    return {name: list(pair) for name, pair in _recorded(source).items() if pair[0] != pair[1]}


def _recorded(source: Model) -> dict[str, list[int]]:
    return source.manifest.stats.get("widths", {}) if source.manifest is not None else {}


def _base(unet: Any) -> Any:
    """Return the unpruned network of a freely pruned one, without weights; None for a stock class."""
    base = getattr(unet.config, "base_config", None)
    if not base:
        return None
    # A pruned model without our manifest (its unet/ alone, or saved by stock diffusers): count, compute nothing.
    import torch

    with torch.device("meta"):
        return build_unet({**base, "_class_name": type(unet).__name__.removeprefix(PRUNED)}).eval()
