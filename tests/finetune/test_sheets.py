"""Sample sheets: what they show is what the weights draw, and the training does not notice them."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpctl.artifact import read_manifest, verify_files
from dpctl.data import save_picture
from dpctl.finetune import finetune, sheets, train
from dpctl.models import copy_components, load_model
from dpctl.recipe import FinetuneRecipe, TrainRecipe
from runtime.backends.eager import EagerDenoiser
from runtime.sampler import sample
from runtime.schedulers import make_scheduler


def drawn(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).copy()


def row(model: Any) -> np.ndarray:
    """Return what a finished model draws from the noise of seed 0, beside one another."""
    scheduler = make_scheduler("ddim", model.scheduler.config)
    images = sample(EagerDenoiser(model.unet), scheduler, seed=0, indices=range(8), num_inference_steps=20)
    return np.concatenate(list(((images[:, 0].clamp(-1, 1) + 1) * 127.5).round().byte().numpy()), axis=1)


def weights(directory: Path) -> bytes:
    return next((directory / "unet").glob("*.safetensors")).read_bytes()


def test_training_does_not_notice_the_sheets(
    family: Path, tuning: Callable[..., FinetuneRecipe], tmp_path: Path
) -> None:
    # The random state of torch may be read by whatever comes after a step: it is the same, too.
    states = []
    for name, every in (("without", 0), ("with", 1)):
        finetune(str(family / "pruned"), tmp_path / name, tuning(sample_every=every, checkpoint_every=100))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    assert (tmp_path / "with/losses.json").read_text() == (tmp_path / "without/losses.json").read_text()
    assert not (tmp_path / "without/progress.png").exists()


def test_a_sheet_has_the_teacher_above_the_averaged_weights(
    family: Path,
    tuning: Callable[..., FinetuneRecipe],
    tmp_path: Path,
    stopping: Callable[[int], AbstractContextManager[Any]],
) -> None:
    out = tmp_path / "out"
    recipe = tuning(sample_every=3, checkpoint_every=2)
    with stopping(3) as bar:
        finetune(str(family / "pruned"), out, recipe, bar=bar)
    sheet = drawn(tmp_path / "out.checkpoints/samples/step-00000003.png")
    assert [p.name for p in (tmp_path / "out.checkpoints/samples").iterdir()] == ["step-00000003.png"]

    finetune(str(family / "pruned"), out, recipe, resume=True)
    teacher, tuned = row(load_model(family / "teacher")), row(load_model(out))
    assert not np.array_equal(teacher, tuned)
    np.testing.assert_array_equal(sheet, np.concatenate([teacher, tuned]))


def test_sheets_survive_a_resume_and_end_in_one_strip(
    training: Callable[..., TrainRecipe], tmp_path: Path, stopping: Callable[[int], AbstractContextManager[Any]]
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    recipe = training(sample_every=2, steps=5)
    train(whole, recipe)
    with stopping(4) as bar:
        train(cut, recipe, bar=bar)
    train(cut, recipe, resume=True)
    assert drawn(cut / "progress.png").shape == (3 * (64 + sheets.GAP), sheets.LABEL + 8 * (64 + sheets.GAP))
    assert (cut / "progress.png").read_bytes() == (whole / "progress.png").read_bytes()
    assert not (tmp_path / "cut.checkpoints").exists()  # the sheets are in the strip

    manifest = read_manifest(cut)
    assert manifest is not None
    assert "progress.png" in manifest.files
    verify_files(cut, manifest)
    copy_components(cut, tmp_path)
    assert not (tmp_path / "progress.png").exists()  # it is not of what is made from this model


def test_a_strip_shows_a_few_of_many_sheets(tmp_path: Path, toy_unet: Any) -> None:
    for step in range(100):
        save_picture(np.full((8, 64, 1), 2 * step, dtype=np.uint8), tmp_path / f"samples/step-{step:08d}.png")
    strip = np.asarray(sheets.strip(tmp_path, toy_unet.config))
    tall = 64 + sheets.GAP
    greys = strip[10::tall, sheets.LABEL + 10].tolist()
    assert len(greys) == sheets.MOST_ROWS
    assert (greys[0], greys[-1]) == (0, 198)
    assert greys == sorted(set(greys))


@pytest.mark.parametrize(
    ("config", "decoder", "got"),
    [({"num_class_embeds": 10}, None, "num_class_embeds 10"), ({"cross_attention_dim": 768}, "vae", "a vae")],
)
def test_other_models_are_refused_only_where_sheets_are_asked_for(
    config: dict[str, Any], decoder: str | None, got: str, refused: Callable[..., AbstractContextManager[None]]
) -> None:
    sheets.check(config, decoder, 0)
    with refused("sample sheets are drawn of unconditional pixel models only", got=got, todo="--sample-every"):
        sheets.check(config, decoder, 5)


def test_a_network_that_draws_no_numbers_yet_has_no_sheet(tmp_path: Path, make_tiny: Any, scheduler: Any) -> None:
    unet = make_tiny()
    drawing = sheets.Sheets(scheduler, None, tmp_path, every=1, seed=0)
    assert drawing._row(unet) is not None
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)
    assert drawing._row(unet) is None
