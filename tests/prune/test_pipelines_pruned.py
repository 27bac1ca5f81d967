"""Pipelines pruned by what their own data says: latents, classes and captions score, and their layers are refitted."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from toys import PIPELINES, save_photos

from dpctl import environment
from dpctl.data import latents, open_data, open_training_set
from dpctl.diffusion import denoising_loss, noise_for, sample_generator
from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.prune import prune, prune_unet, scan
from dpctl.prune.gradients import Draws, Weighting, each_gradient
from dpctl.recipe import LoopRecipe, PruneRecipe


def recipe_of(data: object, **changed: Any) -> PruneRecipe:
    few = {"criterion": "diff-pruning", "ratio": 0.5, "align": 1, "images": 6, "batch_size": 2, "timesteps": 4}
    return PruneRecipe(**({"data": str(data)} | few | changed))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_kind_of_pipeline_is_scored_and_refitted(
    saved_pipeline: Callable[[str], Path], photos: Path, tmp_path: Path, name: str
) -> None:
    manifest = prune(str(saved_pipeline(name)), tmp_path / "slim", recipe_of(photos))
    told = manifest.stats["compensation"]
    assert told["data"] == str(photos)
    fits = told["layers"].values()
    assert len(fits) > 5
    assert all(after < before for before, after in fits)
    assert told["loss"]["compensated"] > 0
    load_model(tmp_path / "slim")
    if name == "labelled":
        rows = scan(str(saved_pipeline(name)), str(photos))["rows"]
        assert rows
        assert all(row["loss"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["labelled", "sdxl"])
def test_a_gradient_is_that_of_the_conditional_loss(
    saved_pipeline: Callable[[str], Path], photos: Path, tmp_path: Path, name: str
) -> None:
    model = load_model(saved_pipeline(name))
    examples = open_training_set(model, LoopRecipe(data=str(photos), flip=False), cache=tmp_path)
    draws = Draws(4, 2, 2, 1, Weighting(), 0)
    scheduler = DDPMScheduler(num_train_timesteps=1)
    found: dict[str, torch.Tensor] = {}

    def keep() -> None:
        found.update({key: p.grad.clone() for key, p in model.unet.named_parameters() if p.grad is not None})

    each_gradient(model.unet, scheduler, examples, draws, keep)
    order = torch.randperm(8, generator=sample_generator(0, 0, "score-images"))[:4].tolist()
    batch = examples.plain(order)
    noise = noise_for(0, range(4), batch.clean.shape[1:], "score-noise")
    steps = torch.zeros(4, dtype=torch.long)
    denoising_loss(model.unet, scheduler, batch.clean, noise, steps, batch.conditions).mean().backward()
    told = "class_embedding.weight" if name == "labelled" else "add_embedding.linear_1.weight"
    for key in (told, "conv_in.weight"):
        expected = model.unet.get_parameter(key).grad
        assert expected.abs().max() > 0
        torch.testing.assert_close(found[key], expected, rtol=1e-4, atol=1e-6)


def test_the_sampler_of_the_pipeline_does_not_matter(saved_pipeline: Callable[[str], Path], photos: Path) -> None:
    model = load_model(saved_pipeline("sd"))
    euler = dataclasses.replace(model, scheduler=EulerDiscreteScheduler.from_config(model.scheduler.config))
    one, other = (prune_unet(each, recipe_of(photos)) for each in (model, euler))
    assert one.plan == other.plan
    assert one.stats["compensation"] == other.stats["compensation"]


def test_no_more_images_are_encoded_than_are_looked_at(
    saved_pipeline: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = save_photos(tmp_path / "many", count=40)
    encoded: list[int] = []
    original = latents._encoded

    def noting(vae: Any, images: Any, numbers: list[int], *more: Any) -> Any:
        encoded.extend(numbers)
        return original(vae, images, numbers, *more)

    monkeypatch.setattr(latents, "_encoded", noting)
    model = load_model(saved_pipeline("labelled"))
    prune_unet(model, recipe_of(many, compensate=False, images=20))
    numbers = sorted(set(encoded))
    assert len(numbers) == 20
    assert numbers != list(range(20))
    # Labels are those of the chosen images.
    recipe = LoopRecipe(data=str(many), flip=False)
    chosen = open_training_set(model, recipe, cache=environment.cache("data"), most=20)
    labels = open_data(str(many), channels=3, size=(16, 16)).labels(numbers)
    assert torch.equal(chosen.plain(range(20)).conditions["class_labels"], labels)
    assert len(encoded) == 21  # the first twice; nothing again


def test_without_labels_or_captions_it_is_told(saved_pipeline: Callable[[str], Path], tmp_path: Path) -> None:
    plain = save_photos(tmp_path / "plain", captions=False)
    with pytest.raises(DpctlError, match="no captions for a text model"):
        prune(str(saved_pipeline("sd")), tmp_path / "slim", recipe_of(plain))
    assert not (tmp_path / "slim").exists()
    assert not list(environment.cache("data").glob("*.making"))
