"""What fractions refer to: the model as it was before any pruning, however it comes to us."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpctl.errors import DpctlError
from dpctl.models import Model, load_model
from dpctl.prune import prune, would_cut
from dpctl.prune.groups import find_groups
from dpctl.prune.network import describe
from dpctl.prune.unpruned import unpruned_widths
from dpctl.recipe import PruneRecipe

THIRD = PruneRecipe(criterion="random", ratio=0.3, align=1)


def network(model: Model) -> Any:
    return describe(model.unet, find_groups(model.unet))


@pytest.mark.parametrize("layout", ["free", "stock"])
@pytest.mark.parametrize("name", ["ldm", "sdxl"])  # sdxl has groups that are the halves of a layer's outputs
def test_the_widths_before_are_those_of_the_base_model(
    families: dict[str, Callable[[], Any]], tmp_path: Path, name: str, layout: str
) -> None:
    families[name]().save_pretrained(tmp_path / "base")
    whole = network(load_model(tmp_path / "base")).full()
    stats = prune(str(tmp_path / "base"), tmp_path / "slim", replace(THIRD, layout=layout)).stats
    assert {group: before for group, (before, _) in stats["widths"].items()} == whole
    slim = load_model(tmp_path / "slim")
    assert network(slim).full() != whole
    assert unpruned_widths(slim, network(slim)) == whole
    # unet/ alone has no manifest: a free layout's config remembers, a stock class is all that is known.
    bare = load_model(tmp_path / "slim" / "unet")
    assert unpruned_widths(bare, network(bare)) == (whole if layout == "free" else network(bare).full())


def test_a_second_cut_tells_the_whole_of_both(toy_pipeline: Path, tmp_path: Path) -> None:
    first = prune(str(toy_pipeline), tmp_path / "once", replace(THIRD, only=("mid_block.*",)))
    second = prune(str(tmp_path / "once"), tmp_path / "twice", replace(THIRD, keep=("mid_block.*",)))
    unet = load_model(tmp_path / "twice").unet
    assert 0 < len(first.stats["widths"]) < len(second.stats["widths"])
    for group, pair in first.stats["widths"].items():
        assert second.stats["widths"][group] == pair
        assert second.stats["left_alone"][group] == "kept by mid_block.*"
    assert len(second.stats["widths"]) == len(network(load_model(toy_pipeline)).full())
    for group, (before, after) in second.stats["widths"].items():
        layer = unet.get_submodule(group)
        assert after == (getattr(layer, "out_channels", None) or layer.out_features)
        assert after < before


@pytest.mark.parametrize("scope", ["local", "global"])
def test_a_ratio_may_be_of_the_unpruned_widths(toy_pipeline: Path, tmp_path: Path, scope: str) -> None:
    recipe = replace(THIRD, scope=scope, fractions_of="unpruned")
    prune(str(toy_pipeline), tmp_path / "once", recipe)
    assert not would_cut(str(tmp_path / "once"), recipe)
    with pytest.raises(DpctlError, match="nothing would be pruned|meets the target already"):
        prune(str(tmp_path / "once"), tmp_path / "twice", recipe)
    assert would_cut(str(tmp_path / "once"), replace(recipe, fractions_of="model"))
    half = prune(str(tmp_path / "once"), tmp_path / "twice", replace(recipe, ratio=0.5))
    before, after = (sum(pair[i] for pair in half.stats["widths"].values()) for i in (0, 1))
    # Of what is there it would be 0.7 * 0.5.
    assert 0.47 < after / before <= 0.5


@pytest.mark.parametrize("layout", ["free", "stock"])
@pytest.mark.parametrize("target", [{"ratio": 0.5}, {"target_macs": 0.5}, {"target_params": 0.9}])
def test_a_cut_is_foreseen_without_a_score(
    toy_pipeline: Path, tmp_path: Path, layout: str, target: dict[str, float]
) -> None:
    recipe = PruneRecipe(criterion="magnitude", layout=layout, **target)
    assert would_cut(str(toy_pipeline), recipe)
    assert prune(str(toy_pipeline), tmp_path / "out", recipe).stats["achieved"]["macs"] < 1


@pytest.mark.parametrize("layout", ["free", "stock"])
def test_no_cut_is_foreseen_without_a_score(toy_pipeline: Path, tmp_path: Path, layout: str) -> None:
    recipe = PruneRecipe(criterion="magnitude", layout=layout, ratio=0.01)
    assert not would_cut(str(toy_pipeline), recipe)
    with pytest.raises(DpctlError, match="nothing would be pruned"):
        prune(str(toy_pipeline), tmp_path / "out", recipe)


def test_what_cannot_be_met_is_known_before_any_score(toy_pipeline: Path) -> None:
    with pytest.raises(DpctlError, match="cannot be reached"):
        would_cut(str(toy_pipeline), PruneRecipe(target_macs=0.001))
