"""PruningPlan + UNet -> slim UNet; ensures a forward pass.

Nothing of the original is changed: the kept slices are copied into a pruned class of the same family.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dpctl import pruned_unet
from dpctl.cost import example_inputs
from dpctl.errors import DpctlError
from dpctl.models import build_unet
from dpctl.prune.branches import Branch, gone
from dpctl.prune.groups import Groups
from dpctl.prune.importance import slices
from dpctl.prune.plan import PruningPlan
from dpctl.pruned_unet import LAST, widths
from dpctl.signature import PRUNED, unet_arguments

Kept = dict[str, Tensor]


def kept_indices(unet: Any, groups: Groups, plan: PruningPlan) -> Kept:
    """Return ``"<module>.<side>"`` -> positions of that side that stay, ascending, for every side that shrinks.

    Of a branch that goes the input of the last layer has none; its block has the positions of what passes by.
    """
    taken: dict[str, set[int]] = {}
    for group in groups.prunable:
        staying = set(plan.keep[group.name])
        for member in group.members:
            removed = {i for i, channel in zip(member.index, member.channel, strict=True) if channel not in staying}
            taken.setdefault(f"{member.module}.{member.side}", set()).update(removed)
    kept = {}
    for key, removed in taken.items():
        if removed:
            kept[key] = torch.tensor([i for i in range(_size(unet, key)) if i not in removed], dtype=torch.int64)
    for branch in gone(unet, kept):
        whole = torch.arange(_size(unet, f"{branch.last}.out"))
        marks = {f"{branch.last}.in": kept[f"{branch.last}.in"]}
        marks[f"{branch.block}.out"] = kept.get(f"{branch.last}.out", whole)
        kept = {key: index for key, index in kept.items() if not branch.holds(key.rpartition(".")[0])} | marks
    return kept


def slim(unet: Any, kept: Kept, stock: dict[str, Any] | None = None, whole: Collection[str] = ()) -> Any:
    """Return the kept slices of `unet` as a pruned class of its family; ensures that it runs, with finite outputs.

    With `stock`, a config of the plain class that has these widths, it is one of that class. The sides in `whole`
    (`Groups.whole`) lost whole norm groups or heads: their norms and attentions get fewer. The slim attention divides
    by the root of its *new* head width; the factor that keeps the softmax temperature of the original is folded into
    to_q.
    """
    small = build_unet(stock) if stock is not None else _free(unet, kept, whole)
    removed = gone(unet, kept)
    state = _without_branches(unet, small, kept, removed)
    for key, index in kept.items():
        name, _, side = key.rpartition(".")
        if any(branch.holds(name) for branch in removed):
            continue
        for parameter, dimension in slices(unet.get_submodule(name), side):
            full = f"{name}.{parameter}"
            state[full] = state[full].index_select(dimension, index.to(state[full].device))
    there = {name for name, _ in small.named_modules()}
    for name, module in unet.named_modules():
        factor = temperature(unet, small, name) if name in there else 1.0
        for parameter, _ in module.named_parameters() if factor != 1.0 else ():
            state[f"{name}.{parameter}"] = state[f"{name}.{parameter}"] * factor
    small.load_state_dict(state)
    small.to(next(unet.parameters()).device).eval()
    _ensure_forward(small, unet)
    return small


def outline(unet: Any, kept: Kept, stock: dict[str, Any] | None = None, whole: Collection[str] = ()) -> Any:
    """Return what `slim` returns, on the meta device: its class, config and shapes."""
    with torch.device("meta"):
        return (build_unet(stock) if stock is not None else _free(unet, kept, whole)).eval()


def temperature(unet: Any, small: Any, name: str) -> float:
    """Return the factor on the layer `name`: 1 but for to_q, whose attention divides by the root of the head width."""
    return (head_width(small, name) / head_width(unet, name)) ** 0.5 if name.endswith(".to_q") else 1.0


def head_width(unet: Any, to_q: str) -> float:
    """Return the width of one head of the attention that a to_q belongs to."""
    return unet.get_submodule(to_q).out_features / unet.get_submodule(to_q.rpartition(".")[0]).heads


def _free(unet: Any, kept: Kept, whole: Collection[str]) -> Any:
    """Return the pruned class of the network's family with the widths that `kept` leaves and weights yet to come."""
    channels = dict(getattr(unet.config, "channels", None) or {})
    removed = gone(unet, kept)
    for branch in removed:
        left = len(kept[f"{branch.block}.out"])
        channels = {name: w for name, w in channels.items() if not branch.holds(name)} | {branch.block: [0, left]}
    for name in sorted({key.rpartition(".")[0] for key in kept}):
        if not any(branch.holds(name) for branch in removed):
            channels |= _entries(unet, name, kept, channels, f"{name}.out" in whole)
    base = getattr(unet.config, "base_config", None) or {k: v for k, v in unet.config.items() if not k.startswith("_")}
    kind = getattr(pruned_unet, PRUNED + type(unet).__name__.removeprefix(PRUNED))
    return kind(base_config=dict(base), channels={name: list(w) for name, w in channels.items()})


def _without_branches(unet: Any, small: Any, kept: Kept, removed: Sequence[Branch]) -> dict[str, Tensor]:
    """Return the tensors of a network, and of branches that go the kept part of the last bias, by the block's name."""
    state = dict(unet.state_dict())
    for branch in removed:
        bias = state[f"{branch.last}.bias"]
        bias = bias[kept[f"{branch.block}.out"].to(bias.device)]
        state = {name: value for name, value in state.items() if not branch.holds(name.rpartition(".")[0])}
        state[f"{branch.block}.bias"] = bias.reshape(small.get_submodule(branch.block).bias.shape)
    return state


def _entries(unet: Any, name: str, kept: Kept, earlier: Mapping[str, Any], whole: bool) -> dict[str, list[int]]:
    """Return what the pruned class has to know of a layer and, of a to_q whose heads went whole, of its attention."""
    module, new = unet.get_submodule(name), _new_widths(unet, name, kept)
    if isinstance(module, nn.GroupNorm):
        groups = module.num_groups * new[0] // module.num_channels if whole else module.num_groups
        # Of the unpruned network's own number nothing is said, so that most norms are one number.
        known = groups == module.num_groups and len(earlier.get(name, [])) < 2
        return {name: new if known else [*new, groups]}
    if whole and name.endswith(".to_q"):
        attention = name.rpartition(".")[0]
        return {name: new, attention: [unet.get_submodule(attention).heads * new[1] // module.out_features]}
    return {name: new}


def regrouped(unet: Any, small: Any, kept: Kept) -> dict[str, float]:
    """Return norm -> fraction of its channels that changed to another of its groups, of norms where some did.

    Two tensors that are concatenated and shrink by different fractions move the boundaries of the groups. Groups that
    moved up because whole ones before them went are the same.
    """
    found, there = {}, {name for name, _ in small.named_modules()}
    for name, norm in unet.named_modules():
        if not isinstance(norm, nn.GroupNorm) or f"{name}.out" not in kept or name not in there:
            continue
        groups, index = small.get_submodule(name).num_groups, kept[f"{name}.out"]
        before = index // (norm.num_channels // norm.num_groups)
        if groups != norm.num_groups:
            before = torch.unique(before, return_inverse=True)[1]
        after = torch.arange(len(index)) // (len(index) // groups)
        if moved := int((before != after).sum()):
            found[name] = moved / len(index)
    return found


def compose(parent: Kept | None, kept: Kept) -> Kept:
    """Return kept positions relative to the base model, where the pruned model was itself pruned from `parent`."""
    if not parent:
        return kept
    before = dict(parent)
    for block, last in _blocks_gone(kept):
        # What passes by was known by the branch's last layer; of what was inside nothing is left to know.
        passing = before.get(f"{block}.{last}.out")
        shortcut = f"{block}.conv_shortcut."
        inside = [key for key in before if key.startswith(f"{block}.") and not key.startswith(shortcut)]
        before = {key: index for key, index in before.items() if key not in inside}
        if passing is not None:
            before[f"{block}.out"] = passing
    return before | {key: before[key][index] if key in before else index for key, index in kept.items()}


def _blocks_gone(kept: Kept) -> list[tuple[str, str]]:
    """Return (block, last layer in it) of the branches that a cut takes, by what it keeps."""
    ends = [key.removesuffix(".in") for key, index in kept.items() if key.endswith(".in") and len(index) == 0]
    return [
        (name.removesuffix(f".{last}"), last) for name in ends for last in LAST.values() if name.endswith(f".{last}")
    ]


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


def _ensure_forward(small: Any, unet: Any) -> None:
    """Run the slim network once. Raises a DpctlError where its output is not finite, and the original's neither."""
    inputs = example_inputs(small)
    output = _run(small, inputs)
    if output.shape[0] != 1 or output.shape[2:] != inputs["sample"].shape[2:]:
        raise RuntimeError(f"the slim network does not run: output {tuple(output.shape)}")
    if bool(output.isfinite().all()):
        return
    if bool(_run(unet, example_inputs(unet)).isfinite().all()):
        raise RuntimeError("the slim network's output is not finite, and the original's is")
    got = "NaN or Inf from zeros at timestep 1"
    raise DpctlError("the network's own output is not finite", got, "check its weights: they are finite, but too large")


def _run(unet: Any, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        output: Tensor = unet(**unet_arguments(inputs)).sample
    return output
