"""Whole finetunings of every kind of pipeline, and of images that the teacher has drawn."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from toys import PIPELINES

import runtime
from dpctl.data import open_training_set
from dpctl.errors import DpctlError
from dpctl.finetune import drawn, finetune
from dpctl.models import LOSSES, load_model
from dpctl.prune import prune
from dpctl.recipe import FinetuneRecipe, PruneRecipe
from runtime.pipeline import draw_images


def recipe_of(data: object, **changed: Any) -> FinetuneRecipe:
    few = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 1, "drawn": 5, "drawn_steps": 2}
    return FinetuneRecipe(**({"data": str(data)} | few | changed))


@pytest.mark.parametrize("name", PIPELINES)
def test_every_kind_of_pipeline_is_pruned_finetuned_and_still_one(
    saved_pipeline: Callable[[str], Path], photos: Path, tmp_path: Path, name: str
) -> None:
    teacher = saved_pipeline(name)
    prune(str(teacher), tmp_path / "pruned", PruneRecipe("magnitude", ratio=0.5, align=1))
    manifest = finetune(str(tmp_path / "pruned"), tmp_path / "tuned", recipe_of(photos))
    assert manifest is not None
    assert len(json.loads((tmp_path / "tuned" / LOSSES).read_text())) == 3
    before, after = (load_model(tmp_path / each).unet.state_dict() for each in ("pruned", "tuned"))
    assert any(not torch.equal(before[key], after[key]) for key in before)
    assert (tmp_path / "tuned" / "model_index.json").is_file()
    if name != "labelled":  # which no pipeline of diffusers draws
        pipe = runtime.load_pipeline(tmp_path / "tuned")
        prompts = ["a dog"] if name.startswith("sd") else None
        assert draw_images(pipe, seed=0, indices=[0], num_inference_steps=2, prompts=prompts).shape == (1, 3, 16, 16)


@pytest.mark.parametrize("name", PIPELINES)
def test_the_loss_falls_on_few_images(
    saved_pipeline: Callable[[str], Path], photos: Path, tmp_path: Path, name: str
) -> None:
    recipe = recipe_of(photos, steps=60, batch_size=8, learning_rate=1e-2, distillation=0.0, flip=False)
    finetune(str(saved_pipeline(name)), tmp_path / "tuned", dataclasses.replace(recipe, checkpoint_every=1000))
    losses = json.loads((tmp_path / "tuned" / LOSSES).read_text())
    assert np.mean(losses[-15:]) < 0.8 * np.mean(losses[:15])


# --- what the teacher draws ---------------------------------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a red cat\na dog\n")
    return path


@pytest.mark.parametrize("name", ["sd", "quantized"])
def test_the_teacher_draws_what_its_own_pipeline_draws(
    saved_pipeline: Callable[[str], Path], prompts: Path, tmp_path: Path, name: str
) -> None:
    teacher = load_model(saved_pipeline(name))
    given = {"prompts": str(prompts)} if name == "sd" else {}
    folder = drawn.draw(teacher, recipe_of("teacher", seed=3, **given), tmp_path / "cache")
    assert sorted(path.name for path in folder.glob("*.png")) == [f"00000{n}.png" for n in range(5)]
    lines = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    texts = ["a red cat", "a dog", "a red cat", "a dog", "a red cat"]
    assert [line.get("text") for line in lines] == (texts if name == "sd" else [None] * 5)

    pipe = diffusers.DiffusionPipeline.from_pretrained(teacher.directory)
    pipe.set_progress_bar_config(disable=True)
    asked: dict[str, Any] = {"prompt": [texts[3]]} if name == "sd" else {"batch_size": 1}
    image = pipe(**asked, num_inference_steps=2, generator=runtime.image_generators(3, [3]), output_type="np").images[0]
    found = np.asarray(Image.open(folder / "000003.png"))
    # In another batch: rounding may move a value by one, and a quantized latent to the next code.
    assert (np.abs(found - (image * 255).round()) <= 1).mean() > 0.99


def test_unconditional_and_labelled_networks_draw_too(
    toy_pipeline: Path, make_unet: Callable[..., Any], tmp_path: Path
) -> None:
    plain = load_model(toy_pipeline)
    folder = drawn.draw(plain, recipe_of("teacher"), tmp_path / "cache")
    images = runtime.sample(
        runtime.open_denoiser(toy_pipeline).__enter__(), plain.scheduler, seed=0, indices=[2], num_inference_steps=2
    )
    pixels = ((images[0, 0] + 1) * 127.5).round().numpy()
    assert np.abs(np.asarray(Image.open(folder / "000002.png")) - pixels).max() <= 1
    examples = open_training_set(plain, recipe_of(folder), cache=tmp_path / "cache")
    assert examples.plain([2]).clean.shape == (1, 1, 8, 8)

    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)
    unet = make_unet(num_class_embeds=3)
    unet.save_pretrained(tmp_path / "model" / "unet")
    scheduler.save_pretrained(tmp_path / "model" / "scheduler")
    labelled = load_model(tmp_path / "model")
    folder = drawn.draw(labelled, recipe_of("teacher"), tmp_path / "cache")
    examples = open_training_set(labelled, recipe_of(folder), cache=tmp_path / "cache")
    assert examples.plain(range(5)).conditions["class_labels"].tolist() == [0, 1, 2, 0, 1]


def test_what_was_drawn_is_drawn_once_and_goes_on_after_a_kill(
    saved_pipeline: Callable[[str], Path], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, recipe = load_model(saved_pipeline("sd")), recipe_of("teacher", prompts=str(prompts))
    whole = drawn.draw(teacher, recipe, tmp_path / "whole")
    monkeypatch.setattr(drawn, "TOGETHER", 2)
    asked: list[list[int]] = []
    painted = drawn._painted

    def counted(*args: Any) -> Any:
        asked.append(list(args[-1]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return painted(*args)

    monkeypatch.setattr(drawn, "_painted", counted)
    with pytest.raises(KeyboardInterrupt):
        drawn.draw(teacher, recipe, tmp_path / "cache")
    (making,) = (tmp_path / "cache").iterdir()
    assert making.name.endswith(".making")
    (making / "000001.png").unlink()
    again = drawn.draw(teacher, recipe, tmp_path / "cache")
    assert asked == [[0, 1], [2, 3], [4], [0, 1], [4]]
    assert drawn.draw(teacher, recipe, tmp_path / "cache") == again
    assert len(asked) == 5
    for path in whole.glob("*.png"):
        one, other = (np.asarray(Image.open(folder / path.name)).astype(int) for folder in (whole, again))
        assert np.abs(one - other).max() <= 1


def test_finetuning_on_what_the_teacher_draws(
    saved_pipeline: Callable[[str], Path], prompts: Path, tmp_path: Path
) -> None:
    prune(str(saved_pipeline("sd")), tmp_path / "pruned", PruneRecipe("magnitude", ratio=0.5, align=1))
    # The teacher draws also where nothing is distilled.
    recipe = recipe_of("teacher", prompts=str(prompts), distillation=0.0)
    manifest = finetune(str(tmp_path / "pruned"), tmp_path / "tuned", recipe)
    assert manifest is not None
    assert manifest.recipe["data"] == "teacher"


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sd", {}, "draws what a text says"),
        ("quantized", {"prompts": True}, "takes no text"),
        ("labelled", {}, "draws no classes"),
        ("sd", {"prompts": True, "data": "reference"}, "prompts are what the teacher draws"),
        ("sd", {"prompts": True, "drawn": 0}, "drawn is out of range"),
        ("sd", {"prompts": True, "drawn_steps": 0}, "drawn steps is out of range"),
    ],
)
def test_what_cannot_be_drawn(
    saved_pipeline: Callable[[str], Path], prompts: Path, tmp_path: Path, name: str, given: dict[str, Any], message: str
) -> None:
    given = given | ({"prompts": str(prompts)} if given.get("prompts") else {})
    with pytest.raises(DpctlError, match=message):
        recipe = recipe_of(**({"data": "teacher", "teacher": str(saved_pipeline(name))} | given))
        finetune(str(saved_pipeline(name)), tmp_path / "tuned", recipe)
    assert not (tmp_path / "tuned").exists()
