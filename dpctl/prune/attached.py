"""What may hang on a network in memory that pruning would misread or lose: refused by name, before anything is traced.

Nothing of this comes out of a directory. It is on networks that a program has worked with before.
"""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from dpctl.errors import DpctlError
from dpctl.models import refuse_non_finite
from dpctl.signature import FAMILIES, PRUNED

Found = tuple[str, str]  # what it is, and what to do about it

HOOKS = {
    "_forward_pre_hooks": "a forward-pre hook",
    "_forward_hooks": "a forward hook",
    "_backward_pre_hooks": "a backward-pre hook",
    "_backward_hooks": "a backward hook",
}


def require_plain(unet: Any) -> None:
    """Raise a DpctlError unless a network is of a known class, with finite weights and nothing attached to it."""
    kind = type(unet).__name__
    if kind.removeprefix(PRUNED) not in FAMILIES:
        todo = f"bring one of: {', '.join(FAMILIES)}; give the network itself, not a wrapper (compiled, parallel) of it"
        raise DpctlError("this kind of network is not supported yet", kind, todo)
    for name, module in unet.named_modules():
        if (found := _adapter(name, module) or _hook(module) or _rewired(module)) is not None:
            raise DpctlError("something is attached to the network", f"{found[0]} on {name or kind}", found[1])
    refuse_non_finite(unet, "the given network")


def _adapter(name: str, module: nn.Module) -> Found | None:
    if type(module).__module__.startswith("peft.") or (hasattr(module, "base_layer") and hasattr(module, "lora_A")):
        # What was only fused still wraps its layers.
        return "an adapter of peft", "unload it; to keep what it does, fuse_lora() before unload_lora_weights()"
    if name.endswith(".processor") and any(True for _ in module.parameters()):
        return f"an adapter ({type(module).__name__})", "unload it, for instance by unload_ip_adapter()"
    return None


def _hook(module: nn.Module) -> Found | None:
    held = vars(module)
    for attribute, what in HOOKS.items():
        if held[attribute]:
            return what, "remove it, or load the network again"
    if "_hf_hook" in held:
        return "a hook of accelerate", "call remove_all_hooks() on the pipeline, or load the network again"
    if "_diffusers_hook" in held and held["_diffusers_hook"].hooks:
        return "a hook of diffusers", "load the network again without offloading and layerwise casting"
    return None


def _rewired(module: nn.Module) -> Found | None:
    if parametrize.is_parametrized(module):
        return "a parametrization", "call torch.nn.utils.parametrize.remove_parametrizations on it"
    if vars(module).get("fused_projections"):
        return "fused projections", "load the network again without fuse_qkv_projections()"
    return None
