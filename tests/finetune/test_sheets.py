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
from dpctl.data import save_picture, to_bytes
from dpctl.errors import DpctlError
from dpctl.finetune import finetune, sheets, train
from dpctl.finetune.painting import OverPixels
from dpctl.finetune.state import Ema, State
from dpctl.finetune.timesteps import make_timesteps
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


def test_a_strip_shows_pictures_from_latents_at_a_size_for_pages(tmp_path: Path, toy_unet: Any) -> None:
    # Networks of one shape of latents, 8x16, whose VAEs make pictures of 16x32, of 96x192 and of 160x320.
    toy_unet.register_to_config(sample_size=(8, 16))
    for scale, wide in ((2, 64), (12, 128), (20, 128)):
        folder = tmp_path / str(scale)
        rows = [np.full((8 * scale, 8 * 16 * scale, 3), grey, dtype=np.uint8) for grey in (50, 100)]
        save_picture(np.concatenate(rows), folder / "samples/step-00000002.png")
        save_picture(np.concatenate([rows[0], rows[1] * 2]), folder / "samples/step-00000004.png")
        strip = np.asarray(sheets.strip(folder, toy_unet.config))
        wide, tall = wide + sheets.GAP, wide // 2 + sheets.GAP
        assert strip.shape == (3 * tall, sheets.LABEL + 8 * wide, 3)
        assert strip[10::tall, sheets.LABEL + 10 :: wide, 0].tolist() == [[50] * 8, [100] * 8, [200] * 8]


def test_networks_with_classes_show_one_after_the_other(
    training: Callable[..., TrainRecipe], make_tiny: Any, photos: Path, tmp_path: Path, stopping: Any
) -> None:
    make_tiny(in_channels=3, out_channels=3, num_class_embeds=5).save_pretrained(tmp_path / "config/unet")
    recipe = training(config=str(tmp_path / "config"), data=str(photos), sample_every=3, ema_decay=0.0)
    with stopping(3) as bar:
        train(tmp_path / "out", recipe, bar=bar)
    sheet = drawn(tmp_path / "out.checkpoints/samples/step-00000003.png")
    train(tmp_path / "out", recipe, resume=True)
    model = load_model(tmp_path / "out")
    conditions = {"class_labels": torch.tensor([0, 1, 2, 3, 4, 0, 1, 2])}
    asked: dict[str, Any] = {"seed": 0, "indices": range(8), "num_inference_steps": 20, "conditions": conditions}
    images = sample(EagerDenoiser(model.unet), make_scheduler("ddim", model.scheduler.config), **asked)
    np.testing.assert_array_equal(sheet, np.concatenate(list(to_bytes(images)), axis=1))


@pytest.mark.parametrize(
    "failing",
    [
        DpctlError("the images are not finite", "NaN", ""),
        torch.OutOfMemoryError("1 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_a_sheet_that_fails_is_said_and_the_training_goes_on(
    tmp_path: Path, make_tiny: Any, failing: Exception, capsys: pytest.CaptureFixture
) -> None:
    unet, teacher = make_tiny(0).train(), make_tiny(1)
    ema = Ema(make_tiny(2), 0.9, on_cpu=False)
    state = State(unet, None, None, make_timesteps("uniform", 0, 100), ema, losses=[0.1])
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    shown = []

    def paint(network: Any) -> torch.Tensor:
        torch.rand(())
        shown.append([p.clone() for p in network.eval().parameters()])
        if network is unet:
            raise failing
        return torch.zeros(8, 1, 8, 8)

    random = torch.get_rng_state()
    sheets.Sheets(paint, teacher, tmp_path, every=1).draw(state, done=False)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().err.startswith("no sample sheet of step 1: ")
    assert all(torch.equal(*pair) for pair in zip(shown[1], ema.shadows, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    assert all(module.training for module in unet.modules())
    assert torch.equal(torch.get_rng_state(), random)


def test_a_network_that_draws_no_numbers_yet_has_no_sheet(tmp_path: Path, make_tiny: Any, scheduler: Any) -> None:
    unet = make_tiny()
    drawing = sheets.Sheets(OverPixels(scheduler, seed=0), None, tmp_path, every=1)
    assert drawing._row(unet, 1) is not None
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)
    assert drawing._row(unet, 1) is None
