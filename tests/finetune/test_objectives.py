"""The losses and samplings of a recipe in whole trainings: each does what it is for, and resumes."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dpctl.data import TrainingSet
from dpctl.errors import DpctlError
from dpctl.finetune import checkpoint, finetune, loop
from dpctl.finetune.features import match, read_kept
from dpctl.finetune.loss import Objective, open_objective
from dpctl.finetune.processes import open_accelerator
from dpctl.finetune.timesteps import HISTORY, Importance
from dpctl.models import load_model
from dpctl.recipe import FinetuneRecipe, LoopRecipe

Tuning = Callable[..., FinetuneRecipe]
WARM = 60  # steps of 64 samples after which every one of the toy's timesteps was seen often enough


def weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")


def feature_error(directory: Path, family: Path) -> float:
    """Return how far the outputs of a model's blocks are from its teacher's."""
    student, teacher = load_model(directory).unet, load_model(family / "teacher").unet
    found = match(student, teacher, read_kept(family / "pruned"))
    noisy, timesteps = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(3)), torch.arange(0, 96, 6)
    with torch.no_grad(), found.watching(student) as ours, found.watching(teacher) as theirs:
        student(noisy, timesteps)
        teacher(noisy, timesteps)
        return float(found.error(ours, theirs).mean())


def test_the_recipe_gives_the_weights_and_the_partners(family: Path) -> None:
    pruned, teacher = load_model(family / "pruned"), load_model(family / "teacher")
    recipe = FinetuneRecipe(denoising=0.5, distillation=2.0, feature_distillation=0.3, min_snr_gamma=5.0)
    found = open_objective(pruned, pruned.unet, teacher, recipe)
    assert found.weights == {"denoising": 0.5, "distillation": 2.0, "features": 0.3}
    assert (found.teacher, found.min_snr_gamma) == (teacher.unet, 5.0)
    assert found.features is not None
    assert found.features.by_map == ()
    alone = open_objective(pruned, pruned.unet, None, FinetuneRecipe(distillation=0.0, min_snr_gamma=5.0))
    assert (alone.weights, alone.teacher, alone.min_snr_gamma) == ({"denoising": 1.0}, None, 5.0)


def test_by_features_alone_the_blocks_come_nearer_to_the_teachers(family: Path, tmp_path: Path, tuning: Tuning) -> None:
    recipe = tuning(steps=40, learning_rate=3e-3, denoising=0.0, distillation=0.0, feature_distillation=1.0)
    manifest = finetune(str(family / "pruned"), tmp_path / "tuned", recipe)
    assert feature_error(tmp_path / "tuned", family) < 0.8 * feature_error(family / "pruned", family)
    assert manifest is not None
    assert "features_by_map" not in manifest.stats


@pytest.mark.parametrize(
    "changed",
    [
        {"feature_distillation": 0.1},
        {"min_snr_gamma": 5.0},
        {"timestep_sampling": "antithetic"},
        {"denoising": 0.0},
    ],
    ids=",".join,
)
def test_every_option_changes_the_weights(
    family: Path, tmp_path: Path, tuning: Tuning, changed: dict[str, Any]
) -> None:
    finetune(str(family / "pruned"), tmp_path / "plain", tuning())
    finetune(str(family / "pruned"), tmp_path / "changed", tuning(**changed))
    plain, other = weights(tmp_path / "plain"), weights(tmp_path / "changed")
    assert not torch.equal(plain["mid_block.resnets.1.conv2.weight"], other["mid_block.resnets.1.conv2.weight"])


def test_min_snr_is_for_a_training_without_a_teacher_too(tmp_path: Path, training: Callable[..., Any]) -> None:
    from dpctl.finetune import train

    for name, gamma in (("plain", None), ("weighted", 1e-3)):
        train(tmp_path / name, training(min_snr_gamma=gamma))
    first = [load_model(tmp_path / name).manifest.stats["loss"] for name in ("plain", "weighted")]  # type: ignore[union-attr]
    assert first[1] < 0.8 * first[0]


def test_without_kept_channels_the_manifest_names_the_blocks_compared_by_their_maps(
    own_family: Path, tmp_path: Path, tuning: Tuning
) -> None:
    foreign = tmp_path / "foreign"
    shutil.copytree(own_family / "pruned", foreign)
    (foreign / "unet" / "kept.safetensors").unlink()
    (foreign / "dpctl.json").unlink()
    recipe = tuning(feature_distillation=0.1, teacher=str(own_family / "teacher"))
    manifest = finetune(str(foreign), tmp_path / "tuned", recipe)
    assert manifest is not None
    assert "mid_block" in manifest.stats["features_by_map"]


def test_a_teacher_of_other_blocks_is_refused_before_anything_is_written(
    family: Path, tmp_path: Path, tuning: Tuning, make_tiny: Callable[..., Any]
) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(make_tiny(), DDPMScheduler()).save_pretrained(tmp_path / "other")
    recipe = tuning(feature_distillation=0.1, teacher=str(tmp_path / "other"))
    with pytest.raises(DpctlError, match="the teacher's blocks are not the model's"):
        finetune(str(family / "pruned"), tmp_path / "tuned", recipe)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other"]


class Stopped(Exception):
    """The process ends here."""


def test_stopped_and_resumed_importance_sampling_draws_what_it_would_have_drawn(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    recipe = LoopRecipe(
        steps=WARM + 10, batch_size=64, checkpoint_every=WARM, learning_rate=1e-3, timestep_sampling="importance"
    )

    def fit(unet: Any, name: str, **more: Any) -> loop.State:
        more |= {"accelerator": open_accelerator(recipe), "folder": tmp_path / name}
        return loop.train(unet, Objective(scheduler), images, recipe, **more)

    left = iter(range(WARM + 3))

    def stop(*_: Any, **__: Any) -> None:
        if next(left, None) is None:
            raise Stopped

    whole, resumed = make_tiny(), make_tiny(9)
    expected = fit(whole, "whole")
    assert isinstance(expected.timesteps, Importance)
    assert len(set(expected.timesteps.probabilities().tolist())) > 1
    with pytest.raises(Stopped):
        fit(make_tiny(), "cut", advance=stop)
    start = checkpoint.newest(tmp_path / "cut")
    assert start is not None
    assert start.step == WARM
    assert int(start.part("timesteps")["seen"].min()) >= HISTORY
    assert fit(resumed, "cut", start=start).losses == expected.losses
    assert all(map(torch.equal, resumed.state_dict().values(), whole.state_dict().values()))
