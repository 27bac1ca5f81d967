"""The scan: what it measures is the loss of the cut network, on the same images, noise and timesteps throughout."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpctl import artifact
from dpctl import prune as pruning
from dpctl.blocks import by_block
from dpctl.data import Pixels, TrainingSet, open_data
from dpctl.errors import DpctlError
from dpctl.finetune import finetune
from dpctl.prune.groups import ChannelGroup, find_groups
from dpctl.prune.sensitivity import FRACTIONS, cut_one, open_probe, scan
from dpctl.recipe import FinetuneRecipe, PruneRecipe

HALF = PruneRecipe(criterion="magnitude", ratio=0.5, sensitivity=True)
GROUP = "mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def images(toy_images: Path) -> TrainingSet:
    return Pixels(open_data(str(toy_images), channels=1, size=(8, 8)))


@pytest.fixture
def group(toy_unet: Any) -> ChannelGroup:
    return next(found for found in find_groups(toy_unet).prunable if found.name == GROUP)


def small(model: Any, images: TrainingSet, **changed: Any) -> dict[str, Any]:
    return scan(model.unet, model.scheduler, images, **{"count": 2, "timesteps": 2} | changed)


def losses(found: dict[str, Any], name: str) -> list[float]:
    return [row["loss"] for row in found["rows"] if row["group"] == name]


# --- oracles -----------------------------------------------------------------------------------------------------


def test_cutting_nothing_gives_exactly_the_base_loss(toy_model: Any, images: TrainingSet) -> None:
    probe = open_probe(toy_model.unet, toy_model.scheduler, images, count=2, timesteps=2, seed=0)
    base = probe.loss(toy_model.unet)
    for group in find_groups(toy_model.unet).prunable:
        assert probe.loss(cut_one(toy_model.unet, group, range(group.width))) == base, group.name


def test_a_group_that_nothing_reads_can_go_without_a_trace(toy_model: Any, images: TrainingSet) -> None:
    toy_model.unet.get_submodule("mid_block.resnets.0.conv2").weight.data.zero_()
    found = small(toy_model, images)
    assert len(losses(found, GROUP)) == len(FRACTIONS)
    assert losses(found, GROUP) == pytest.approx([found["base_loss"]] * len(FRACTIONS), rel=1e-5)


def test_a_group_on_which_all_depends_is_the_most_sensitive(toy_model: Any, images: TrainingSet) -> None:
    # Two channels alike in all that makes them, read with opposite large weights: together nothing, alone a disaster.
    unet = toy_model.unet
    last = unet.get_submodule("up_blocks.1.resnets.1")
    with torch.no_grad():
        for maker in (last.conv_shortcut, last.conv2, unet.conv_norm_out):
            maker.weight[1], maker.bias[1] = maker.weight[0], maker.bias[0]
        unet.conv_out.weight[:, 0], unet.conv_out.weight[:, 1] = 50.0, -50.0
    groups = find_groups(unet).prunable
    (name,) = (found.name for found in groups for member in found.members if member.module == "conv_out")
    scores = {found.name: [1.0] * found.width for found in groups}
    scores[name][0] = 0.0
    found = small(toy_model, images, scores=scores)
    assert len(losses(found, name)) == len(FRACTIONS)
    others = [row["loss"] for row in found["rows"] if row["group"] != name]
    assert min(losses(found, name)) > 100 * max(found["base_loss"], *others)


def test_each_loss_is_that_of_the_network_with_this_one_group_cut(
    toy_model: Any, images: TrainingSet, group: ChannelGroup
) -> None:
    scores = {found.name: list(range(found.width)) for found in find_groups(toy_model.unet).prunable}
    found = small(toy_model, images, scores=scores)
    # The last of each of the eight norm groups are the best: half stay.
    best = [channel for channel in range(group.width) if channel % 8 >= 4]
    slim = cut_one(toy_model.unet, group, best)
    assert slim.mid_block.resnets[0].conv1.out_channels == 32
    assert [name for name in dict(slim.config.channels) if name.startswith("up_blocks")] == []
    probe = open_probe(toy_model.unet, toy_model.scheduler, images, count=2, timesteps=2, seed=0)
    assert losses(found, GROUP)[1] == probe.loss(slim)


# --- what is cut and told ----------------------------------------------------------------------------------------


def test_rows_are_in_the_order_of_data_and_say_what_was_cut(toy_model: Any, images: TrainingSet) -> None:
    found = small(toy_model, images)
    widths = {group.name: group.width for group in find_groups(toy_model.unet).prunable}
    told = [(row["group"], row["block"], row["width"], row["kept"]) for row in found["rows"]]
    assert told == [
        (name, block, widths[name], round((1 - fraction) * widths[name]))
        for block, names in by_block(widths).items()
        for name in names
        for fraction in FRACTIONS
    ]
    assert found["measured_on"] == {
        "data": images.name, "images": 2, "timesteps": [25, 75], "align": 8, "seed": 0
    }  # fmt: skip


def test_a_width_is_measured_once_and_the_full_one_never(toy_model: Any, images: TrainingSet) -> None:
    rows = small(toy_model, images, align=16)["rows"]
    assert {(row["width"], row["kept"]) for row in rows} == {(32, 16), (64, 48), (64, 32), (64, 16)} | {
        (128, kept) for kept in (96, 64, 32)
    }
    assert len({(row["group"], row["kept"]) for row in rows}) == len(rows)


def test_a_seed_gives_the_same_and_another_one_others(toy_model: Any, images: TrainingSet) -> None:
    one, other = (small(toy_model, images, seed=seed) for seed in (3, 4))
    assert small(toy_model, images, seed=3) == one
    assert one["base_loss"] != other["base_loss"]


def test_the_network_is_not_changed(toy_model: Any, images: TrainingSet) -> None:
    before = {name: value.clone() for name, value in toy_model.unet.state_dict().items()}
    small(toy_model, images)
    assert all(torch.equal(before[name], value) for name, value in toy_model.unet.state_dict().items())


def test_a_loss_that_is_not_finite_is_explained(toy_model: Any, images: TrainingSet) -> None:
    toy_model.unet.conv_out.bias.data.fill_(float("inf"))
    with pytest.raises(DpctlError, match="not finite"):
        small(toy_model, images)


# --- the ways in -------------------------------------------------------------------------------------------------


def test_the_manifest_keeps_the_scan_of_the_model_that_was_cut_also_after_finetuning(
    toy_pipeline: Path, toy_images: Path, tmp_path: Path
) -> None:
    recipe = replace(HALF, data=str(toy_images))
    found = pruning.prune(str(toy_pipeline), tmp_path / "slim", recipe)
    assert found.stats["sensitivity"] == pruning.scan(str(toy_pipeline), str(toy_images))
    assert found.stats["sensitivity"]["model"] == found.parent
    tuning = FinetuneRecipe(data=str(toy_images), steps=1, batch_size=2)
    tuned = finetune(str(tmp_path / "slim"), tmp_path / "tuned", tuning)
    assert tuned.stats["sensitivity"] == found.stats["sensitivity"]
    # A slim model can be scanned itself.
    own = pruning.scan(str(tmp_path / "slim"), str(toy_images))
    assert own["model"] == found.digest
    assert {row["width"] for row in own["rows"]} == {16, 32, 64}


def test_a_preview_scans_nothing(toy_pipeline: Path) -> None:
    found = pruning.preview(str(toy_pipeline), replace(HALF, data="no data is looked at"))
    assert found["sensitivity"] is True
    assert "sensitivity" not in found["plan"]


def test_a_model_whose_loss_images_do_not_give_is_refused(
    make_unet: Callable[..., Any], toy_images: Path, tmp_path: Path
) -> None:
    make_unet(out_channels=2).save_pretrained(tmp_path / "model" / "unet")
    for ask in (
        lambda: pruning.scan(str(tmp_path / "model"), str(toy_images)),
        lambda: pruning.prune(
            str(tmp_path / "model"), tmp_path / "out", replace(HALF, data=str(toy_images), compensate=False)
        ),
    ):
        with pytest.raises(DpctlError, match="(?s)sensitivity of this model cannot be scanned.*2 output channels"):
            ask()
    assert artifact.read_manifest(tmp_path / "out") is None
