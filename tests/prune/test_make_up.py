"""Compensation from end to end: on images, where the loss falls, as the recipe asks, told in the manifest."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dpctl import artifact, progress
from dpctl.data import ArrayImages, Pixels, TrainingSet, open_data
from dpctl.errors import DpctlError
from dpctl.finetune import finetune
from dpctl.models import load_model
from dpctl.prune import Pruned, compensate, preview, prune, prune_unet
from dpctl.prune.compensate import BATCHES, Fit, calibration, compensates, make_up
from dpctl.prune.probe import open_probe
from dpctl.recipe import FinetuneRecipe, PruneRecipe

HALF = PruneRecipe("random", ratio=0.5, batch_size=4)


@pytest.fixture
def images(toy_images: Path) -> TrainingSet:
    return Pixels(open_data(str(toy_images), channels=1, size=(8, 8)))


@pytest.fixture(scope="module")
def reference() -> Any:
    """A trained network: of random ones the loss need not rise when they are cut."""
    return load_model("reference")


def made_up(model: Any, images: TrainingSet, recipe: PruneRecipe = HALF) -> tuple[Pruned, dict[str, Any]]:
    pruned = prune_unet(model, recipe)
    told = make_up(model.unet, pruned.unet, pruned.kept, model.scheduler, images, recipe, progress.no_bar)
    return pruned, told


def same_weights(one: Any, other: Any) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# --- what it gives -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changed", [{}, {"heads": True, "norm_groups": True}, {"layout": "stock"}])
def test_a_trained_network_loses_less_however_it_is_cut(reference: Any, changed: dict[str, Any]) -> None:
    recipe = PruneRecipe("random", target_macs=0.5, align=16, batch_size=2, **changed)
    small, plain = (prune_unet(reference, replace(recipe, compensate=asked)) for asked in (True, False))
    told = small.stats["compensation"]
    assert (told["used"], told["data"], told["images"]) == (True, "reference", 2 * BATCHES)
    assert small.plan == plain.plan
    assert "compensation" not in plain.stats
    assert all(after < before for before, after in told["layers"].values())
    loss = told["loss"]
    assert loss["unpruned"] < loss["compensated"] < 0.5 * (loss["cut"] + loss["unpruned"])
    # So it is on yet other images, noise and timesteps.
    others = Pixels(open_data("reference", channels=1, size=(28, 28)))
    probe = open_probe(reference.unet, reference.scheduler, others, count=2, timesteps=7, seed=77)
    assert probe.loss(small.unet) < 0.7 * probe.loss(plain.unet)


def test_the_losses_are_those_of_the_networks(toy_model: Any, images: TrainingSet) -> None:
    pruned, told = made_up(toy_model, images)
    probe = open_probe(
        toy_model.unet, toy_model.scheduler, images, count=4, timesteps=BATCHES, seed=0, stream="compensate-probe"
    )
    assert told["loss"]["unpruned"] == probe.loss(toy_model.unet)
    assert told["loss"]["cut"] == probe.loss(prune_unet(toy_model, HALF).unet)
    assert probe.loss(pruned.unet) == min(told["loss"]["cut"], told["loss"]["compensated"])


@pytest.mark.parametrize("value", [3.0, float("nan")])
def test_a_loss_that_does_not_fall_keeps_the_cut(
    toy_model: Any, images: TrainingSet, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    def spoil(unet: Any, small: Any, *_: Any, **__: Any) -> dict[str, Fit]:
        small.conv_out.weight.data.fill_(value)
        return {"conv_out": Fit(0.5, 0.25)}

    monkeypatch.setattr(compensate, "compensate", spoil)
    pruned, told = made_up(toy_model, images)
    assert same_weights(pruned.unet, prune_unet(toy_model, HALF).unet)
    assert told["used"] is False
    assert ("compensated" in told["loss"]) == (value == 3.0)
    assert told["layers"] == {"conv_out": [0.5, 0.25]}


def test_few_images_come_again_with_other_noise_at_other_timesteps(toy_model: Any) -> None:
    shades = np.array([0, 128, 255], np.uint8).reshape(3, 1, 1, 1)
    few = Pixels(ArrayImages("few", np.broadcast_to(shades, (3, 1, 8, 8)).copy()))
    drawn = calibration(toy_model.unet, toy_model.scheduler, few, 64, seed=0)
    assert drawn["sample"].shape == (64, 1, 8, 8)
    assert len({tuple(sample.flatten().tolist()) for sample in drawn["sample"]}) == 64
    assert drawn["timestep"].tolist() == sorted(drawn["timestep"].tolist())
    assert (int(drawn["timestep"].min()), int(drawn["timestep"].max())) == (0, 99)
    _, told = made_up(toy_model, few)
    assert told["images"] == 8 * 4  # eight batches
    assert np.isfinite(list(told["loss"].values())).all()


# --- whether it is done ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "data", "has_data", "expected"),
    [
        (None, "reference", False, False),
        (None, "reference", True, True),  # the criterion reads it anyway
        (None, "mine", False, True),
        (None, "mine", True, True),
        (True, "reference", False, True),
        (False, "mine", True, False),
    ],
)
def test_unasked_it_is_done_where_there_is_data(
    toy_model: Any, asked: bool | None, data: str, has_data: bool, expected: bool
) -> None:
    assert compensates(PruneRecipe(compensate=asked, data=data), has_data, toy_model) is expected


def test_without_data_none_is_opened(toy_model: Any, toy_images: Path) -> None:
    # The reference images do not fit the toy.
    assert "compensation" not in prune_unet(toy_model, HALF).stats
    with pytest.raises(DpctlError, match="data does not fit the model"):
        prune_unet(toy_model, replace(HALF, compensate=True))
    assert "compensation" in prune_unet(toy_model, replace(HALF, data=str(toy_images))).stats


def test_where_nothing_is_cut_nothing_is_refitted(toy_model: Any, toy_images: Path) -> None:
    pruned = prune_unet(toy_model, replace(HALF, ratio=0.001, data=str(toy_images)))
    assert "compensation" not in pruned.stats
    assert same_weights(pruned.unet, toy_model.unet)


def test_a_preview_looks_at_no_data(toy_pipeline: Path) -> None:
    recipe = replace(HALF, data="no data is looked at", compensate=True)
    assert "compensation" not in preview(str(toy_pipeline), recipe)["plan"]


@pytest.mark.parametrize("ask", [preview, lambda model, recipe: prune(model, Path(model).parent / "out", recipe)])
@pytest.mark.parametrize("changed", [{"out_channels": 2}, {"in_channels": 4, "out_channels": 4}])
def test_a_model_that_images_cannot_feed_is_refused(
    make_unet: Callable[..., Any],
    toy_images: Path,
    tmp_path: Path,
    ask: Callable[[str, PruneRecipe], Any],
    changed: dict[str, Any],
) -> None:
    make_unet(**changed).save_pretrained(tmp_path / "model" / "unet")
    with pytest.raises(DpctlError, match=r"(?s)cut of this model cannot be compensated.*--no-compensate"):
        ask(str(tmp_path / "model"), replace(HALF, compensate=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    # Unasked it is left out there, whatever the data.
    manifest = prune(str(tmp_path / "model"), tmp_path / "out", replace(HALF, data=str(toy_images)))
    assert "compensation" not in manifest.stats


# --- where it is told --------------------------------------------------------------------------------------------


def test_the_manifest_keeps_it_also_after_finetuning(toy_pipeline: Path, toy_images: Path, tmp_path: Path) -> None:
    recipe = replace(HALF, data=str(toy_images), norm_groups=True, only=("conv_in", "mid_block.*"))
    stats = prune(str(toy_pipeline), tmp_path / "slim", recipe).stats
    assert stats["compensation"]["data"] == str(toy_images)
    assert stats["in_parts"]
    assert stats["regrouped_norms"]
    finetune(str(tmp_path / "slim"), tmp_path / "tuned", FinetuneRecipe(data=str(toy_images), steps=1, batch_size=2))
    tuned = artifact.read_manifest(tmp_path / "tuned")
    assert tuned is not None
    for entry in ("compensation", "in_parts", "regrouped_norms"):
        assert tuned.stats[entry] == stats[entry]
    # Cut again, it has no training of its own to tell of.
    prune(str(tmp_path / "tuned"), tmp_path / "again", replace(recipe, norm_groups=False, only=(), ratio=0.6))
    assert (tmp_path / "tuned" / "losses.json").is_file()
    assert not (tmp_path / "again" / "losses.json").exists()
