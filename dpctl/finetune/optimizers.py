"""The optimizers by name, and their moments as the plain tensors that a checkpoint holds.

`adamw` is torch's. `adamw-8bit` is torchao's: AdamW whose moments are eight-bit numbers of a table, with a scale for
every 256 of them (Dettmers et al., arXiv 2110.02861); parameters of fewer than 4,096 values, or not a multiple of 256,
keep float32 moments.
"""

import importlib.util
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpctl.errors import DpctlError
from dpctl.recipe import LoopRecipe

# The moments of a parameter, and what else an optimizer keeps for it: every entry is a tensor.
Moments = dict[str, Tensor]

EIGHT_BIT = "adamw-8bit"
# torchao's own rule, which it does not export.
SMALLEST, BLOCK = 4096, 256
# What an eight-bit moment consists of, and how its parts are called in a checkpoint.
PARTS = ("codes", "scale", "qmap")


def check(name: str) -> None:
    """Raise a DpctlError where an optimizer's package is missing."""
    if name == EIGHT_BIT and importlib.util.find_spec("torchao") is None:
        todo = "install dpctl with the extra [adam8bit], or leave --optimizer out"
        raise DpctlError("this optimizer needs a package that is not installed", f"{name} is of torchao", todo)


def open_optimizer(parameters: Iterable[Any], recipe: LoopRecipe, device: torch.device) -> Any:
    """Return the recipe's optimizer over the parameters of a network that trains on `device`."""
    given: dict[str, Any] = {"lr": recipe.learning_rate, "weight_decay": recipe.weight_decay}
    if recipe.optimizer != EIGHT_BIT:
        return torch.optim.AdamW(parameters, **given)
    from torchao.optim import AdamW8bit

    optimizer = AdamW8bit(parameters, **given)
    if device.type == "cpu":
        # torchao compiles a kernel for each shape of a parameter: minutes, for steps that are no faster on a processor.
        optimizer.step = torch.compiler.set_stance("force_eager")(optimizer.step)
    return optimizer


def set_learning_rate(optimizer: Any, rate: float) -> None:
    """Let the next step have another learning rate; a compiled optimizer keeps it in a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def size_of_moments(parameters: Sequence[Any], name: str) -> int:
    """Return the bytes of the two moments of every parameter."""
    return sum(2 * _bytes(p, name) for p in parameters)


def _bytes(parameter: Any, name: str) -> int:
    count = int(parameter.numel())
    if name != EIGHT_BIT or count < SMALLEST or count % BLOCK:
        return count * int(parameter.element_size())
    return count + 4 * (count // BLOCK + BLOCK)  # the codes, a scale for each block, the table


def tensors(optimizer: Any) -> dict[str, Tensor]:
    """Return all moments as plain tensors, by the number of their parameter and their name."""
    found: dict[str, Tensor] = {}
    for index, moments in optimizer.state_dict()["state"].items():
        for key, value in moments.items():
            if hasattr(value, "__tensor_flatten__"):
                found |= {f"{index}.{key}.{part}": getattr(value, part) for part in PARTS}
            else:
                found[f"{index}.{key}"] = torch.as_tensor(value)
    return found


def restore(optimizer: Any, saved: Mapping[str, Tensor]) -> None:
    """Go on from the moments that `tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    for name, tensor in saved.items():
        index, key, *part = name.split(".")
        moments = state.setdefault(int(index), {})
        if part:
            moments.setdefault(key, {})[part[0]] = tensor
        else:
            moments[key] = tensor
    for moments in state.values():
        moments |= {key: _eight_bit(key, value) for key, value in moments.items() if isinstance(value, dict)}
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _eight_bit(key: str, parts: Mapping[str, Tensor]) -> Any:
    from torchao.optim.subclass_8bit import OptimState8bit

    # Only the mean of the gradient has a sign, the mean of its square has none.
    return OptimState8bit(*(parts[part] for part in PARTS), signed=key == "exp_avg", dtype=torch.float32)
