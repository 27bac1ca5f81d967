"""Captions: what is cached is what the pipeline's own encode_prompt gives, left out as often as asked."""

import gc
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from toys import save_photos, save_textual

from dpctl.data import TrainingSet, open_data, open_training_set
from dpctl.diffusion import noise_for, sample_generator
from dpctl.errors import DpctlError
from dpctl.finetune.loss import Objective
from dpctl.models import load_model
from dpctl.recipe import LoopRecipe

SD, XL = "StableDiffusionPipeline", "StableDiffusionXLPipeline"
CAPTIONS = ["a red cat", "a dog", "two birds"] * 3


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {kind: save_textual(folder / kind, kind) for kind in (SD, XL)}


@pytest.fixture
def opened(pipelines: dict[str, Path], photos: Path, tmp_path: Path) -> Callable[..., TrainingSet]:
    def make(kind: str, directory: Path | None = None, **changed: Any) -> TrainingSet:
        recipe = LoopRecipe(data=str(photos), **changed)
        return open_training_set(load_model(directory or pipelines[kind]), recipe, cache=tmp_path / "cache")

    return make


def generators(count: int, first: int = 0) -> list[torch.Generator]:
    return [sample_generator(0, first + index, "data") for index in range(count)]


@torch.no_grad()
def encoded(directory: Path, kind: str, captions: list[str]) -> dict[str, list[torch.Tensor]]:
    """Return what stock diffusers makes of captions: with them, and in the place of them."""
    pipe = getattr(diffusers, kind).from_pretrained(directory)
    found = pipe.encode_prompt(captions, "cpu" if kind == SD else None, num_images_per_prompt=1,
                               do_classifier_free_guidance=True)  # fmt: skip
    return {"given": list(found[::2]), "empty": list(found[1::2])}


@pytest.mark.parametrize("kind", [SD, XL])
def test_embeddings_are_those_of_the_pipeline(
    opened: Callable[..., TrainingSet], pipelines: dict[str, Path], kind: str
) -> None:
    conditions = opened(kind).plain(range(8)).conditions
    names = ["encoder_hidden_states", "text_embeds"][: 1 if kind == SD else 2]
    assert set(conditions) == {*names, *(["time_ids"] if kind == XL else [])}
    for name, expected in zip(names, encoded(pipelines[kind], kind, CAPTIONS[:8])["given"], strict=True):
        torch.testing.assert_close(conditions[name], expected)
        assert (expected[0] - expected[1]).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "zeros"), [(SD, False), (XL, False), (XL, True)])
def test_a_caption_that_is_left_out_is_what_guidance_puts_in_its_place(
    opened: Callable[..., TrainingSet], pipelines: dict[str, Path], tmp_path: Path, kind: str, zeros: bool
) -> None:
    directory = shutil.copytree(pipelines[kind], tmp_path / "model")
    if kind == XL:
        index = directory / "model_index.json"
        flag = '"force_zeros_for_empty_prompt": '
        assert f"{flag}true" in index.read_text()
        index.write_text(index.read_text().replace(f"{flag}true", f"{flag}{str(zeros).lower()}"))
    batch = opened(kind, directory, condition_dropout=0.999).batch(range(8), generators(8))
    names = ("encoder_hidden_states", "text_embeds")
    for name, expected in zip(names, encoded(directory, kind, CAPTIONS[:8])["empty"], strict=False):
        torch.testing.assert_close(batch.conditions[name], expected)
        assert (expected.abs().max() == 0) == zeros


def test_captions_are_left_out_as_often_as_asked_and_the_same_ones_each_time(
    opened: Callable[..., TrainingSet],
) -> None:
    examples = opened(SD, condition_dropout=0.3)
    given = examples.plain([2]).conditions["encoder_hidden_states"][0]
    drawn = [examples.batch([2], generators(1, index)).conditions["encoder_hidden_states"][0] for index in range(600)]
    left_out = torch.tensor([float(not torch.equal(each, given)) for each in drawn])
    # Five deviations of a binomial.
    assert abs(left_out.mean() - 0.3) < 5 * (0.3 * 0.7 / 600) ** 0.5
    together = examples.batch([2] * 600, generators(600)).conditions["encoder_hidden_states"]
    assert torch.equal(together, torch.stack(drawn))
    kept = opened(SD, condition_dropout=0.0).batch([2] * 100, generators(100)).conditions["encoder_hidden_states"]
    assert torch.equal(kept, given.expand_as(kept))


def test_dropout_changes_neither_the_flip_nor_the_noise(opened: Callable[..., TrainingSet]) -> None:
    one, other = (opened(SD, condition_dropout=rate).batch(range(8), generators(8)) for rate in (0.0, 0.9))
    assert torch.equal(one.clean, other.clean)
    assert not torch.equal(one.conditions["encoder_hidden_states"], other.conditions["encoder_hidden_states"])


def test_time_ids_are_those_of_the_pipeline(
    opened: Callable[..., TrainingSet], pipelines: dict[str, Path], photos: Path
) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(pipelines[XL])
    frames = open_data(str(photos), channels=3, size=(16, 16)).read(range(8)).frames.tolist()
    width = pipe.text_encoder_2.config.projection_dim
    expected = [
        pipe._get_add_time_ids((h, w), (top, left), (16, 16), torch.float32, width) for h, w, top, left in frames
    ]
    found = opened(XL).plain(range(8)).conditions["time_ids"]
    assert torch.equal(found, torch.cat(expected))
    assert len({tuple(row) for row in found.tolist()}) > 3
    # The crop of what was mirrored first.
    mirrored = opened(XL).batch(range(8), generators(8)).conditions["time_ids"]
    assert not torch.equal(found[:, 3], mirrored[:, 3])
    assert torch.equal(found[:, [0, 1, 2, 4, 5]], mirrored[:, [0, 1, 2, 4, 5]])


@pytest.mark.parametrize("kind", [SD, XL])
def test_the_training_loss_takes_a_batch(
    opened: Callable[..., TrainingSet], pipelines: dict[str, Path], kind: str
) -> None:
    model = load_model(pipelines[kind])
    batch = opened(kind).batch(range(4), generators(4))
    noise = noise_for(0, range(4), batch.clean.shape[1:])
    loss = Objective(model.scheduler)(model.unet, batch, noise, torch.tensor([0, 10, 500, 999]))
    loss.mean().backward()
    for parameter in (
        model.unet.conv_in.weight,
        model.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.to_k.weight,
    ):
        assert parameter.grad.abs().max() > 0


def test_text_encoders_and_vae_do_not_stay_in_memory(opened: Callable[..., TrainingSet]) -> None:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    kinds = (CLIPTextModel, CLIPTextModelWithProjection, diffusers.AutoencoderKL)

    def alive() -> list[str]:
        gc.collect()
        return [type(each).__name__ for each in gc.get_objects() if type(each) in kinds]

    before = alive()
    examples = opened(XL)
    assert len(examples) == 8
    assert alive() == before


def test_each_caption_is_encoded_once(
    opened: Callable[..., TrainingSet], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    asked: list[str] = []
    original = diffusers.StableDiffusionPipeline.encode_prompt

    def noting(self: Any, prompt: list[str], *args: Any, **kwargs: Any) -> Any:
        asked.extend(prompt)
        return original(self, prompt, *args, **kwargs)

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "encode_prompt", noting)
    opened(SD)
    # The empty one twice: its first row tells what the disk has to hold.
    assert asked == ["", "", "a dog", "a red cat", "two birds"]
    assert f"embeddings of 3 captions: {4 * 77 * 24 * 4 / 1e3:.1f} kB in" in capsys.readouterr().err
    opened(SD)
    assert len(asked) == 5


def test_captions_that_are_too_long_are_told(
    pipelines: dict[str, Path], photos: Path, tmp_path: Path, capsys: Any
) -> None:
    data = shutil.copytree(photos, tmp_path / "photos")
    told = (data / "metadata.jsonl").read_text()
    (data / "metadata.jsonl").write_text(told.replace("two birds", "b" * 100))
    open_training_set(load_model(pipelines[SD]), LoopRecipe(data=str(data)), cache=tmp_path / "cache")
    said = capsys.readouterr().err
    assert "1 of 3 captions have more than 77 tokens" in said
    assert "truncated" not in said


# --- what is refused ----------------------------------------------------------------------------------------------


def test_images_without_captions_are_refused_before_anything_is_encoded(
    pipelines: dict[str, Path], tmp_path: Path
) -> None:
    data = save_photos(tmp_path / "photos", captions=False)
    with pytest.raises(DpctlError, match="no captions for a text model"):
        open_training_set(load_model(pipelines[SD]), LoopRecipe(data=str(data)), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_another_text_pipeline_is_refused(pipelines: dict[str, Path], photos: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(pipelines[SD], tmp_path / "model")
    index = directory / "model_index.json"
    index.write_text(index.read_text().replace(f'"{SD}"', '"StableDiffusionImg2ImgPipeline"'))
    with pytest.raises(DpctlError, match="texts of this pipeline cannot be encoded") as caught:
        open_training_set(load_model(directory), LoopRecipe(data=str(photos)), cache=tmp_path / "cache")
    assert "StableDiffusionXLPipeline" in caught.value.todo


def test_text_encoders_that_do_not_fit_are_refused(photos: Path, tmp_path: Path) -> None:
    directory = save_textual(tmp_path / "model", SD, cross_attention_dim=32)
    with pytest.raises(DpctlError, match="text encoders do not fit the network") as caught:
        open_training_set(load_model(directory), LoopRecipe(data=str(photos)), cache=tmp_path / "cache")
    assert "width 24, the network takes 32" in caught.value.got
