"""A diffusers pipeline whose `unet` is a Denoiser: pipelines, schedulers and what users wrote for them work unchanged.

The network runs on its backend. Tokenizers, text encoders, VAE and scheduler are those of the directory, in torch, in
float32 and on the backend's device; the graphs that `dpctl export --components` writes are for use without torch.
"""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Self

import torch
from torch import Tensor, nn

from dpctl.errors import DpctlError
from dpctl.pipelines import UNLOADABLE, cannot_be_loaded
from runtime.denoiser import Denoiser, begin
from runtime.noise import image_generators

# Of `added_cond_kwargs`: what the signature names. `image_embeds` and the like belong to IP-Adapter.
ADDED = ("text_embeds", "time_ids")


class DenoiserUNet(nn.Module):
    """What pipelines call and read of a UNet, over an open Denoiser, which it owns.

    `close()` frees the denoiser, as does the end of ``with pipe.unet:``. It has no weights of its own: it stays on its
    backend's device, and what would change the network (LoRA, IP-Adapter, another dtype) is refused.
    """

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.device, self.dtype, self._internal_dict = denoiser.device, denoiser.dtype, denoiser.config
        self._denoiser: Denoiser | None = denoiser
        # SDXL compares the width of its additional conditions with this one.
        width = self.config.get("projection_class_embeddings_input_dim")
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))

    @property
    def config(self) -> Any:
        """The network's config; pipelines replace `_internal_dict` where they mend one of an early diffusers."""
        return self._internal_dict

    @property
    def denoiser(self) -> Denoiser:
        """What runs the network; a DpctlError once it is closed."""
        if self._denoiser is None:
            raise DpctlError("the network is closed", "a call after close()", "load the pipeline again")
        return self._denoiser

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor | None = None,
        *,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Any] | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> Any:
        """Return the model output of `sample` [B, C, H, W] as diffusers' UNets do; `timestep` is one for all or [B].

        Raises a DpctlError for inputs outside the signature, by their names.
        """
        added = dict(added_cond_kwargs or {})
        named = {"encoder_hidden_states": encoder_hidden_states, "class_labels": class_labels}
        named |= {"timestep_cond": timestep_cond, **{name: added.pop(name, None) for name in ADDED}}
        self._refuse(others | {"cross_attention_kwargs": cross_attention_kwargs or None} | added)
        # float32, never whole numbers: Euler's timesteps are fractional. [B]
        steps = torch.as_tensor(timestep, dtype=torch.float32, device=sample.device).expand(len(sample)).contiguous()
        conditions = {name: value for name, value in named.items() if value is not None}
        output = self.denoiser(sample, steps, **conditions).to(sample.dtype)
        return _output(output) if return_dict else (output,)

    def _refuse(self, inputs: Mapping[str, Any]) -> None:
        """Raise a DpctlError that names what is given of `inputs`."""
        given = [name for name, value in inputs.items() if value is not None]
        if given:
            todo = "leave out what gives them (ControlNet, adapters), or use stock diffusers with the model directory"
            raise DpctlError("the network has no such inputs", ", ".join(given), todo)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # What .to(), .cuda(), .half() and the rest come down to.
        here = torch.empty(0, dtype=self.dtype, device=self.device)
        there = fn(here)
        if (there.device, there.dtype) != (here.device, here.dtype):
            got = f"{there.device}, {there.dtype}; it runs on {here.device}, {here.dtype}"
            todo = "give device= to load_pipeline, or the precision to `dpctl export`"
            raise DpctlError("the network stays where its backend runs it", got, todo)
        return self

    def load_lora_adapter(self, *_: Any, **__: Any) -> None:
        """Refuse a LoRA: the network's weights are the backend's."""
        raise _fixed("a LoRA")

    def _load_ip_adapter_weights(self, *_: Any, **__: Any) -> None:
        raise _fixed("an IP-Adapter")

    def close(self) -> None:
        """Free what the denoiser holds; the rest of the pipeline stays. A second call does nothing."""
        denoiser, self._denoiser = self._denoiser, None
        if denoiser is not None:
            denoiser.__exit__(None, None, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _output(sample: Tensor) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    return UNet2DConditionOutput(sample=sample)


def _fixed(what: str) -> DpctlError:
    todo = "put it into the model with stock diffusers (fuse it, save, export again), or use stock diffusers"
    return DpctlError(f"{what} cannot be attached to a network on a backend", "a network without weights here", todo)


def assemble(kind: Any, directory: Path, unet: DenoiserUNet) -> Any:
    """Load the other components of a pipeline directory, on the network's device, and put the pipeline together.

    Raises a DpctlError for components that are missing, damaged or not safetensors.
    """
    try:
        parts = kind.from_pretrained(
            directory, unet=None, use_safetensors=True, local_files_only=True, dtype=torch.float32
        )
        # Built again with the network: constructors read the size of images from its config.
        _, options = kind._get_signature_keys(parts)
        kept = {name: parts.config[name] for name in options if name in parts.config}
        pipe = _seeded(kind)(**{**parts.components, "unet": unet}, **kept)
    except UNLOADABLE as problem:
        raise cannot_be_loaded(directory, problem) from None
    pipe.register_to_config(_name_or_path=str(directory))
    return pipe.to(unet.device)


def _seeded(kind: Any) -> Any:
    """Return the class, or one whose calls hand their generator to the scheduler where the pipeline itself does not.

    Latent diffusion draws its first noise with it, but what a scheduler adds would come from torch's global state.
    """
    if not kind.__name__.startswith("LDM"):
        return kind
    call = kind.__call__

    @functools.wraps(call)
    def seeded(self: Any, *args: Any, **kwargs: Any) -> Any:
        generator = inspect.signature(call).bind(self, *args, **kwargs).arguments.get("generator")
        scheduler = self.scheduler
        if generator is None or "generator" not in inspect.signature(scheduler.step).parameters:
            return call(self, *args, **kwargs)
        scheduler.step = functools.partial(scheduler.step, generator=generator)
        try:
            return call(self, *args, **kwargs)
        finally:
            del scheduler.step

    return type(kind.__name__, (kind,), {"__module__": kind.__module__, "__doc__": kind.__doc__, "__call__": seeded})


def draw_images(
    pipe: Any,
    *,
    seed: int,
    indices: Sequence[int],
    num_inference_steps: int,
    prompts: Sequence[str] | None = None,
    guidance_scale: float | None = None,
) -> Tensor:
    """Draw the images `indices` of `seed`: [B, C, H, W], float32 in [-1, 1], on the processor.

    `prompts` has one for each, where the pipeline takes texts. Raises a DpctlError for steps and sizes that it cannot
    take and for images that are not finite.
    """
    asked: dict[str, Any] = {"num_inference_steps": num_inference_steps, "output_type": "np"}
    asked |= {"batch_size": len(indices)} if prompts is None else {"prompt": list(prompts)}
    asked |= {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    try:
        # Latent diffusion scales its noise before it says how many steps there are: the last call's would count.
        pipe.scheduler.set_timesteps(num_inference_steps)
        begin(pipe.unet.denoiser)
        found = pipe(**asked, generator=image_generators(seed, indices)).images
    except ValueError as problem:  # how diffusers tells of steps and sizes that it cannot take
        got = f"{type(pipe).__name__}: {problem}"
        raise DpctlError("the pipeline refuses this", got, "change what it names") from None
    images = torch.from_numpy(found).float().permute(0, 3, 1, 2) * 2 - 1
    if not images.isfinite().all():
        got = f"NaN or Inf after {num_inference_steps} steps"
        raise DpctlError("the images are not finite", got, "use another scheduler or number of steps")
    return images.contiguous()
