"""Images in latent space: what is cached is what the VAE makes, and training draws from it."""

import json
import os
import shutil
import threading
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from toys import save_latent, save_textual

from dpctl.data import Batch, TrainingSet, cache, latents, open_data, open_training_set
from dpctl.data.images import View
from dpctl.diffusion import noise_for, sample_generator
from dpctl.errors import DpctlError
from dpctl.finetune.loss import Objective
from dpctl.models import load_model
from dpctl.recipe import LoopRecipe

SIZE = (16, 16)


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pipelines")
    return {
        "quantized": save_latent(folder / "quantized"),
        "posterior": save_latent(folder / "posterior", "AutoencoderKL"),
        "labelled": save_latent(folder / "labelled", "AutoencoderKL", num_class_embeds=4),
    }


@pytest.fixture
def opened(pipelines: dict[str, Path], photos: Path, tmp_path: Path) -> Callable[..., TrainingSet]:
    def make(name: str, **changed: Any) -> TrainingSet:
        recipe = LoopRecipe(data=str(photos), **changed)
        return open_training_set(load_model(pipelines[name]), recipe, cache=tmp_path / "cache")

    return make


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [sample_generator(seed, index, "data") for index in range(count)]


def flips(drawn: list[torch.Generator]) -> list[bool]:
    return [float(torch.rand((), generator=generator)) < 0.5 for generator in drawn]


def pixels(photos: Path, views: list[View]) -> torch.Tensor:
    return open_data(str(photos), channels=3, size=SIZE).read(range(len(views)), views).pixels


def equal(one: Batch, other: Batch) -> bool:
    return torch.equal(one.clean, other.clean) and all(
        torch.equal(one.conditions[name], other.conditions[name]) for name in one.conditions | other.conditions
    )


@torch.no_grad()
def test_a_vq_models_latents_are_those_before_quantisation(
    opened: Callable[..., TrainingSet], pipelines: dict[str, Path], photos: Path
) -> None:
    vae = diffusers.VQModel.from_pretrained(pipelines["quantized"] / "vqvae")
    examples = opened("quantized")
    expected = vae.encode(pixels(photos, [View()] * 8)).latents * vae.config.scaling_factor
    torch.testing.assert_close(examples.plain(range(8)).clean, expected)

    views = [View(flip) for flip in flips(generators(8))]
    assert {view.flip for view in views} == {True, False}
    mirrored = vae.encode(pixels(photos, views)).latents * vae.config.scaling_factor
    torch.testing.assert_close(examples.batch(range(8), generators(8)).clean, mirrored)
    assert (mirrored - expected).abs().max() > 1e-2
    # A network is not its own mirror image: turning latents round would not do.
    turned = torch.stack([row.flip(-1) if view.flip else row for row, view in zip(expected, views, strict=True)])
    assert (mirrored - turned).abs().max() > 1e-3


@torch.no_grad()
def test_a_posterior_is_sampled_from_each_rows_own_generator(
    opened: Callable[..., TrainingSet], pipelines: dict[str, Path], photos: Path
) -> None:
    vae = diffusers.AutoencoderKL.from_pretrained(pipelines["posterior"] / "vqvae")
    examples = opened("posterior")
    drawn = generators(8)
    posterior = vae.encode(pixels(photos, [View(flip) for flip in flips(drawn)])).latent_dist
    noise = torch.stack([torch.randn(3, 8, 8, generator=generator) for generator in drawn])
    expected = (posterior.mean + posterior.std * noise) * vae.config.scaling_factor
    batch = examples.batch(range(8), generators(8))
    torch.testing.assert_close(batch.clean, expected)
    assert posterior.std.min() > 1e-3

    plain = vae.encode(pixels(photos, [View()] * 8)).latent_dist.mean * vae.config.scaling_factor
    torch.testing.assert_close(examples.plain(range(8)).clean, plain)
    alone = examples.batch([5], generators(8)[5:6])
    assert torch.equal(alone.clean[0], batch.clean[5])


def test_draws_from_the_posterior_average_to_its_mean(opened: Callable[..., TrainingSet]) -> None:
    examples = opened("posterior", flip=False)
    many = torch.cat([examples.batch([3], [sample_generator(1, index, "data")]).clean for index in range(400)])
    error = (many.mean(0) - examples.plain([3]).clean[0]).abs()
    assert (error < 5 * many.std(0) / 400**0.5).all()
    assert many.std(0).min() > 1e-4


def test_classes_go_with_their_images(opened: Callable[..., TrainingSet]) -> None:
    examples = opened("labelled")
    assert examples.plain([4, 2, 0]).conditions["class_labels"].tolist() == [1, 2, 0]
    assert examples.batch([5], generators(1)).conditions["class_labels"].tolist() == [2]


@pytest.mark.parametrize("name", ["quantized", "posterior", "labelled"])
def test_the_training_loss_takes_a_batch(
    opened: Callable[..., TrainingSet], pipelines: dict[str, Path], name: str
) -> None:
    model = load_model(pipelines[name])
    batch = opened(name).batch(range(4), generators(4))
    noise = noise_for(0, range(4), batch.clean.shape[1:])
    loss = Objective(model.scheduler)(model.unet, batch, noise, torch.tensor([0, 10, 500, 999]))
    assert loss.shape == (4,)
    loss.mean().backward()
    assert model.unet.conv_in.weight.grad.abs().max() > 0


def test_pixels_are_as_they_were(toy_pipeline: Path, toy_images: Path, tmp_path: Path) -> None:
    recipe = LoopRecipe(data=str(toy_images))
    examples = open_training_set(load_model(toy_pipeline), recipe, cache=tmp_path / "cache")
    expected = open_data(str(toy_images), channels=1, size=(8, 8)).batch([7])
    assert torch.equal(examples.plain([7]).clean, expected)
    assert not (tmp_path / "cache").exists()


# --- the cache ----------------------------------------------------------------------------------------------------


def test_the_next_run_reads_what_the_first_has_encoded(
    opened: Callable[..., TrainingSet], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    first = opened("posterior")
    said = capsys.readouterr().err
    # 8 images, twice, mean and deviation of 3x8x8 in float32; frames and number in 64 bits.
    assert f"latents of 8 images, mirrored too: {(8 * 2 * (2 * 3 * 64 * 4 + 4 * 8) + 8 * 8) / 1e3:.1f} kB in" in said
    monkeypatch.setattr(latents, "posterior", None)
    assert equal(opened("posterior").batch(range(8), generators(8)), first.batch(range(8), generators(8)))
    assert "latents of" not in capsys.readouterr().err
    monkeypatch.undo()
    opened("posterior", flip=False)
    opened("quantized")
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert not list((tmp_path / "cache").glob("*.making"))


@pytest.mark.parametrize("change", ["image", "weights"])
def test_other_images_or_another_vae_are_encoded_anew(
    pipelines: dict[str, Path], photos: Path, tmp_path: Path, change: str
) -> None:
    data = shutil.copytree(photos, tmp_path / "photos")
    directory = shutil.copytree(pipelines["posterior"], tmp_path / "model")

    def opened() -> torch.Tensor:
        recipe = LoopRecipe(data=str(data), flip=False)
        return open_training_set(load_model(directory), recipe, cache=tmp_path / "cache").plain(range(8)).clean

    before = opened()
    if change == "image":
        shutil.copyfile(data / "1.png", data / "0.png")
    else:
        vae = diffusers.AutoencoderKL.from_pretrained(directory / "vqvae")
        torch.nn.init.ones_(vae.quant_conv.bias)
        vae.save_pretrained(directory / "vqvae")
    after = opened()
    assert not torch.equal(before[0], after[0])
    assert torch.equal(before[1], after[1]) == (change == "image")


def rows_of(numbers: range) -> dict[str, np.ndarray]:
    return {"a": np.array([[n, n * n] for n in numbers], np.float32), "b": np.array(list(numbers), np.int64)}


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [0, 1, 40, 99])
def test_a_run_that_was_cut_off_goes_on(tmp_path: Path, after: int) -> None:
    asked: list[int] = []

    def maker(left: int) -> Any:
        @contextmanager
        def opened() -> Any:
            def make(numbers: range) -> dict[str, np.ndarray]:
                if numbers.start >= left:
                    raise Killed
                asked.extend(numbers)
                return rows_of(numbers)

            yield make

        return opened

    made = {"what": "rows", "report": lambda line: None}
    with pytest.raises(Killed):
        cache.rows(tmp_path / "c", ("a", "b"), 100, maker(after), **made)
    assert not (tmp_path / "c").exists()
    asked.clear()
    found = cache.rows(tmp_path / "c", ("a", "b"), 100, maker(1000), **made)
    assert all((found[name] == values).all() for name, values in rows_of(range(100)).items())
    assert not found["a"].flags.writeable
    # It begins where the last one noted what it had, every 16 batches.
    assert asked == [0, *range(after // 16 * 16, 100)]


@pytest.mark.parametrize("damage", ["rows.json", "short", "other"])
def test_what_a_cut_off_run_left_is_not_trusted_where_it_cannot_be_right(tmp_path: Path, damage: str) -> None:
    making = tmp_path / "c.making"
    making.mkdir()
    header = cache._header(np.zeros(2, np.float32), 50 if damage != "other" else 51)
    (making / "a.npy").write_bytes(header + b"\xff" * (8 if damage == "short" else 80))
    (making / "b.npy").write_bytes(cache._header(np.int64(0), 50) + bytes(80))
    (making / "rows.json").write_text('{"rows": "ten"}' if damage == "rows.json" else '{"rows": 10}')

    @contextmanager
    def maker() -> Any:
        yield rows_of

    found = cache.rows(tmp_path / "c", ("a", "b"), 50, maker, what="rows", together=7, report=lambda line: None)
    assert all((found[name] == values).all() for name, values in rows_of(range(50)).items())


def test_a_damaged_cache_says_what_to_remove(opened: Callable[..., TrainingSet], tmp_path: Path) -> None:
    opened("posterior")
    (folder,) = (tmp_path / "cache").iterdir()
    (folder / "latents.npy").write_bytes((folder / "latents.npy").read_bytes()[:2000])
    with pytest.raises(DpctlError, match="the cache is damaged") as caught:
        opened("posterior")
    assert f"rm -r {folder}" in caught.value.todo


def test_a_disk_without_room_is_refused_before_the_work(
    opened: Callable[..., TrainingSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(DpctlError, match="the disk has too little space") as caught:
        opened("posterior")
    assert "1 kB" in caught.value.got
    assert "XDG_CACHE_HOME" in caught.value.todo


def test_of_two_processes_one_makes_a_cache_and_the_other_waits(tmp_path: Path) -> None:
    waits, made = threading.Event(), []

    @contextmanager
    def maker() -> Any:
        assert not made, "the one that waited makes it again"
        made.append(1)
        # The second is told to wait while the first is at work. (A lock belongs to an open file, not to a process.)
        second.start()
        assert waits.wait(60)
        yield rows_of

    def wait() -> None:
        found.append(cache.rows(tmp_path / "c", ("a",), 30, maker, what="rows", report=lambda line: waits.set()))

    found: list[cache.Rows] = []
    second = threading.Thread(target=wait)
    cache.rows(tmp_path / "c", ("a",), 30, maker, what="rows", report=lambda line: None)
    second.join(60)
    assert (found[0]["a"] == rows_of(range(30))["a"]).all()
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_images_are_the_same_ones_as_long_as_nothing_of_them_changes(photos: Path, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra [data] is not installed")
    paths = sorted(str(path) for path in photos.glob("*.png"))

    def npz(first: int) -> str:
        images = np.zeros((2, 16, 16, 3), np.uint8)
        images[0, 0, 0, 0] = first
        np.savez(tmp_path / "a.npz", images=images)
        return str(tmp_path / "a.npz")

    def table(first: int) -> str:
        features = datasets.Features({"image": datasets.Image()})
        datasets.Dataset.from_dict({"image": paths[first:]}, features=features).save_to_disk(tmp_path / f"table{first}")
        return str(tmp_path / f"table{first}")

    for source in (npz, table):
        one, again, other = (open_data(source(n), channels=3, size=SIZE).identity() for n in (0, 0, 1))
        assert one == again
        assert one != other
    here, there = photos, shutil.copytree(photos, tmp_path / "photos")  # with the times of writing
    assert len({open_data(str(each), channels=3, size=SIZE).identity() for each in (here, there)}) == 1
    os.utime(there / "3.png", (0, 0))
    assert len({open_data(str(each), channels=3, size=SIZE).identity() for each in (here, there)}) == 2


@torch.no_grad()
def test_sdxls_centred_latents_are_what_its_pipeline_undoes(photos: Path, tmp_path: Path) -> None:
    centred = {"latents_mean": [0.1, -0.2, 0.3, 0.0], "latents_std": [0.5, 2.0, 1.0, 0.8]}
    directory = save_textual(tmp_path / "model", "StableDiffusionXLPipeline", vae=centred)
    recipe = LoopRecipe(data=str(photos))
    clean = open_training_set(load_model(directory), recipe, cache=tmp_path / "cache").plain(range(4)).clean
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(directory)
    pipe.set_progress_bar_config(disable=True)
    decoded: list[torch.Tensor] = []
    decode = pipe.vae.decode
    pipe.vae.decode = lambda latents, **options: decoded.append(latents) or decode(latents, **options)
    pipe.prepare_latents = lambda *_: clean[:1]
    # No step is taken: it decodes what it was given.
    pipe("a dog", latents=clean[:1], num_inference_steps=1, guidance_scale=1.0, denoising_end=0.0001)
    expected = pipe.vae.encode(pixels(photos, [View()])).latent_dist.mean
    torch.testing.assert_close(decoded[0], expected, rtol=1e-3, atol=1e-4)


# --- what is refused ----------------------------------------------------------------------------------------------


def test_random_crops_are_refused_in_latent_space(opened: Callable[..., TrainingSet]) -> None:
    with pytest.raises(DpctlError, match="cropped anew each time cannot be cached") as caught:
        opened("posterior", crop="random")
    assert "--crop center" in caught.value.todo


def test_a_class_conditional_pipeline_wants_its_labels_before_anything_is_encoded(
    pipelines: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    plain = shutil.copytree(photos, tmp_path / "plain")
    (plain / "metadata.jsonl").unlink()
    with pytest.raises(DpctlError, match="no labels for a class-conditional model"):
        open_training_set(load_model(pipelines["labelled"]), LoopRecipe(data=str(plain)), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("inpainting", "no image like its input"),
        ("latent-consistency", "latent consistency"),
        ("scale-shift", "learned variance"),
        ("stable-diffusion", "needs its pipeline"),
    ],
)
def test_networks_that_no_data_feeds(
    families: dict[str, Callable[..., Any]], toy_pipeline: Path, photos: Path, tmp_path: Path, family: str, message: str
) -> None:
    model = replace(load_model(toy_pipeline), unet=families[family]())
    with pytest.raises(DpctlError) as caught:
        open_training_set(model, LoopRecipe(data=str(photos)), cache=tmp_path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shift_factor": 0.1}, "latents are shifted"),
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "latents are shifted"),
        ({"latent_channels": 3}, "does not fit the network"),
    ],
)
def test_vaes_that_do_not_fit(photos: Path, tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    directory = save_textual(tmp_path / "model", vae=changed)
    with pytest.raises(DpctlError, match=message):
        open_training_set(load_model(directory), LoopRecipe(data=str(photos)), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_vae_of_another_class_or_with_missing_weights_is_refused(
    pipelines: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    directory = shutil.copytree(pipelines["posterior"], tmp_path / "model")
    index = json.loads((directory / "model_index.json").read_text())
    (directory / "model_index.json").write_text(json.dumps(index | {"vqvae": ["evil", "AutoencoderKL"]}))
    with pytest.raises(DpctlError, match="this kind of VAE is not supported"):
        open_training_set(load_model(directory), LoopRecipe(data=str(photos)), cache=tmp_path / "cache")
    (directory / "model_index.json").write_text(json.dumps(index))
    save = diffusers.AutoencoderKL.from_pretrained(directory / "vqvae")
    del save.quant_conv.bias
    save.quant_conv.bias = None
    save.save_pretrained(directory / "vqvae")
    with pytest.raises(DpctlError, match="cannot be loaded") as caught:
        open_training_set(load_model(directory), LoopRecipe(data=str(photos)), cache=tmp_path / "cache")
    assert "quant_conv.bias" in caught.value.got
