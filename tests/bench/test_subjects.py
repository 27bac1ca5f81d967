from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpctl import cost
from dpctl.bench import subjects
from dpctl.bench.measuring import order
from dpctl.errors import DpctlError
from dpctl.progress import no_bar
from dpctl.prune import prune
from dpctl.recipe import BenchRecipe, PruneRecipe


@pytest.mark.parametrize(
    ("sources", "expected"),
    [
        (["reference", "runs/a/tuned"], ["reference", "tuned"]),
        (["a/tuned", "b/tuned/"], ["a/tuned", "b/tuned"]),
        (["x/tuned", "x/tuned"], ["tuned", "tuned (2)"]),
        (["owner/name", "./slim"], ["name", "slim"]),
        (["."], ["."]),
    ],
)
def test_names_are_short_and_differ(sources: list[str], expected: list[str]) -> None:
    assert subjects.names(sources) == expected


def test_a_model_without_manifest_is_counted_once(
    toy_pipeline: Path, toy_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, positions = [], cost.positions
    monkeypatch.setattr(cost, "positions", lambda unet: passes.append(unet) or positions(unet))
    (model,) = subjects.describe(BenchRecipe(baseline=str(toy_pipeline)))
    assert len(passes) == 1
    assert model.module_macs == cost.macs_by_module(toy_model.unet)
    assert (model.kind, model.lineage) == ("foreign", ())
    assert model.params == cost.parameters(toy_model.unet)
    assert model.macs == cost.macs(toy_model.unet).linear
    assert model.digest == toy_model.digest
    assert model.file_bytes > 4 * model.params
    assert (model.widths, model.sensitivity) == ({}, None)


def test_a_pruned_model_brings_its_widths_and_its_scan(toy_pipeline: Path, toy_images: Path, tmp_path: Path) -> None:
    recipe = PruneRecipe("magnitude", ratio=0.5, sensitivity=True, data=str(toy_images))
    stats = prune(str(toy_pipeline), tmp_path / "slim", recipe).stats
    _, model = subjects.describe(BenchRecipe(baseline=str(toy_pipeline), candidates=(str(tmp_path / "slim"),)))
    assert {name: list(pair) for name, pair in model.widths.items()} == stats["widths"]
    assert model.sensitivity == stats["sensitivity"]


def test_models_of_another_size_are_refused(toy_pipeline: Path, make_unet: Callable[..., Any], tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(make_unet(sample_size=16), DDPMScheduler()).save_pretrained(tmp_path / "larger")
    models = subjects.describe(BenchRecipe(baseline=str(toy_pipeline), candidates=(str(tmp_path / "larger"),)))
    with pytest.raises(DpctlError, match="other pictures"):
        subjects.require_one_shape(models)


def test_each_round_begins_with_another_and_turns_around() -> None:
    runs: Any = ["a", "b", "c"]
    orders = ["".join(order(runs, number)) for number in range(4)]
    assert orders == ["abc", "acb", "cab", "cba"]


def test_an_engine_is_made_from_the_cached_export_and_found_again(
    toy_pipeline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'dpctl-diffusion[rtx]'")
    import torch

    from runtime.backends import trt

    (model,) = subjects.describe(BenchRecipe(baseline=str(toy_pipeline)))
    with pytest.raises(DpctlError, match="NVIDIA GPU"):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        subjects.cached_engine(model, 2, no_bar)
    monkeypatch.setattr(trt, "find_gpu", lambda name: torch.device("cpu"))
    monkeypatch.setattr(trt, "name_of", lambda device: "NVIDIA L4")
    made = subjects.cached_engine(model, 2, no_bar)
    assert list((made / "unet").glob("*.engine"))
    monkeypatch.setattr("export.engines.export_engine", lambda *_, **__: pytest.fail("built again"))
    assert subjects.cached_engine(model, 2, no_bar) == made
    assert subjects.cached_export(model, 2, no_bar) != made
