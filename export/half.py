"""Torch's own run at a lower precision: the yardstick of the gate, and where float16 overflows.

A processor's ONNX kernels show an exported graph's rounding at best (`export.precision.emulated`). What a network does
in half precision is seen in torch itself, and in how far its activations stay from the largest float16.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dpctl.signature import CLOCKS, OUTPUT
from runtime.network import Network

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
LARGEST = torch.finfo(torch.float16).max

# Called with the name of a module of the UNet and each tensor that it gives.
Watch = Callable[[str, Tensor], None]


class HalfNetwork(nn.Module):
    """A copy of a UNet at a lower precision, behind the signature: float32 in, float32 out, as an exported graph."""

    def __init__(self, unet: Any, precision: str) -> None:
        super().__init__()
        self.dtype = DTYPES[precision]
        # Not the model's own `to`, which warns of modules to keep in float32 even where there are none.
        self.network = Network(nn.Module.to(copy.deepcopy(unet), self.dtype)).eval()
        for module in self.network.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.forward = partial(_summed_in_float32, module)  # type: ignore[method-assign]

    def forward(self, **inputs: Tensor) -> Tensor:
        narrow = {n: v.to(self.dtype) for n, v in inputs.items() if v.is_floating_point() and n not in CLOCKS}
        return self.network(**{**inputs, **narrow}).float()


def _summed_in_float32(module: nn.Conv2d | nn.Linear, values: Tensor) -> Tensor:
    """Return a layer's output with its sums in float32, rounded once, as tensor cores give it.

    Torch's own float16 convolution errs by as much, and takes ten times as long and more on a processor without such
    instructions: the export of a model of 36 million parameters took seven minutes.
    """
    weight, bias = module.weight.float(), module.bias.float() if module.bias is not None else None
    if isinstance(module, nn.Conv2d):
        return module._conv_forward(values.float(), weight, bias).to(module.weight.dtype)
    return nn.functional.linear(values.float(), weight, bias).to(module.weight.dtype)


def evidence(unet: Any, golden: Mapping[str, Tensor], precision: str) -> dict[str, Any]:
    """Return what torch shows of a UNet at `precision` over golden rows (inputs by name, `out_sample`), as plain JSON.

    `relative_l2` of each row against `out_sample`, None where the output is not finite; `first_non_finite`, the first
    module that gave NaN or Inf, with its timestep, or None; for fp16 the `headroom` of the float32 run.
    """
    found = own_error(HalfNetwork(unet, precision), golden)
    return found | ({"headroom": headroom(unet, golden)} if precision == "fp16" else {})


def own_error(network: HalfNetwork, golden: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return torch's own error at a lower precision, row by row, and where it first is not finite."""
    broken: list[dict[str, Any]] = []
    errors: list[float | None] = []
    for row in _rows(golden):
        timestep, expected = float(row["timestep"]), row.pop(OUTPUT)

        def look(name: str, values: Tensor, timestep: float = timestep) -> None:
            if not broken and not values.isfinite().all():
                broken.append({"module": name, "timestep": timestep})

        with watching(network.network.unet, look), torch.inference_mode():
            output = network(**row)
        errors.append(relative_l2(output, expected) if output.isfinite().all() else None)
    return {"relative_l2": errors, "first_non_finite": broken[0] if broken else None}


def headroom(unet: Any, golden: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return the largest value that any module gives in the float32 run, and how many times it fits into float16.

    What no module gives, the products inside an attention among them, is not seen.
    """
    worst: dict[str, Any] = {"largest": 0.0, "module": "", "timestep": 0.0}
    for row in _rows(golden):
        timestep = float(row["timestep"])
        del row[OUTPUT]

        def look(name: str, values: Tensor, timestep: float = timestep) -> None:
            largest = float(values.abs().max())
            if largest > worst["largest"]:
                worst.update(largest=largest, module=name, timestep=timestep)

        with watching(unet, look), torch.inference_mode():
            Network(unet)(**row)
    return worst | {"headroom": LARGEST / max(worst["largest"], torch.finfo(torch.float32).tiny)}


def relative_l2(output: Tensor, expected: Tensor) -> float:
    """Return |output - expected| / |expected|."""
    wanted = expected.double()
    return float((output.double() - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float32).tiny))


@contextmanager
def watching(unet: nn.Module, look: Watch) -> Iterator[None]:
    """Call `look` on every floating point tensor that a module gives, in the order of the run; leave no hook behind."""

    def hook(name: str) -> Any:
        def on_output(_module: nn.Module, _inputs: Any, output: Any) -> None:
            values = output if isinstance(output, tuple | list) else [output]
            for value in values:
                if isinstance(value, Tensor) and value.is_floating_point() and value.numel():
                    look(name, value)

        return on_output

    handles = [module.register_forward_hook(hook(name)) for name, module in unet.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _rows(golden: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield every row as a batch of one."""
    for number in range(len(golden["timestep"])):
        yield {name: value[number : number + 1] for name, value in golden.items()}
