"""Two tiny UNets, exported once: an unconditional one with attention, and a pruned class-conditional one."""

from pathlib import Path
from typing import Any

import pytest

TOY: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "down_block_types": ("AttnDownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
BATCH = (1, 2, 4)


def saved(directory: Path, build: Any) -> Path:
    """Write a pipeline around the UNet that `build` makes from a fixed seed."""
    import torch
    from diffusers import DDPMScheduler

    from dpctl.models import write_pipeline

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = build()
    write_pipeline(directory, unet=unet, scheduler=DDPMScheduler(num_train_timesteps=100))
    return directory


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the loaded unconditional model."""
    from diffusers import UNet2DModel

    from dpctl.models import load_model

    return load_model(saved(tmp_path_factory.mktemp("export") / "plain", lambda: UNet2DModel(**TOY)))


@pytest.fixture(scope="session")
def pruned(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return the loaded pruned, class-conditional model: widths that differ within the network."""
    from dpctl.models import load_model
    from dpctl.pruned_unet import PrunedUNet2DModel

    config = TOY | {"num_class_embeds": 3, "down_block_types": ("DownBlock2D",)}
    block = "down_blocks.0.resnets.0"
    channels = {
        f"{block}.conv1": [8, 4],
        f"{block}.time_emb_proj": [32, 4],
        f"{block}.norm2": [4],
        f"{block}.conv2": [4, 8],
    }
    return load_model(saved(tmp_path_factory.mktemp("export") / "pruned", lambda: PrunedUNet2DModel(config, channels)))


def exported(model: Any) -> Path:
    from dpctl.recipe import ExportRecipe
    from export import export_model

    out = model.directory.with_name("exported")
    export_model(model, out, ExportRecipe(batch=BATCH))
    return out


@pytest.fixture(scope="session")
def plain_exported(plain: Any) -> Path:
    """Shared: copy it before changing a file."""
    return exported(plain)


@pytest.fixture(scope="session")
def pruned_exported(pruned: Any) -> Path:
    """Shared: copy it before changing a file."""
    return exported(pruned)
