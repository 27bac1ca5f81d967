"""The scripts behind docs/latency.md: their arms are recipes that prune takes, their tables say what was measured."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpctl.data import REFERENCE_IMAGES
from dpctl.finetune import check as check_training
from dpctl.latency.goal import check as check_goal
from dpctl.prune import check
from scripts import latency_front, latency_front_picture, latency_share, latency_subjects


@pytest.mark.parametrize(("name", "batch", "way"), latency_share.arms())
def test_an_arm_of_the_shares_is_a_recipe(name: str, batch: int, way: str) -> None:
    recipe = latency_share.recipe_of(name, batch, way)
    check(recipe)
    assert recipe.latency is not None
    check_goal(recipe.latency)
    assert (recipe.latency.batch_size, recipe.depth) == (batch, "--depth" in way)
    assert (recipe.latency.model is not None) is way.startswith("by the latency model")


@pytest.mark.parametrize("name", latency_subjects.SUBJECTS)
def test_an_arm_of_the_front_is_a_recipe(name: str) -> None:
    subject = latency_subjects.SUBJECTS[name]
    for method, share, seed in latency_front.arms(None, subject, 3):
        recipe = latency_front.recipe_of(method, share, subject, seed)
        check(recipe)
        assert recipe.latency is not None
        assert (recipe.depth, recipe.norm_groups, recipe.seed) == ("--depth" in method, "--norm-groups" in method, seed)
        assert (recipe.latency.model is not None) is method.startswith(latency_front.BY_MODEL)
    keys = [latency_front.key_of(*arm) for arm in latency_front.arms(None, subject, 3)]
    assert len(set(keys)) == len(keys)
    assert latency_front.UNIFORM in latency_front.METHODS
    check_training(latency_subjects.TRAINED)
    check_training(subject.tuned)


def judgement(loss: float, fid: float, losses: list[float] | None = None, replicates: Any = ()) -> Any:
    figures = {"fid": {"value": fid, "low": fid - 1, "high": fid + 1, "count": 8, "against": "", "better": "lower"}}
    figures["fid"]["replicates"] = list(replicates)
    return {"loss": loss, "figures": figures} | ({"losses": losses} if losses else {})


def test_one_seed_is_compared_over_its_images_and_pictures() -> None:
    ours = judgement(0.3, 5.0, [0.2, 0.4], [4.9, 5.1])
    other = judgement(0.4, 7.0, [0.3, 0.5], [6.9, 7.2])
    assert latency_front.loss_difference([(ours, other)]) == "-0.1000 [-0.1000, -0.1000]"
    assert latency_front.fid_difference([(ours, other)]).startswith("-2.00 [-2.10, -2.0")
    # Entries of before the losses and replicates were kept.
    assert latency_front.loss_difference([(judgement(0.3, 5.0), other)]) == "-0.1000"
    assert latency_front.fid_difference([(judgement(0.3, 5.0), other)]) == "-2.00"


def test_several_seeds_are_compared_over_seeds() -> None:
    pairs = [(judgement(0.3 + step, 5.0 + step), judgement(0.4, 7.0)) for step in (-0.01, 0.0, 0.01)]
    # Student's t of two degrees of freedom: 4.303 * 0.01 / sqrt(3) = 0.0248.
    assert latency_front.loss_difference(pairs) == "-0.1000 [-0.1248, -0.0752]"
    assert latency_front.fid_difference(pairs) == "-2.00 [-2.02, -1.98]"


def test_pictures_of_the_cifar_shape_are_judged_grey_and_at_the_references_size() -> None:
    images = np.full((2, 32, 32, 3), 10, np.uint8)
    images[..., 1] = 70
    seen = latency_subjects.as_reference(images)
    assert (seen.shape, seen.dtype) == ((2, 28, 28, 1), np.uint8)
    assert set(np.unique(seen)) == {30}


def test_the_images_of_the_cifar_shape_are_the_references(tmp_path: Path) -> None:
    latency_subjects.write_images(tmp_path / "images.npz")
    with np.load(tmp_path / "images.npz") as archive:
        images = archive["images"]
    assert images.shape == (10000, 32, 32, 3)
    with np.load(REFERENCE_IMAGES) as archive:
        original = archive["images"][:50, ..., None].astype(float)
    assert np.abs(latency_subjects.as_reference(images[:50]) - original).mean() < 6  # of 255


def test_the_share_is_of_the_macs_that_are_saved() -> None:
    chosen: dict[str, Any] = {"macs": 0.4, "ratio": 0.52, "low": 0.49, "high": 0.55}
    assert latency_share.shares(chosen) == pytest.approx([0.8, 0.75, 0.85])
    done = {"CIFAR-10/8/by the latency model": {"chosen": chosen}}
    *_, line = latency_share.table(done).splitlines()
    told = "| CIFAR-10 | 8 | by the latency model | 0.520 [0.490, 0.550] | 40.0 % | 0.80 [0.75, 0.85] |"
    assert line == told
    assert latency_share.table({}) == ""


def test_the_picture_of_the_front_shows_what_was_measured() -> None:
    document = json.loads((latency_subjects.ROOT / "docs/latency/front.json").read_text(encoding="utf-8"))
    arm = document["arms"][f"{latency_front.BY_MODEL}/0.35"]
    loss, before, after = latency_front_picture.points(document, latency_front.BY_MODEL)
    assert [len(panel) for panel in (loss, before, after)] == [4, 4, 4]
    assert loss[0][:2] == (arm["timed"]["ratio"], arm["before"]["loss"])
    assert after[0][1] == arm["after"]["figures"]["fid"]["value"] < before[0][1]
    assert {panel[-1][0] for panel in (loss, before, after)} == {1.0}
    assert before[-1] == after[-1]
    figure = latency_front_picture.draw(document)
    assert [axes.get_title() for axes in figure.axes] == list(latency_front_picture.PANELS)
