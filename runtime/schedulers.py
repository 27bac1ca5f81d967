"""The schedulers by name: diffusers' classes, configured by the model's own scheduler."""

import difflib
from collections.abc import Mapping
from typing import Any

from dpctl.errors import DpctlError

SCHEDULERS = {
    "ddpm": "DDPMScheduler",
    "ddim": "DDIMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
}
# What the network was trained with, whatever samples from it.
TRAINED = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")


def check_scheduler(name: str) -> None:
    """Raise a DpctlError unless there is a scheduler of that name."""
    if name not in SCHEDULERS:
        near = difflib.get_close_matches(name, SCHEDULERS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DpctlError("unknown scheduler", repr(name), f"{hint}choose one of: {', '.join(SCHEDULERS)}")


def make_scheduler(name: str, config: Mapping[str, Any]) -> Any:
    """Build the scheduler called `name` with the betas, prediction type and clipping of the model's own config."""
    import diffusers

    check_scheduler(name)
    # diffusers puts a class's own defaults, and lcm's are others, in the place of values that were left at theirs.
    trained = {name: config[name] for name in TRAINED if name in config}
    scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(config, **trained)
    # Latent consistency models jump over a grid of 50 timesteps, by default: a model may have fewer of them.
    if scheduler.config.get("original_inference_steps", 0) > scheduler.config.num_train_timesteps:
        scheduler.register_to_config(original_inference_steps=scheduler.config.num_train_timesteps)
    return scheduler
