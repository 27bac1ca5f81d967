"""What a UNet costs before anything is measured: parameters, multiply-accumulates, bytes.

MACs are our own count, the same on every device: convolutions and linear layers at batch 1, with the two
products of attention beside them. (torch's FlopCounterMode counts attention as 0 on the CPU and in full on meta.)
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpctl.signature import of_unet, unet_arguments


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass at batch 1."""

    linear: int
    attention: int


def parameters(unet: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in unet.parameters())


def positions(unet: Any) -> dict[str, int]:
    """Return layer name -> number of output positions (H * W, or tokens) at batch 1, summed over its calls.

    The MACs of a layer are its positions times the size of its weight, so that one pass over the unpruned
    network prices every plan for it. It runs without weights, so that a network of any size takes no time.
    """
    unet = without_weights(unet)
    counts: dict[str, int] = {}

    def count(name: str) -> Any:
        def hook(module: nn.Module, _: Any, output: Tensor) -> None:
            counts[name] = counts.get(name, 0) + output.numel() // width_out(module)

        return hook

    for name, module in unet.named_modules():
        if is_layer(module):
            module.register_forward_hook(count(name))
    with torch.no_grad():
        unet(**unet_arguments(example_inputs(unet)))
    return counts


def without_weights(unet: Any) -> Any:
    """Return a copy of `unet` on the meta device, for what looks at shapes alone; `unet` itself is not touched."""
    copies: dict[int, Any] = {id(p): nn.Parameter(p.detach().to("meta"), p.requires_grad) for p in unet.parameters()}
    copies |= {id(buffer): buffer.to("meta") for buffer in unet.buffers()}
    return copy.deepcopy(unet, copies)


def macs(unet: Any) -> Macs:
    """Count the MACs of one forward pass at batch 1 at the model's own size."""
    return total(macs_by_module(unet))


def total(by_module: Mapping[str, int]) -> Macs:
    """Return the sums of `macs_by_module`: an attention block is known by the layers that it holds."""
    attention = sum(n for name, n in by_module.items() if f"{name}.to_q" in by_module)
    return Macs(linear=sum(by_module.values()) - attention, attention=attention)


def macs_by_module(unet: Any) -> dict[str, int]:
    """Return module path -> its MACs: of layers, and of attention blocks the two products. Together they are `macs`."""
    where = positions(unet)
    return _linear(unet, where) | _attention(unet, where)


def _linear(unet: Any, where: dict[str, int]) -> dict[str, int]:
    modules = dict(unet.named_modules())
    return {name: n * modules[name].weight.numel() for name, n in where.items()}


def _attention(unet: Any, where: dict[str, int]) -> dict[str, int]:
    return {
        name: 2 * where[f"{name}.to_q"] * where[f"{name}.to_k"] * module.to_q.out_features
        for name, module in unet.named_modules()
        if f"{name}.to_q" in where and f"{name}.to_k" in where
    }


def is_layer(module: nn.Module) -> bool:
    """Tell whether MACs are counted for `module`."""
    return isinstance(module, (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear))


def width_out(module: Any) -> int:
    """Return the number of output channels of a convolution or linear layer."""
    return int(module.out_features if isinstance(module, nn.Linear) else module.out_channels)


def example_inputs(unet: Any, batch: int = 1) -> dict[str, Tensor]:
    """Return inputs by their names in the signature, at the model's own size and on its device.

    Zeros at timestep 1. Raises a DpctlError for a network whose inputs are not known.
    """
    config = unet.config
    parameter = next(unet.parameters())
    dtypes = {"float32": parameter.dtype, "int64": torch.long}
    wanted = of_unet({**config, "_class_name": type(unet).__name__}).inputs
    inputs = {t.name: torch.zeros(t.at(batch), dtype=dtypes[t.dtype], device=parameter.device) for t in wanted}
    # Timestep 1: the Fourier embedding takes its logarithm. A learned embedding is a table, looked up by integers.
    learned = config.get("time_embedding_type") == "learned"
    inputs["timestep"] = torch.ones(batch, device=parameter.device, dtype=torch.long if learned else torch.float32)
    return inputs


def stats(unet: Any, by_module: Mapping[str, int] | None = None) -> dict[str, int]:
    """Return params, macs and attention_macs as the manifest keeps them; `by_module` saves counting them again."""
    counted = total(macs_by_module(unet) if by_module is None else by_module)
    return {"params": parameters(unet), "macs": counted.linear, "attention_macs": counted.attention}


def file_bytes(directory: Path) -> int:
    """Return the bytes of the network's files: what `unet/` holds in weights, graphs and engines."""
    suffixes = {".safetensors", ".onnx", ".data", ".engine"}
    skipped = {"golden.safetensors", "kept.safetensors"}
    return sum(
        p.stat().st_size for p in (directory / "unet").rglob("*") if p.suffix in suffixes and p.name not in skipped
    )
