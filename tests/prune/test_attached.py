"""A network in memory may carry what its directory does not: hooks, parametrizations, adapters. All are refused."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import hooks
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from dpctl.errors import DpctlError
from dpctl.prune import prune_unet
from dpctl.recipe import PruneRecipe

HALF = PruneRecipe(criterion="magnitude", ratio=0.5)
RANDOM = replace(HALF, criterion="random")
LAYER = "mid_block.resnets.0.conv1"
TO_Q = "mid_block.attentions.0.to_q"


class LoraLinear(nn.Module):
    """What peft puts in the place of a linear layer."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base_layer.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base_layer.out_features, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


def forward_hook(unet: Any) -> str:
    unet.get_submodule(LAYER).register_forward_hook(lambda *_: None)
    return f"a forward hook on {LAYER}"


def forward_pre_hook(unet: Any) -> str:
    unet.get_submodule(LAYER).register_forward_pre_hook(lambda *_: None)
    return f"a forward-pre hook on {LAYER}"


def backward_hook(unet: Any) -> str:
    unet.register_full_backward_hook(lambda *_: None)
    return "a backward hook on UNet2DModel"


def backward_pre_hook(unet: Any) -> str:
    unet.get_submodule(LAYER).register_full_backward_pre_hook(lambda *_: None)
    return f"a backward-pre hook on {LAYER}"


def accelerate_hook(unet: Any) -> str:
    add_hook_to_module(unet.get_submodule(LAYER), ModelHook())
    return f"a hook of accelerate on {LAYER}"


def diffusers_hook(unet: Any) -> str:
    unet.enable_layerwise_casting(torch.bfloat16, torch.float32)
    return "a hook of diffusers on conv_in"


def weight_norm(unet: Any) -> str:
    nn.utils.parametrizations.weight_norm(unet.get_submodule(LAYER))
    return f"a parametrization on {LAYER}"


def fused_projections(unet: Any) -> str:
    unet.mid_block.attentions[0].fuse_projections()
    return "fused projections on mid_block.attentions.0"


def ip_adapter(unet: Any) -> str:
    unet.mid_block.attentions[0].set_processor(IPAdapterAttnProcessor2_0(64, 24))
    return r"an adapter \(IPAdapterAttnProcessor2_0\) on mid_block.attentions.0.processor"


def lora(unet: Any) -> str:
    unet.set_submodule(TO_Q, LoraLinear(unet.get_submodule(TO_Q)))
    return f"an adapter of peft on {TO_Q}"


def another_adapter_of_peft(unet: Any) -> str:
    class Tuned(nn.Module):
        __module__ = "peft.tuners.oft.layer"

    unet.set_submodule(TO_Q, Tuned())
    return f"an adapter of peft on {TO_Q}"


@pytest.mark.parametrize(
    "attach",
    [
        forward_hook,
        forward_pre_hook,
        backward_hook,
        backward_pre_hook,
        accelerate_hook,
        diffusers_hook,
        weight_norm,
        fused_projections,
        ip_adapter,
        lora,
        another_adapter_of_peft,
    ],
)
def test_what_is_attached_is_named_before_anything_is_traced(
    toy_model: Any, monkeypatch: pytest.MonkeyPatch, attach: Callable[[Any], str]
) -> None:
    expected = attach(toy_model.unet)
    monkeypatch.setattr(type(toy_model.unet), "forward", lambda *_, **__: pytest.fail("the network was run"))
    with pytest.raises(DpctlError, match=rf"something is attached.*\n.*{expected}\n.*do:  \w"):
        prune_unet(toy_model, HALF)


def test_a_hook_that_was_removed_is_no_hook(toy_model: Any) -> None:
    toy_model.unet.register_forward_hook(lambda *_: None).remove()
    registry = hooks.HookRegistry.check_if_exists_or_initialize(toy_model.unet.conv_in)
    registry.register_hook(hooks.ModelHook(), "mine")
    with pytest.raises(DpctlError, match="a hook of diffusers on conv_in"):
        prune_unet(toy_model, HALF)
    registry.remove_hook("mine")
    assert prune_unet(toy_model, HALF).kept
    assert prune_unet(toy_model, HALF).kept  # and none is left behind by the first


@pytest.mark.parametrize("wrap", [nn.DataParallel, torch.compile])
def test_a_wrapped_network_is_not_the_network(toy_model: Any, wrap: Callable[[Any], Any]) -> None:
    with pytest.raises(DpctlError, match=r"not supported yet\n.*(DataParallel|OptimizedModule)\n.*not a wrapper"):
        prune_unet(replace(toy_model, unet=wrap(toy_model.unet)), HALF)


def test_a_frozen_network_is_pruned_alike_and_stays_frozen(toy_model: Any) -> None:
    frozen = copy.deepcopy(toy_model)
    frozen.unet.requires_grad_(False)
    one, other = prune_unet(toy_model, HALF), prune_unet(frozen, HALF)
    assert one.plan == other.plan
    assert not any(parameter.requires_grad for parameter in frozen.unet.parameters())
    assert all(parameter.requires_grad for parameter in toy_model.unet.parameters())


@pytest.mark.parametrize("recipe", [HALF, RANDOM])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", [f"{LAYER}.weight", "conv_out.bias"])
def test_weights_that_are_not_finite_are_named(toy_model: Any, recipe: PruneRecipe, bad: float, name: str) -> None:
    with torch.no_grad():
        toy_model.unet.get_parameter(name).view(-1)[0] = bad
    with pytest.raises(DpctlError, match=rf"weights hold NaN or Inf\n.*{name} in the given network"):
        prune_unet(toy_model, recipe)


def test_weights_too_large_to_run_are_explained(toy_model: Any) -> None:
    with torch.no_grad():
        toy_model.unet.conv_out.weight.fill_(3e38)
    with pytest.raises(DpctlError, match=r"output is not finite\n.*\n.*too large"):
        prune_unet(toy_model, RANDOM)
