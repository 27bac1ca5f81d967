"""The sampling loop: any scheduler of diffusers over any Denoiser."""

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dpctl.errors import DpctlError
from dpctl.signature import sample_size
from runtime.denoiser import Denoiser, begin
from runtime.noise import initial_noise, step_generators


def sample(
    denoiser: Denoiser,
    scheduler: Any,
    *,
    seed: int,
    indices: Sequence[int],
    num_inference_steps: int,
    conditions: Mapping[str, Tensor] | None = None,
    size: tuple[int, int] | None = None,
    on_step: Callable[[int, Tensor], None] | None = None,
) -> Tensor:
    """Draw the samples `indices` of `seed`: images [B, C, H, W], float32 in [-1, 1], on the processor.

    Sample i of a seed is the same image in every batch. A class-conditional network without `conditions` draws
    class i modulo the number of classes. `size` (H, W) is the config's own unless given. `on_step(i, x_t)` is called
    after step i has been handed to the device. `scheduler` is not changed. Raises a DpctlError for a number of steps
    that the scheduler cannot take and for samples that are not finite.
    """
    config, device = denoiser.config, denoiser.device
    scheduler = _started(scheduler, num_inference_steps)
    shape = (config.in_channels, *(size or sample_size(config)))
    conditions = _default_conditions(config, indices) if conditions is None else conditions
    conditions = {name: value.to(device) for name, value in conditions.items()}

    # What can be made before the loop is; the scheduler's own timesteps stay on the processor, where reading one
    # waits for nobody. [N], and as the network takes them [N, B]
    steps = scheduler.timesteps
    timesteps = steps.to(device, torch.float32)[:, None].repeat(1, len(indices))
    random: dict[str, Any] = {}
    if "generator" in inspect.signature(scheduler.step).parameters:
        random["generator"] = step_generators(seed, indices)

    begin(denoiser)
    with torch.inference_mode():
        x_t = initial_noise(seed, indices, shape).to(device) * scheduler.init_noise_sigma
        for i, t in enumerate(steps):
            model_input = scheduler.scale_model_input(x_t, t)
            model_output = denoiser(model_input, timesteps[i], **conditions)
            x_t = scheduler.step(model_output, t, x_t, return_dict=False, **random)[0]
            if on_step is not None:
                on_step(i, x_t)
        images = x_t.float().clamp(-1.0, 1.0).cpu()
    if not x_t.isfinite().all():
        got = f"NaN or Inf after {num_inference_steps} steps of {type(scheduler).__name__}"
        raise DpctlError(
            "the samples are not finite", got, "use another scheduler or number of steps, or check the model"
        )
    # A tensor made in inference mode could not be changed in place by the caller.
    return images.clone()


def _started(scheduler: Any, num_inference_steps: int) -> Any:
    """Return a copy of `scheduler` that is set to its first step."""
    fresh = copy.deepcopy(scheduler)
    # A consistency model jumps over a grid that is coarser than the timesteps it was trained with.
    grids = (fresh.config.get(name) for name in ("num_train_timesteps", "original_inference_steps"))
    most = min((grid for grid in grids if grid is not None), default=num_inference_steps)
    if not 1 <= num_inference_steps <= most:
        got = f"{num_inference_steps} steps; {type(scheduler).__name__} has {most} timesteps to choose from"
        raise DpctlError("the number of inference steps is out of range", got, f"give 1 to {most}")
    fresh.set_timesteps(num_inference_steps)
    return fresh


def _default_conditions(config: Any, indices: Sequence[int]) -> dict[str, Tensor]:
    if config.get("cross_attention_dim") is not None:
        got = f"cross_attention_dim {config.get('cross_attention_dim')}"
        raise DpctlError("a text-conditional network cannot be sampled alone", got, "sample its diffusers pipeline")
    classes = config.get("num_class_embeds")
    return {"class_labels": torch.tensor([index % classes for index in indices])} if classes else {}
