"""Engines that are built, run, captured and refitted for real: on a machine with a GPU and TensorRT or TensorRT-RTX."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpctl.errors import DpctlError
from dpctl.models import load_model, write_pipeline
from dpctl.recipe import EngineRecipe, ExportRecipe
from export import export_model, to_tensorrt
from export.engines import export_engine
from export.refit import refit
from export.verify import verify_directory
from runtime import engine as engines
from runtime import open_denoiser
from runtime.backends import trt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.trt,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU that torch can use: an engine cannot be run"),
]


@pytest.fixture(params=["tensorrt", "rtx"])
def recipe(request: pytest.FixtureRequest) -> EngineRecipe:
    """The recipe of each flavor that can be built here for the GPU that is here."""
    capability = trt.capability_of(torch.device("cuda"))
    found = EngineRecipe(request.param, (capability,) if request.param == "rtx" else ())
    try:
        return to_tensorrt.check(found, "fp32")
    except DpctlError as problem:
        pytest.skip(f"{problem.failed}: {problem.got}")


def test_an_engine_is_built_with_its_layers_and_passes_the_gate(
    plain_exported: Path, tmp_path: Path, recipe: EngineRecipe
) -> None:
    manifest = export_engine(plain_exported, tmp_path / "out", recipe)
    (name,) = manifest.stats["engines"]
    engine = tmp_path / "out" / "unet" / name
    assert json.loads(engines.layers(engine).read_text())["of"] == "the engine as built"
    about = engines.read(engine)
    loaded = trt.load(trt.require(about.flavor), engine, about)
    assert about.activation_bytes == loaded.device_memory_size_v2
    assert verify_directory(tmp_path / "out", backend="trt", device=None)["verdict"] == "passed"
    assert engine.with_suffix(to_tensorrt.CACHE).is_file() == (recipe.flavor == "tensorrt")


def test_half_precision_passes_the_gate_on_the_gpu(plain: Any, tmp_path: Path, recipe: EngineRecipe) -> None:
    export_model(plain, tmp_path / "out", ExportRecipe("fp16", (1, 2, 4), engine=recipe))
    assert verify_directory(tmp_path / "out", backend="trt", device=None)["verdict"] == "passed"


def test_a_replayed_cuda_graph_gives_what_eager_gives(
    plain: Any, plain_exported: Path, tmp_path: Path, recipe: EngineRecipe
) -> None:
    export_engine(plain_exported, tmp_path / "out", recipe)
    with open_denoiser(tmp_path / "out", "trt") as denoiser, open_denoiser(plain.directory, device="cuda") as eager:
        for batch in (1, 2, 4, 2, 1):
            for seed in range(3):
                generator = torch.Generator().manual_seed(seed)
                sample = torch.randn(batch, 1, 8, 8, generator=generator)
                timestep = torch.full((batch,), 10.5 + seed)
                found, expected = denoiser(sample, timestep), eager(sample, timestep)
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        captured = [run.graph is not None for run in denoiser._runs.values()]  # type: ignore[attr-defined]
    assert captured == [recipe.flavor == "tensorrt"] * 3


def test_new_weights_go_into_an_engine(plain: Any, plain_exported: Path, tmp_path: Path, recipe: EngineRecipe) -> None:
    manifest = export_engine(plain_exported, tmp_path / "out", dataclasses.replace(recipe, refit=True))
    (name,) = manifest.stats["engines"]
    unet = type(plain.unet).from_config(plain.unet.config)
    write_pipeline(tmp_path / "tuned", unet=unet, scheduler=plain.scheduler)
    for model in (str(tmp_path / "tuned"), str(plain.directory)):  # and back again
        refit(tmp_path / "out" / "unet" / name, model)
        assert verify_directory(tmp_path / "out", backend="trt", device=None)["verdict"] == "passed"
        sample, timestep = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 70.0])
        with open_denoiser(tmp_path / "out", "trt") as denoiser, torch.no_grad():
            expected = load_model(model).unet(sample, timestep).sample
            torch.testing.assert_close(denoiser(sample, timestep).cpu(), expected, rtol=1e-3, atol=1e-4)
