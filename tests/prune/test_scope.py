"""What of a network may be cut, and how a ratio is spread over it."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel

from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.prune import preview, prune
from dpctl.prune.groups import find_groups
from dpctl.prune.network import describe
from dpctl.prune.plan import Network, widths_for_target
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


@pytest.fixture(scope="module")
def cifar() -> Network:
    """The paper's CIFAR-10 network as planning sees it."""
    levels = (128, 256, 256, 256)
    with torch.device("meta"):
        unet = UNet2DModel(
            sample_size=32,
            block_out_channels=levels,
            layers_per_block=2,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=None,
        ).eval()
    return describe(unet, find_groups(unet))


@pytest.mark.parametrize("scope", ["local", "global"])
@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("target", [0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_a_target_is_met_from_below_within_two_percent(cifar: Network, target: float, measure: str, scope: str) -> None:
    generator = torch.Generator().manual_seed(3)
    scores = {span.name: torch.rand(span.width, generator=generator).tolist() for span in cifar.spans}
    whole = cifar.cost(measure, cifar.full())
    widths = widths_for_target(cifar, scores, measure, target * whole, 8, scope=scope)
    achieved = cifar.cost(measure, widths) / whole
    assert 0.98 * target <= achieved <= target
    assert all(widths[span.name] % 8 == 0 for span in cifar.spans)
