"""The scripts behind docs/latency.md: their arms are recipes that prune takes, their tables say what was measured."""

from typing import Any

import pytest

from dpctl.latency.goal import check as check_goal
from dpctl.prune import check
from scripts import latency_front, latency_share


@pytest.mark.parametrize(("name", "batch", "way"), latency_share.arms())
def test_an_arm_of_the_shares_is_a_recipe(name: str, batch: int, way: str) -> None:
    recipe = latency_share.recipe_of(name, batch, way)
    check(recipe)
    assert recipe.latency is not None
    check_goal(recipe.latency)
    assert (recipe.latency.batch_size, recipe.depth) == (batch, "--depth" in way)
    assert (recipe.latency.model is not None) is way.startswith("by the latency model")


@pytest.mark.parametrize(("method", "share"), latency_front.arms(None))
def test_an_arm_of_the_front_is_a_recipe(method: str, share: str) -> None:
    recipe = latency_front.recipe_of(method, share)
    check(recipe)
    assert recipe.latency is not None
    assert (recipe.depth, recipe.norm_groups) == ("--depth" in method, "--norm-groups" in method)
    assert (recipe.latency.model is not None) is method.startswith(latency_front.BY_MODEL)


def test_the_share_is_of_the_macs_that_are_saved() -> None:
    chosen: dict[str, Any] = {"macs": 0.4, "ratio": 0.52, "low": 0.49, "high": 0.55}
    assert latency_share.shares(chosen) == pytest.approx([0.8, 0.75, 0.85])
    done = {"CIFAR-10/8/by the latency model": {"chosen": chosen}}
    *_, line = latency_share.table(done).splitlines()
    told = "| CIFAR-10 | 8 | by the latency model | 0.520 [0.490, 0.550] | 40.0 % | 0.80 [0.75, 0.85] |"
    assert line == told
    assert latency_share.table({}) == ""
