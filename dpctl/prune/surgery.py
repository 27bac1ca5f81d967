"""PruningPlan + UNet -> slim UNet; ensures a forward pass.

Nothing of the original is changed: the kept slices are copied into a pruned class of the same family.
"""

from typing import Any

import torch
from torch import Tensor

from dpctl import pruned_unet
from dpctl.cost import example_inputs
from dpctl.models import build_unet
from dpctl.prune.groups import Groups
from dpctl.prune.importance import slices
from dpctl.prune.plan import PruningPlan
from dpctl.pruned_unet import widths
from dpctl.signature import PRUNED, unet_arguments

Kept = dict[str, Tensor]


def kept_indices(unet: Any, groups: Groups, plan: PruningPlan) -> Kept:
    """Return ``"<module>.<side>"`` -> positions of that side that stay, ascending, for every side that shrinks."""
    gone: dict[str, set[int]] = {}
    for group in groups.prunable:
        staying = set(plan.keep[group.name])
        for member in group.members:
            removed = {i for i, channel in zip(member.index, member.channel, strict=True) if channel not in staying}
            gone.setdefault(f"{member.module}.{member.side}", set()).update(removed)
    kept = {}
    for key, removed in gone.items():
        if removed:
            kept[key] = torch.tensor([i for i in range(_size(unet, key)) if i not in removed], dtype=torch.int64)
    return kept


def slim(unet: Any, kept: Kept, stock: dict[str, Any] | None = None) -> Any:
    """Return the kept slices of `unet` as a pruned class of its family; ensures that it runs, with finite outputs.

    With `stock`, a config of the plain class that has these widths, it is one of that class. The slim attention divides
    by the root of its *new* head width; the factor that keeps the softmax temperature of the original is folded into
    to_q.
    """
    small = build_unet(stock) if stock is not None else _free(unet, kept)
    state = dict(unet.state_dict())
    for key, index in kept.items():
        name, _, side = key.rpartition(".")
        for parameter, dimension in slices(unet.get_submodule(name), side):
            whole = f"{name}.{parameter}"
            state[whole] = state[whole].index_select(dimension, index.to(state[whole].device))
    for name, module in unet.named_modules():
        if name.endswith(".to_q"):
            factor = (_head_width(small, name) / _head_width(unet, name)) ** 0.5
            for parameter, _ in module.named_parameters() if factor != 1.0 else ():
                state[f"{name}.{parameter}"] = state[f"{name}.{parameter}"] * factor
    small.load_state_dict(state)
    small.to(next(unet.parameters()).device).eval()
    _ensure_forward(small)
    return small


def outline(unet: Any, kept: Kept, stock: dict[str, Any] | None = None) -> Any:
    """Return what `slim` returns, on the meta device: its class, config and shapes."""
    with torch.device("meta"):
        return (build_unet(stock) if stock is not None else _free(unet, kept)).eval()


def _head_width(unet: Any, to_q: str) -> float:
    return unet.get_submodule(to_q).out_features / unet.get_submodule(to_q.rpartition(".")[0]).heads


def _free(unet: Any, kept: Kept) -> Any:
    """Return the pruned class of the network's family with the widths that `kept` leaves and weights yet to come."""
    channels = dict(getattr(unet.config, "channels", None) or {})
    channels |= {name: _new_widths(unet, name, kept) for name in sorted({key.rpartition(".")[0] for key in kept})}
    base = getattr(unet.config, "base_config", None) or {k: v for k, v in unet.config.items() if not k.startswith("_")}
    kind = getattr(pruned_unet, PRUNED + type(unet).__name__.removeprefix(PRUNED))
    return kind(base_config=dict(base), channels={name: list(w) for name, w in channels.items()})


def compose(parent: Kept | None, kept: Kept) -> Kept:
    """Return kept positions relative to the base model, where the pruned model was itself pruned from `parent`."""
    if not parent:
        return kept
    both = {key: parent[key][index] if key in parent else index for key, index in kept.items()}
    return parent | both


def _size(unet: Any, key: str) -> int:
    name, _, side = key.rpartition(".")
    found = widths(unet.get_submodule(name))
    return found[0] if side == "in" else found[-1]


def _new_widths(unet: Any, name: str, kept: Kept) -> list[int]:
    new = widths(unet.get_submodule(name))
    if f"{name}.in" in kept:
        new[0] = len(kept[f"{name}.in"])
    if f"{name}.out" in kept:
        new[-1] = len(kept[f"{name}.out"])
    return new


def _ensure_forward(unet: Any) -> None:
    inputs = example_inputs(unet)
    with torch.no_grad():
        output = unet(**unet_arguments(inputs)).sample
    if output.shape[0] != 1 or output.shape[2:] != inputs["sample"].shape[2:] or not bool(output.isfinite().all()):
        raise RuntimeError(
            f"the slim network does not run: output {tuple(output.shape)}, finite {bool(output.isfinite().all())}"
        )
