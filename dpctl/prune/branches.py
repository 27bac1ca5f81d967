"""Residual branches: what of a network can go altogether, since something passes by it.

Without channels inside, a branch adds one constant for every input, the bias of its last layer; its other layers have
nothing to do. Removing whole blocks is depth pruning (BK-SDM: Kim et al., ECCV 2024); here it is the last step of a
branch's own width.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from dpctl.pruned_unet import LAST, NORMS


@dataclass(frozen=True)
class Branch:
    """A block whose branch can go: its `last` layer, of which the bias stays, and all `layers` that would go."""

    block: str
    last: str
    layers: frozenset[str]

    def holds(self, module: str) -> bool:
        """Tell whether a module goes with the branch: the block's shortcut stays."""
        inside = module == self.block or module.startswith(f"{self.block}.")
        return module in self.layers or (inside and module != f"{self.block}.conv_shortcut")


def find_branches(unet: Any) -> list[Branch]:
    """Return the branches of a network in the order of its modules, those within others after them."""
    return [
        _branch(unet, name, module)
        for name, module in unet.named_modules()
        if type(module).__name__ in LAST and _can_go(unet, name, module)
    ]


def _branch(unet: Any, block: str, module: Any) -> Branch:
    kind = type(module).__name__
    own = {f"{block}.{inner}" for inner, layer in module.named_modules() if inner and has_own_weights(layer)}
    own -= {f"{block}.conv_shortcut"}
    parent, _, leaf = block.rpartition(".")
    if _is_transformer_block(unet.get_submodule(parent)):
        own.add(f"{parent}.{NORMS[leaf]}")  # only this branch reads it
    return Branch(block, f"{block}.{LAST[kind]}", frozenset(own))


def _can_go(unet: Any, block: str, module: Any) -> bool:
    """Tell whether something passes by a block unchanged, and its last layer has a bias to leave behind."""
    last = dict(module.named_modules()).get(LAST[type(module).__name__])
    if not isinstance(last, (nn.Conv2d, nn.Linear)) or last.bias is None:
        return False
    if type(module).__name__ == "ResnetBlock2D":
        return module.upsample is None and module.downsample is None
    if type(module).__name__ == "Transformer2DModel":
        return bool(module.is_input_continuous)
    parent, _, leaf = block.rpartition(".")
    if _is_transformer_block(unet.get_submodule(parent)):
        return leaf in NORMS
    return bool(getattr(module, "residual_connection", False)) and module.spatial_norm is None


def _is_transformer_block(module: Any) -> bool:
    """Tell whether a module is a transformer block that adds its branches as they are."""
    return type(module).__name__ == "BasicTransformerBlock" and module.norm_type == "layer_norm"


def branch_of(branches: Iterable[Branch], modules: Iterable[str], sides: Iterable[str]) -> Branch | None:
    """Return the branch that has no channels without those of a group: all of its `modules` are there.

    Its `sides` (``"<module>.<side>"``) have the input of the last layer among them.
    """
    held, read = set(modules), set(sides)
    return next((b for b in branches if f"{b.last}.in" in read and held <= b.layers), None)


def gone(unet: Any, kept: Mapping[str, Any]) -> list[Branch]:
    """Return the branches that keep no channel, without those inside another that goes."""
    if all(len(index) for index in kept.values()):
        return []  # most cuts: nothing to look for
    found = [branch for branch in find_branches(unet) if len(kept.get(f"{branch.last}.in", "whole")) == 0]
    blocks = [f"{branch.block}." for branch in found]
    return [branch for branch in found if not any(branch.block.startswith(outer) for outer in blocks)]


def has_own_weights(module: nn.Module) -> bool:
    """Tell whether `module` itself (not a child) holds parameters."""
    return any(True for _ in module.parameters(recurse=False))
