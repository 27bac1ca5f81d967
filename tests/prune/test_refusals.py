"""What pruning refuses: targets out of reach, patterns that name nothing, options that nobody would read."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dpctl import registry
from dpctl.data import Pixels, open_data
from dpctl.errors import DpctlError
from dpctl.prune import CRITERIA, check, preview, prune, prune_unet
from dpctl.prune.groups import find_groups
from dpctl.prune.importance import Scoring
from dpctl.recipe import PruneRecipe

SMALL = PruneRecipe(criterion="magnitude")


# --- the floor ---------------------------------------------------------------------------------------------------


def expect_a_floor_that_can_be_pasted(model: Path, out: Path, recipe: PruneRecipe) -> None:
    with pytest.raises(DpctlError, match="cannot be reached") as e:
        prune(str(model), out, recipe)
    assert not out.exists()
    said = re.search(r"; the floor with align \d+ is (\d+) \(--([a-z-]+) (0\.\d+)\)", e.value.got)
    assert said, e.value.got
    floor, option, fraction = int(said[1]), said[2].replace("-", "_"), float(said[3])
    stats = prune(
        str(model),
        out,
        replace(recipe, **{"ratio": None, "target_macs": None, "target_params": None, option: fraction}),
    ).stats
    left = sum(after for _, after in stats["widths"].values())
    whole = sum(before for before, _ in stats["widths"].values())
    if option == "ratio":
        assert floor <= left <= (1.0 - fraction) * whole
    else:
        measure = option.removeprefix("target_")
        assert floor <= stats[measure] <= fraction * stats["unpruned"][measure]


@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("changed", [{}, {"scope": "global"}, {"scope": "global", "floor": 0.4}, {"align": 1}])
def test_the_floor_can_be_pasted(toy_pipeline: Path, tmp_path: Path, measure: str, changed: dict[str, Any]) -> None:
    recipe = replace(SMALL, **{f"target_{measure}": 0.0001}, **changed)
    expect_a_floor_that_can_be_pasted(toy_pipeline, tmp_path / "out", recipe)


@pytest.mark.parametrize("measure", ["macs", "params"])
def test_the_floor_of_a_pruned_model_is_a_fraction_of_the_unpruned(
    toy_pipeline: Path, tmp_path: Path, measure: str
) -> None:
    prune(str(toy_pipeline), tmp_path / "once", replace(SMALL, ratio=0.5))
    recipe = replace(SMALL, **{f"target_{measure}": 0.0001})
    expect_a_floor_that_can_be_pasted(tmp_path / "once", tmp_path / "out", recipe)


def test_the_floor_of_a_ratio_over_the_network_is_a_ratio(toy_pipeline: Path, tmp_path: Path) -> None:
    recipe = replace(SMALL, ratio=0.9, scope="global", floor=0.4)
    expect_a_floor_that_can_be_pasted(toy_pipeline, tmp_path / "out", recipe)


@pytest.mark.parametrize("asked", [{"target_macs": 0.0001}, {"target_params": 0.3}, {"ratio": 0.9}])
def test_the_floor_in_the_layout_stock_is_a_width_that_the_class_can_have(
    make_unet: Callable[..., Any], tmp_path: Path, asked: dict[str, Any]
) -> None:
    # Heads of 32 channels: level 1 may be 32 or 64 wide, and at 32, the width of level 0, stock has no shortcuts.
    changed = {"block_out_channels": (32, 64, 96), "attention_head_dim": 32}
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")}
    blocks["up_block_types"] = ("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    make_unet(**changed, **blocks).save_pretrained(tmp_path / "base")
    expect_a_floor_that_can_be_pasted(tmp_path / "base", tmp_path / "out", replace(SMALL, layout="stock", **asked))


def test_where_nothing_can_go_no_floor_is_named(toy_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match=r"cannot be reached\n.*\(nothing can go\)\n.*lower --align"):
        prune(str(toy_pipeline), tmp_path / "out", replace(SMALL, target_macs=0.5, align=1000))


@pytest.mark.parametrize("layout", ["free", "stock"])
def test_scores_that_are_not_finite_are_refused(toy_model: Any, layout: str) -> None:
    with torch.no_grad():
        toy_model.unet.conv_out.weight.fill_(3e38)  # finite, and its square is not
    with pytest.raises(DpctlError, match=r"importance of a group is not finite\n.*group \w"):
        prune_unet(toy_model, replace(SMALL, ratio=0.5, layout=layout))


# --- options that nobody would read ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"ratio": 0.5, "floor": 0.2}, r"--floor belongs.*\n.*scope local\n"),
        ({"target_macs": 0.5, "floor": 0.2}, r"--floor belongs.*\n.*scope local\n"),  # of itself, under magnitude
        ({"target_macs": 0.5, "floor": 0.2, "scope": "local"}, "--floor belongs"),
        ({"ratio": 0.5, "criterion": "taylor", "floor": 0.2}, "--floor belongs"),
        ({"ratio": 0.5, "layout": "stock", "floor": 0.2, "scope": "global"}, "--layout stock has one width per level"),
        ({"target_macs": 0.5, "layout": "stock", "scope": "global"}, "--layout stock has one width per level"),
        ({"ratio": 0.5, "weighting": "early"}, r"--weighting would not be read\n.*early, criterion magnitude"),
        ({"ratio": 0.5, "criterion": "random", "reduction": "abs-sum"}, "--reduction would not be read"),
        ({"ratio": 0.5, "criterion": "fisher", "reduction": "abs-sum"}, "--reduction would not be read"),
        ({"ratio": 0.5, "criterion": "taylor", "threshold": 0.5}, "--threshold would not be read"),
        (
            {"ratio": 0.5, "criterion": "diff-pruning", "weighting": "uniform", "threshold": 0.5},
            "--threshold would not",
        ),
    ],
)
def test_an_option_that_would_not_be_read_is_refused(
    toy_pipeline: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    recipe = replace(SMALL, **changed)
    with pytest.raises(DpctlError, match=message):
        preview(str(toy_pipeline), recipe)
    with pytest.raises(DpctlError, match=message):
        prune(str(toy_pipeline), tmp_path / "out", recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "changed",
    [
        {"target_macs": 0.5, "criterion": "taylor", "floor": 0.2},  # scope global of itself
        {"ratio": 0.5, "criterion": "magnitude", "floor": 0.2, "scope": "global"},
        {"ratio": 0.5, "criterion": "diff-pruning", "threshold": 0.5, "reduction": "abs-sum"},
        {"ratio": 0.5, "criterion": "fisher", "weighting": "threshold", "threshold": 0.5},
    ],
)
def test_an_option_that_is_read_is_none_of_these(changed: dict[str, Any]) -> None:
    check(replace(SMALL, **changed))


@pytest.mark.parametrize("entry", ["weighting", "threshold", "reduction"])
@pytest.mark.parametrize("name", registry.names(CRITERIA))
def test_a_criterion_reads_what_it_says_it_reads(toy_model: Any, toy_images: Path, name: str, entry: str) -> None:
    # The losses of an untrained network hardly fall with t: a threshold of 0.97 leaves some timesteps out.
    other = {"weighting": "early", "threshold": 0.97, "reduction": "abs-sum"}[entry]
    criterion = registry.load(CRITERIA, name, "criterion")
    images = Pixels(open_data(str(toy_images), channels=1, size=(8, 8)))
    recipes = (recipe := PruneRecipe(name, ratio=0.5, images=4, timesteps=4), replace(recipe, **{entry: other}))
    groups = find_groups(toy_model.unet).prunable
    one, another = (criterion.score(Scoring(toy_model.unet, groups, toy_model.scheduler, images, r)) for r in recipes)
    changed = any(not torch.equal(one[group.name], another[group.name]) for group in groups)
    assert changed == (entry in criterion.READS)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"dual_cross_attention": True}, r"network cannot be run\n.*DualTransformer2DModel.*\n.*diffusers itself"),
        ({"attention_type": "gated"}, r"not supported\n.*attention_type 'gated'\n.*GLIGEN"),
    ],
)
def test_a_network_that_cannot_be_run_or_fed_is_no_crash(
    families: dict[str, Any], tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    stock = families["stable-diffusion"]()
    unet = type(stock)(**{**{k: v for k, v in stock.config.items() if not k.startswith("_")}, **config})
    unet.save_pretrained(tmp_path / "model" / "unet")
    with pytest.raises(DpctlError, match=message):
        prune(str(tmp_path / "model"), tmp_path / "slim", PruneRecipe(criterion="magnitude", ratio=0.5))
    assert not (tmp_path / "slim").exists()
