"""What of a network may be cut, and how a ratio is spread over it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.prune import preview, prune
from dpctl.recipe import PruneRecipe, to_dict

HALF = PruneRecipe(criterion="magnitude", ratio=0.5)


def test_one_ranking_over_the_network_removes_the_ratio_of_all_channels(toy_pipeline: Path, tmp_path: Path) -> None:
    manifest = prune(str(toy_pipeline), tmp_path / "out", replace(HALF, scope="global", align=1))
    before, after = (sum(widths[i] for widths in manifest.stats["widths"].values()) for i in (0, 1))
    assert after <= before // 2
    kept = {after / before for before, after in manifest.stats["widths"].values()}
    assert len(kept) > 3  # not one ratio for all


def test_what_is_kept_is_said_by_name_and_not_cut(toy_pipeline: Path, tmp_path: Path) -> None:
    manifest = prune(str(toy_pipeline), tmp_path / "out", replace(HALF, keep=("mid_block.*",)))
    assert not any(name.startswith("mid_block") for name in manifest.stats["widths"])
    assert "kept by mid_block.*" in manifest.stats["left_alone"].values()
    channels = load_model(tmp_path / "out").unet.config.channels
    assert all(len(set(w)) == 1 or w[1] == 64 for n, w in channels.items() if n.startswith("mid_block") and len(w) == 2)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"scope": "lokal"}, "unknown scope"),
        ({"floor": 1.0}, "--floor"),
        ({"floor": -0.1}, "--floor"),
        ({"keep": ("nosuch",)}, "names no module"),
        ({"only": ("nosuch",)}, "names no module"),
    ],
)
def test_bad_scopes_and_patterns_are_explained(
    toy_pipeline: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(DpctlError, match=message):
        prune(str(toy_pipeline), tmp_path / "out", replace(HALF, **changed))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("criterion", ["magnitude", "random"])
@pytest.mark.parametrize("layout", ["free", "stock"])
def test_a_preview_is_what_the_cut_gives(toy_pipeline: Path, tmp_path: Path, criterion: str, layout: str) -> None:
    recipe = replace(HALF, criterion=criterion, layout=layout)
    found = preview(str(toy_pipeline), recipe)
    stats = prune(str(toy_pipeline), tmp_path / "out", recipe).stats
    assert found["plan"] == {name: value for name, value in stats.items() if name != "bytes"}
    assert {name: value for name, value in found.items() if name != "plan"} == to_dict(recipe)


def test_a_preview_scores_nothing_on_data() -> None:
    recipe = PruneRecipe(ratio=0.5)
    assert preview("no model is looked at", recipe) == to_dict(recipe)
