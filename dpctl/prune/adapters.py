"""A LoRA of the base model -> a LoRA of the pruned one: its matrices at the kept positions of each layer."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers.utils import convert_unet_state_dict_to_peft
from torch import Tensor

from dpctl.errors import DpctlError
from dpctl.prune.surgery import Kept, head_width
from dpctl.prune.unpruned import unpruned_unet

# Matrix -> the side of its layer, and its axis with the channels of that side.
SIDES = {"lora_A": ("in", 1), "lora_B": ("out", 0)}


def slice_lora(lora: Mapping[str, Tensor], kept: Kept, slim: Any) -> dict[str, Tensor]:
    """Return the LoRA that does to `slim` what `lora` does to the unpruned model, for the channels that are left.

    `lora` is a state dict of diffusers or peft, with the prefix ``unet.`` or none; keys of other networks stay as they
    are. `kept` is what `kept.safetensors` beside the slim network's weights holds. Raises a DpctlError for matrices
    that were not made for the base model, and for kinds of adapters that cannot be sliced.
    """
    base = _base(slim)
    layers, there = ({name for name, _ in network.named_modules()} for network in (base, slim))
    pruned = {key.rpartition(".")[0] for key in kept}
    sliced = {}
    for key, value in convert_unet_state_dict_to_peft(dict(lora)).items():
        name, _, which = key.removeprefix("unet.").removesuffix(".weight").rpartition(".")
        layer = name.partition(".lora_")[0]
        if layer in layers and layer not in there:
            continue  # of a branch that is gone
        if layer not in pruned or which == "alpha":
            sliced[key] = value
            continue
        if which not in SIDES:
            raise DpctlError("this kind of adapter cannot be sliced", key, "give one of plain matrices lora_A, lora_B")
        sliced[key] = _sliced(key, value, layer, which, kept)
        if which == "lora_B" and layer.endswith(".to_q"):
            # As in the slim to_q itself: the factor that keeps the softmax temperature (surgery.py).
            sliced[key] = sliced[key] * (head_width(slim, layer) / head_width(base, layer)) ** 0.5
    return sliced


def _sliced(key: str, matrix: Tensor, layer: str, which: str, kept: Kept) -> Tensor:
    side, axis = SIDES[which]
    index = kept.get(f"{layer}.{side}")
    if index is None:
        return matrix
    if matrix.shape[axis] <= int(index.max()):
        raise DpctlError(
            "the LoRA is not one of the base model",
            f"{key} is {list(matrix.shape)}; {layer} keeps its position {int(index.max())}",
            "give the LoRA as it was made for the unpruned model",
        )
    return matrix.index_select(axis, index.to(matrix.device))


def _base(slim: Any) -> Any:
    """Return the unpruned network without weights; a stock layout's heads are as wide as there, so itself will do."""
    with torch.device("meta"):
        return unpruned_unet(slim) or slim
