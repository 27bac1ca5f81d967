"""A training that takes milliseconds per step: a UNet of one block on the shared toy images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpctl.data import Images

TINY: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
    "norm_num_groups": 4,
}


@pytest.fixture
def make_tiny(make_unet: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that makes the network: `make_tiny(seed, **changed_config)`."""
    return lambda seed=0, **changed: make_unet(seed, **(TINY | changed))


@pytest.fixture
def scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2)


@pytest.fixture
def images(toy_images: Path) -> Images:
    from dpctl.data import open_data

    return open_data(str(toy_images), channels=1, size=(8, 8))
