"""Sample sheets of models with a pipeline: pictures are what the pipeline draws with the averaged weights."""

import gc
import json
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from toys import PIPELINES, save_latent, save_textual

import runtime
from dpctl.data import open_training_set, to_bytes
from dpctl.finetune import finetune, painting, sheets
from dpctl.finetune.painting import InPipeline
from dpctl.models import load_model
from dpctl.prune import prune
from dpctl.recipe import FinetuneRecipe, PruneRecipe

CAPTIONS = ("a red cat", "a dog", "two birds")


def recipe_of(data: object, **changed: Any) -> FinetuneRecipe:
    few = {"steps": 3, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 1, "sample_every": 2}
    return FinetuneRecipe(**({"data": str(data)} | few | changed))


def expected(directory: Path, prompts: tuple[str, ...] = CAPTIONS) -> np.ndarray:
    """Return what stock diffusers draws with a model beside one another."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(directory, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    textual = "prompt" in pipe.__call__.__annotations__
    asked: dict[str, Any] = {"prompt": [prompts[n % len(prompts)] for n in range(8)]} if textual else {"batch_size": 8}
    if classes := pipe.unet.config.get("num_class_embeds"):  # no pipeline tells them
        pipe.unet.forward = partial(pipe.unet.forward, class_labels=torch.arange(8) % classes)
    asked |= {"num_inference_steps": 20, "output_type": "np", "generator": runtime.image_generators(0, range(8))}
    if not textual:  # latent diffusion's scale their noise before they say how many steps there are
        pipe.scheduler.set_timesteps(20)
    pixels: np.ndarray = np.concatenate(list(pipe(**asked).images), axis=1)
    return pixels * 255


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    # Rounding may move a value by one, and a quantized latent to the next code.
    return one.shape == other.shape and bool((np.abs(one.astype(float) - other) <= 1).mean() > 0.99)


def weights(directory: Path) -> bytes:
    return next((directory / "unet").glob("diffusion*.safetensors")).read_bytes()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in ("sd", "quantized") else ()) for name in PIPELINES],
)
def test_a_sheet_is_what_the_pipelines_draw_and_the_training_does_not_notice(
    saved_pipeline: Callable[[str], Path],
    photos: Path,
    tmp_path: Path,
    stopping: Callable[[int], AbstractContextManager[Any]],
    name: str,
) -> None:
    teacher, model = saved_pipeline(name), str(tmp_path / "pruned")
    prune(str(teacher), tmp_path / "pruned", PruneRecipe("magnitude", ratio=0.5, align=1))
    states = []
    for out, every in (("without", 0), ("with", 2)):
        finetune(model, tmp_path / out, recipe_of(photos, sample_every=every))
        states.append(torch.get_rng_state())
    assert torch.equal(*states)
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    assert (tmp_path / "with/losses.json").read_text() == (tmp_path / "without/losses.json").read_text()

    with stopping(3) as bar:
        finetune(model, tmp_path / "cut", recipe_of(photos), bar=bar)
    with Image.open(tmp_path / "cut.checkpoints/samples/step-00000003.png") as image:
        sheet = np.asarray(image)
    finetune(model, tmp_path / "cut", recipe_of(photos), resume=True)
    assert (tmp_path / "cut/progress.png").read_bytes() == (tmp_path / "with/progress.png").read_bytes()
    assert sheet.shape == (32, 8 * 16, 3)
    assert alike(sheet[:16], expected(teacher))
    assert alike(sheet[16:], expected(tmp_path / "cut"))
    with Image.open(tmp_path / "cut/progress.png") as strip:
        assert strip.size == (sheets.LABEL + 8 * (64 + sheets.GAP), 3 * (64 + sheets.GAP))


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a bird\n\na red dog\n")
    return path


def test_prompts_take_the_place_of_captions(
    saved_pipeline: Callable[[str], Path], photos: Path, prompts: Path, tmp_path: Path
) -> None:
    model = load_model(saved_pipeline("sd"))
    examples = open_training_set(model, recipe_of(photos), cache=tmp_path / "cache")
    for given, texts in ((None, CAPTIONS), (str(prompts), ("a bird", "a red dog"))):
        recipe = recipe_of(photos, prompts=given)
        paint = painting.open_paint(model, recipe, painting.check(model, recipe), examples)
        assert isinstance(paint, InPipeline)
        assert paint.prompts == texts
        assert alike(np.concatenate(list(to_bytes(paint(model.unet))), 1), expected(model.directory, texts))
    assert painting.open_paint(model, recipe_of(photos, sample_every=0), (), examples) is None


def test_between_two_sheets_a_pipeline_takes_no_memory(saved_pipeline: Callable[[str], Path]) -> None:
    def held() -> int:
        gc.collect()
        kinds = (diffusers.StableDiffusionPipeline, diffusers.AutoencoderKL)
        return sum(isinstance(thing, kinds) for thing in gc.get_objects() if type(thing) in kinds)

    directory = saved_pipeline("sd")
    unet, before = load_model(directory).unet, held()
    paint = InPipeline(directory, ("a dog",), seed=0)
    with painting._opened(directory, painting.Numbered(unet)) as pipe:
        assert held() == before + 2
        del pipe
    assert paint(unet).shape == (8, 3, 16, 16)
    assert held() == before


def test_few_large_pictures_are_drawn_at_a_time(
    saved_pipeline: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, texts in (("labelled", ()), ("sd", CAPTIONS)):
        unet = load_model(saved_pipeline(name)).unet
        paint = InPipeline(saved_pipeline(name), texts, seed=0)
        whole = paint(unet)
        with monkeypatch.context() as patch:
            patch.setattr(painting, "PIXELS_TOGETHER", 3 * 16 * 16)
            torch.testing.assert_close(paint(unet), whole, atol=1e-3, rtol=1e-3)


def test_a_text_model_need_not_draw_squares(tmp_path: Path) -> None:
    directory = save_textual(tmp_path / "wide", sample_size=(8, 16))
    assert InPipeline(directory, ("a dog",), seed=0)(load_model(directory).unet).shape == (8, 3, 16, 32)


def test_a_vae_makes_no_sheet_of_what_is_not_finite(
    saved_pipeline: Callable[[str], Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    directory = saved_pipeline("quantized")
    drawing = sheets.Sheets(InPipeline(directory, (), seed=0), None, tmp_path, every=1)
    unet = load_model(directory).unet
    assert drawing._row(unet, 7) is not None
    with torch.no_grad():
        unet.conv_out.bias.fill_(torch.nan)
    assert drawing._row(unet, 7) is None
    assert "no sample sheet of step 7: the images are not finite" in capsys.readouterr().err


# --- what cannot be drawn -----------------------------------------------------------------------------------------


def index(directory: Path, **entries: Any) -> None:
    path = directory / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def without_safetensors(directory: Path) -> None:
    (directory / "vqvae/diffusion_pytorch_model.safetensors").rename(directory / "vqvae/diffusion_pytorch_model.bin")


def oblong(directory: Path) -> None:
    shutil.rmtree(directory)
    save_latent(directory, sample_size=(8, 16))


def impossible_grid(directory: Path) -> None:
    # A consistency model whose grid is finer than the 1,000 timesteps that it has.
    config = {"_class_name": "LCMScheduler", "original_inference_steps": 2000}
    (directory / "scheduler/scheduler_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "given", "message", "got"),
    [
        (partial(index, _class_name="MyPipeline"), {}, "no sample sheets: unknown pipeline", "MyPipeline"),
        (
            partial(index, _class_name="LDMSuperResolutionPipeline"),
            {},
            "no sample sheets: the pipeline draws something",
            "LDMSuperResolution",
        ),
        (partial(index, vqvae=["mine", "VAE"]), {}, "no sample sheets: a component is not of diffusers", "mine"),
        (without_safetensors, {}, "no sample sheets: the pipeline cannot be loaded", "safetensors"),
        (oblong, {}, "no sample sheets: LDMPipeline draws squares only", "[8, 16]"),
        (impossible_grid, {}, "no sample sheets: the pipeline's scheduler refuses the steps", "LCMScheduler"),
        (None, {"prompts": "prompts.txt"}, "the model takes no text", "--prompts"),
        (None, {"prompts": "missing.txt"}, "the prompts cannot be read", "missing.txt"),
    ],
)
def test_what_cannot_be_drawn_is_said_before_the_data_are_read(
    saved_pipeline: Callable[[str], Path],
    prompts: Path,
    refused: Callable[..., AbstractContextManager[None]],
    tmp_path: Path,
    damage: Callable[[Path], None] | None,
    given: dict[str, str],
    message: str,
    got: str,
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(saved_pipeline("quantized"), directory)
    if damage is not None:
        damage(directory)
    told = {name: str(prompts.with_name(value)) for name, value in given.items()}
    recipe = recipe_of(tmp_path / "no such data", distillation=0.0, **told)
    with refused(message, got=got):
        finetune(str(directory), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


def test_without_sheets_the_pipeline_need_not_draw(
    saved_pipeline: Callable[[str], Path], refused: Callable[..., AbstractContextManager[None]], tmp_path: Path
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(saved_pipeline("quantized"), directory)
    index(directory, _class_name="MyPipeline")
    with refused("no such data"):
        finetune(str(directory), tmp_path / "out", recipe_of(tmp_path / "data", distillation=0.0, sample_every=0))
