"""Engines of every family of UNets that users bring, by TensorRT-RTX: its parser reads what the exporter writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from diffusers import DDPMScheduler

from dpctl.models import load_model, write_pipeline
from dpctl.recipe import EngineRecipe, ExportRecipe
from export import export_model
from runtime import engine as engines

FAMILIES = (
    "ddpm",
    "ldm",
    "class-conditional",
    "ncsnpp",
    "resnet-resampling",
    "scale-shift",
    "stable-diffusion",
    "sdxl",
    "inpainting",
    "latent-consistency",
)
RTX = EngineRecipe(flavor="rtx", compute_capability=("8.9", "12.0"))


@pytest.fixture
def export(tmp_path: Path) -> Callable[..., tuple[Any, engines.EngineManifest]]:
    """Return what exports a network with an engine, and gives both manifests."""
    pytest.importorskip("tensorrt_rtx")

    def run(unet: Any, recipe: ExportRecipe) -> tuple[Any, engines.EngineManifest]:
        write_pipeline(tmp_path / "model", unet=unet, scheduler=DDPMScheduler(num_train_timesteps=100))
        manifest = export_model(load_model(tmp_path / "model"), tmp_path / "out", recipe)
        (name,) = manifest.stats["engines"]
        return manifest, engines.read(tmp_path / "out" / "unet" / name)

    return run


def test_the_names_are_those_of_the_toys(families: dict[str, Any]) -> None:
    assert set(FAMILIES) == set(families)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_of_every_family_is_built(
    family: str, families: dict[str, Any], export: Callable[..., tuple[Any, engines.EngineManifest]]
) -> None:
    manifest, about = export(families[family](), ExportRecipe(batch=(1, 2, 4), engine=RTX))
    assert list(about.profile) == [tensor["name"] for tensor in manifest.signature["inputs"]]
    assert about.targets == ["8.9", "12.0"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ddpm", "stable-diffusion"])
def test_an_engine_of_dynamic_size_is_built(
    family: str, families: dict[str, Any], export: Callable[..., tuple[Any, engines.EngineManifest]]
) -> None:
    _, about = export(families[family](), ExportRecipe(batch=(1, 2, 4), size=(8, 16, 32), engine=RTX))
    assert [shape[2:] for shape in about.profile["sample"]] == [[8, 8], [16, 16], [32, 32]]
