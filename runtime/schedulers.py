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
}


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
    return getattr(diffusers, SCHEDULERS[name]).from_config(config)
