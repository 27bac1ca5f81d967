"""One tiny UNet with attention, as a model directory and exported."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8,),
            down_block_types=("AttnDownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
            attention_head_dim=4,
            norm_num_groups=4,
        )
    directory = tmp_path_factory.mktemp("runtime") / "model"
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def exported_directory(model_directory: Path) -> Path:
    """Shared: copy it before changing a file."""
    from dpctl.models import load_model
    from dpctl.recipe import ExportRecipe
    from export import export_model

    directory = model_directory.with_name("exported")
    export_model(load_model(model_directory), directory, ExportRecipe(batch=(1, 2, 4)))
    return directory


@pytest.fixture(scope="session")
def engine_directory(exported_directory: Path) -> Path:
    """The same with an engine for this machine's GPU; skips where there is none to build or run it."""
    import torch

    from dpctl.errors import DpctlError
    from dpctl.recipe import EngineRecipe
    from export import to_tensorrt
    from export.engines import export_engine

    if not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use: an engine cannot be run")
    try:
        to_tensorrt.check(EngineRecipe(), "fp32")
    except DpctlError as problem:
        pytest.skip(f"{problem.failed}: {problem.got}")
    directory = exported_directory.with_name("engine")
    export_engine(exported_directory, directory, EngineRecipe())
    return directory
