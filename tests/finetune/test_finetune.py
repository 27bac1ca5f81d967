"""`dpctl train` and `dpctl finetune` as a whole: what they write, whom they learn from, what they refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpctl import artifact
from dpctl.data import Pixels, open_data
from dpctl.finetune import finetune, loop, train
from dpctl.finetune.loss import Objective
from dpctl.finetune.processes import open_accelerator
from dpctl.models import load_model
from dpctl.prune import prune
from dpctl.recipe import FinetuneRecipe, PruneRecipe, TrainRecipe, to_dict


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def unet_weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")


def same(one: Path, other: Path) -> bool:
    ours, theirs = unet_weights(one), unet_weights(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- what is written ---------------------------------------------------------------------------------------------


def test_a_trained_model_is_an_artifact_that_stock_diffusers_loads(
    tmp_path: Path, training: Callable[..., TrainRecipe]
) -> None:
    from diffusers import DDPMPipeline

    manifest = train(tmp_path / "out", training())
    assert listed(tmp_path) == ["out"]  # no checkpoints are left
    assert (manifest.kind, manifest.parent, manifest.lineage) == ("trained", None, [])
    assert manifest.recipe == to_dict(training())
    assert manifest.stats["steps"] == 3
    assert len(json.loads((tmp_path / "out" / "losses.json").read_text())) == 3
    artifact.verify_files(tmp_path / "out", manifest)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "out")
    assert pipeline.scheduler.config.num_train_timesteps == 1000


def test_a_finetuned_model_says_where_it_comes_from(
    tmp_path: Path, family: Path, tuning: Callable[..., FinetuneRecipe]
) -> None:
    pruned = artifact.read_manifest(family / "pruned")
    assert pruned is not None
    manifest = finetune(str(family / "pruned"), tmp_path / "out", tuning())
    assert listed(tmp_path) == ["out"]
    assert (manifest.kind, manifest.parent) == ("finetuned", pruned.digest)
    assert [entry["kind"] for entry in manifest.lineage] == ["foreign", "pruned"]
    assert manifest.recipe == to_dict(tuning())
    for name in ("params", "macs", "unpruned", "requested", "achieved", "widths"):
        assert manifest.stats[name] == pruned.stats[name]
    kept = "unet/kept.safetensors"
    assert manifest.files[kept] == pruned.files[kept]
    assert manifest.files["scheduler/scheduler_config.json"] == pruned.files["scheduler/scheduler_config.json"]
    assert not same(family / "pruned", tmp_path / "out")
    assert load_model(tmp_path / "out").unet.config.channels == load_model(family / "pruned").unet.config.channels


def test_what_is_saved_is_the_moving_average(
    tmp_path: Path, toy_pipeline: Path, toy_images: Path, tuning: Callable[..., FinetuneRecipe]
) -> None:
    recipe = tuning(distillation=0.0, ema_decay=0.9, learning_rate=1e-2)
    finetune(str(toy_pipeline), tmp_path / "out", recipe)

    # The loop itself leaves the average in the network (test_loop.py compares that with the formula).
    model, last = load_model(toy_pipeline), {}
    images = open_data(str(toy_images), channels=1, size=(8, 8))

    def remember(*_: Any, **__: Any) -> None:
        last.update({name: tensor.clone() for name, tensor in model.unet.state_dict().items()})

    accelerator = open_accelerator(recipe)
    loop.train(
        model.unet,
        Objective(model.scheduler),
        Pixels(images),
        recipe,
        accelerator=accelerator,
        folder=tmp_path / "c",
        advance=remember,
    )
    saved = unet_weights(tmp_path / "out")
    assert all(torch.equal(saved[name], tensor) for name, tensor in model.unet.state_dict().items())
    assert not all(torch.equal(saved[name], tensor) for name, tensor in last.items())


def test_bf16_training_writes_float32(tmp_path: Path, training: Callable[..., TrainRecipe]) -> None:
    train(tmp_path / "out", training(mixed_precision="bf16"))
    assert {tensor.dtype for tensor in unet_weights(tmp_path / "out").values()} == {torch.float32}


def test_from_scratch_is_the_same_shape_with_other_weights(
    tmp_path: Path, family: Path, tuning: Callable[..., FinetuneRecipe]
) -> None:
    recipe = tuning(from_scratch=True, learning_rate=1e-9, steps=1)
    for seed, out in enumerate(("one", "two")):
        torch.manual_seed(seed)  # which is not the recipe's
        finetune(str(family / "pruned"), tmp_path / out, recipe)
    finetune(
        str(family / "pruned"), tmp_path / "seeded", tuning(from_scratch=True, learning_rate=1e-9, steps=1, seed=5)
    )
    ours, theirs = unet_weights(tmp_path / "one"), unet_weights(family / "pruned")
    assert {name: t.shape for name, t in ours.items()} == {name: t.shape for name, t in theirs.items()}
    assert float((ours["conv_in.weight"] - theirs["conv_in.weight"]).abs().max()) > 0.01
    assert same(tmp_path / "one", tmp_path / "two")
    other = unet_weights(tmp_path / "seeded")
    assert float((ours["conv_in.weight"] - other["conv_in.weight"]).abs().max()) > 0.01


# --- the teacher -------------------------------------------------------------------------------------------------


def distance(directory: Path, teacher: Path, images: Path) -> float:
    """Return the mean squared distance of two networks' outputs at fixed noisy samples."""
    ours, theirs = load_model(directory), load_model(teacher)
    clean = open_data(str(images), channels=1, size=(8, 8)).batch(range(32))
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(7))
    timesteps = torch.arange(32) * 3
    noisy = ours.scheduler.add_noise(clean, noise, timesteps)
    with torch.no_grad():
        return float((ours.unet(noisy, timesteps).sample - theirs.unet(noisy, timesteps).sample).square().mean())


def test_distillation_brings_the_model_nearer_to_its_teacher(
    tmp_path: Path, family: Path, toy_images: Path, tuning: Callable[..., FinetuneRecipe]
) -> None:
    values = {"steps": 20, "batch_size": 8, "learning_rate": 3e-3, "checkpoint_every": 100, "ema_decay": 0.5}
    for weight in (0.0, 100.0):
        finetune(str(family / "pruned"), tmp_path / f"{weight:g}", tuning(**values, distillation=weight))
    before, without, taught = (
        distance(directory, family / "teacher", toy_images)
        for directory in (family / "pruned", tmp_path / "0", tmp_path / "100")
    )
    assert taught < 0.7 * before
    assert taught < 0.7 * without


def test_without_distillation_no_teacher_is_needed(
    tmp_path: Path, own_family: Path, tuning: Callable[..., FinetuneRecipe]
) -> None:
    shutil.rmtree(own_family / "teacher")
    assert finetune(str(own_family / "pruned"), tmp_path / "out", tuning(distillation=0.0)).kind == "finetuned"


def test_a_model_finetuned_and_pruned_again_keeps_its_teacher(
    tmp_path: Path, own_family: Path, tuning: Callable[..., FinetuneRecipe], refused: Any
) -> None:
    finetune(str(own_family / "pruned"), tmp_path / "once", tuning())
    prune(str(tmp_path / "once"), tmp_path / "again", PruneRecipe("magnitude", target_macs=0.45))
    # Whatever is between may go: the teacher is the unpruned one.
    shutil.rmtree(own_family / "pruned")
    shutil.rmtree(tmp_path / "once")
    manifest = finetune(str(tmp_path / "again"), tmp_path / "twice", tuning())
    assert [entry["kind"] for entry in manifest.lineage] == ["foreign", "pruned", "finetuned", "pruned"]
    shutil.rmtree(own_family / "teacher")
    with refused("teacher cannot be loaded", got=str(own_family / "teacher")):
        finetune(str(tmp_path / "again"), tmp_path / "thrice", tuning())


def test_a_teacher_that_is_gone_is_refused(
    tmp_path: Path, own_family: Path, tuning: Callable[..., FinetuneRecipe], refused: Any
) -> None:
    (own_family / "teacher").rename(own_family / "elsewhere")
    with refused("teacher cannot be loaded", got=str(own_family / "teacher"), todo="--teacher"):
        finetune(str(own_family / "pruned"), tmp_path / "out", tuning())
    # As the hint says: named, it is found.
    named = tuning(teacher=str(own_family / "elsewhere"))
    assert finetune(str(own_family / "pruned"), tmp_path / "out", named).recipe["teacher"].endswith("elsewhere")


def test_a_teacher_that_has_changed_is_refused(
    tmp_path: Path, own_family: Path, make_unet: Callable[..., Any], tuning: Callable[..., FinetuneRecipe], refused: Any
) -> None:
    make_unet(seed=5).save_pretrained(own_family / "teacher" / "unet")
    with refused("teacher has changed", got=str(own_family / "teacher"), todo="--distillation 0"):
        finetune(str(own_family / "pruned"), tmp_path / "out", tuning())
    assert listed(tmp_path) == ["family"]


def test_a_model_without_a_past_needs_a_named_teacher(
    tmp_path: Path, toy_pipeline: Path, tuning: Callable[..., FinetuneRecipe], refused: Any
) -> None:
    with refused("teacher is not known", got=str(toy_pipeline), todo="--teacher"):
        finetune(str(toy_pipeline), tmp_path / "out", tuning())


@pytest.mark.parametrize("changed", [{"in_channels": 3}, {"out_channels": 3}, {"num_class_embeds": 4}])
def test_a_named_teacher_that_does_not_fit_is_refused(
    tmp_path: Path,
    family: Path,
    make_unet: Callable[..., Any],
    tuning: Callable[..., FinetuneRecipe],
    changed: Any,
    refused: Any,
) -> None:
    make_unet(**changed).save_pretrained(tmp_path / "teacher")
    with refused("teacher does not match", got=next(iter(changed))):
        finetune(str(family / "pruned"), tmp_path / "out", tuning(teacher=str(tmp_path / "teacher")))


# --- refused -----------------------------------------------------------------------------------------------------


def test_an_output_that_exists_is_refused_and_with_force_replaced(
    tmp_path: Path, training: Callable[..., TrainRecipe], refused: Any
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bench.json").touch()
    with refused("output exists"):  # before anything else is looked at
        train(tmp_path / "out", training(data="missing"))
    for resume in (False, True):
        with refused("output exists"):
            train(tmp_path / "out", training(), resume=resume)
    assert listed(tmp_path / "out") == ["bench.json"]
    train(tmp_path / "out", training(), force=True)
    assert "dpctl.json" in listed(tmp_path / "out")
    assert "bench.json" not in listed(tmp_path / "out")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 0}, "count is below 1"),
        ({"batch_size": -1}, "count is below 1"),
        ({"checkpoint_every": 0}, "count is below 1"),
        ({"learning_rate": 0.0}, "learning rate"),
        ({"learning_rate": float("nan")}, "learning rate"),
        ({"learning_rate": float("inf")}, "learning rate"),
        ({"ema_decay": 1.0}, "ema decay"),
        ({"ema_decay": float("nan")}, "ema decay"),
        ({"weight_decay": -1.0}, "weight decay"),
        ({"gradient_clip": 0.0}, "gradient clip"),
        ({"warmup_steps": -1}, "warmup steps"),
        ({"seed": 2**70}, "seed"),
        ({"seed": -1}, "seed"),
        ({"distillation": -1.0}, "distillation"),
        ({"distillation": float("nan")}, "distillation"),
        ({"mixed_precision": "fp8"}, "mixed precision"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(
    tmp_path: Path,
    family: Path,
    tuning: Callable[..., FinetuneRecipe],
    changed: dict[str, Any],
    message: str,
    refused: Any,
) -> None:
    with refused(message):
        finetune(str(family / "pruned"), tmp_path / "out", tuning(**changed))
    assert listed(tmp_path) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, where fp16 is served")
def test_fp16_without_a_gpu_is_refused(tmp_path: Path, training: Callable[..., TrainRecipe], refused: Any) -> None:
    with refused("fp16 needs a GPU"):
        train(tmp_path / "out", training(mixed_precision="fp16"))
    assert listed(tmp_path) == []


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"_class_name": "AutoencoderKL"}, "not supported"),
        ({"block_out_channels": [30, 64]}, "no network that runs"),
        ({"down_block_types": ["NoBlock", "NoBlock"]}, "no network that runs"),
        ({"block_out_channels": [32, 64, 64]}, "no network that runs"),
        ({"sample_size": 7}, "no network that runs"),
        ({"block_out_channels": "wide"}, "no network that runs"),
        ({"num_class_embeds": 4}, "no labels"),
        ({"out_channels": 2}, "no image like its input"),
        ({"in_channels": 4, "out_channels": 4}, "images cannot feed"),
        ({"sample_size": 16}, "does not fit"),
        ({"sample_size": None}, "image size"),
    ],
)
def test_a_config_that_cannot_be_trained_is_refused(
    tmp_path: Path,
    toy_pipeline: Path,
    training: Callable[..., TrainRecipe],
    changed: dict[str, Any],
    message: str,
    refused: Any,
) -> None:
    config = json.loads((toy_pipeline / "unet" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changed))
    with refused(message):
        train(tmp_path / "out", training(config=str(tmp_path / "config.json")))
    assert listed(tmp_path) == ["config.json"]


def test_a_config_file_is_a_directory_is_a_model(tmp_path: Path, training: Callable[..., TrainRecipe]) -> None:
    pipeline = Path(training().config)
    names = (pipeline, pipeline / "unet", pipeline / "unet" / "config.json")
    files = [train(tmp_path / str(i), training(config=str(name), steps=1)).files for i, name in enumerate(names)]
    assert files[0] == files[1] == files[2]
