"""`--layout stock`: a plain diffusers class, whose channels the criterion still chose."""

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from dpctl import cost
from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.prune import prune
from dpctl.prune.groups import find_groups, is_inner
from dpctl.prune.layout import BelowFloor, find_levels, search
from dpctl.prune.plan import Layer, Network, Side, Span
from dpctl.prune.surgery import slim
from dpctl.recipe import PruneRecipe
from dpctl.signature import unet_arguments

NAMES = (
    *("ddpm", "ldm", "class-conditional", "ncsnpp", "resnet-resampling", "scale-shift"),
    *("stable-diffusion", "sdxl", "inpainting", "latent-consistency"),
)
STOCK = PruneRecipe(criterion="magnitude", ratio=0.5, layout="stock")
Families = dict[str, Callable[[], Any]]
family = pytest.mark.parametrize("name", NAMES)


@torch.no_grad()
def run(unet: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = cost.example_inputs(unet, 2)
    inputs["sample"] = torch.randn(inputs["sample"].shape, generator=generator)
    return unet(**unet_arguments(inputs)).sample


@pytest.fixture(scope="module")
def slims(families: Families, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every family's toy and its stock cut: NAME/base and NAME/slim."""
    folder = tmp_path_factory.mktemp("layout")
    for name, make in families.items():
        make().save_pretrained(folder / name / "base")
        prune(str(folder / name / "base"), folder / name / "slim", STOCK)
    return folder


@family
def test_the_result_is_a_plain_class_without_code(slims: Path, families: Families, name: str) -> None:
    unet_folder = slims / name / "slim" / "unet"
    files = {path.name for path in unet_folder.iterdir()}
    assert files == {"config.json", "diffusion_pytorch_model.safetensors", "kept.safetensors"}
    config = json.loads((unet_folder / "config.json").read_text())
    kind = type(families[name]()).__name__
    assert config["_class_name"] == kind
    assert "auto_map" not in config
    stock, info = getattr(diffusers, kind).from_pretrained(unet_folder, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(run(stock.eval()), run(load_model(slims / name / "slim").unet))


@family
def test_level_0_stays_and_every_other_level_is_narrower(slims: Path, name: str) -> None:
    before = load_model(slims / name / "base").unet.config.block_out_channels
    after = load_model(slims / name / "slim").unet.config.block_out_channels
    assert after[0] == before[0]
    assert all(new <= 0.5 * old for old, new in zip(before[1:], after[1:], strict=True))
    manifest = load_model(slims / name / "slim").manifest
    assert manifest is not None
    assert manifest.stats["achieved"]["macs"] < 0.6


@family
def test_every_weight_is_the_originals_at_the_kept_positions(slims: Path, name: str) -> None:
    base, small = (load_model(slims / name / which).unet for which in ("base", "slim"))
    kept = load_file(slims / name / "slim" / "unet" / "kept.safetensors")
    original, found = base.state_dict(), small.state_dict()
    for key, value in found.items():
        module = key.rpartition(".")[0]
        expected = original[key]
        if f"{module}.out" in kept:
            index = kept[f"{module}.out"]
            expected = expected[:, index] if module == "class_embedding" else expected[index]
        if f"{module}.in" in kept and expected.ndim > 1:
            expected = expected[:, kept[f"{module}.in"]]
        if module.endswith(".to_q"):  # one head over the whole width: its temperature is folded in
            heads = [unet.get_submodule(module.rpartition(".")[0]).heads for unet in (base, small)]
            widths = [unet.get_submodule(module).out_features for unet in (base, small)]
            expected = expected * (widths[1] / heads[1] / (widths[0] / heads[0])) ** 0.5
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("name", ["ldm", "sdxl"])
def test_attention_loses_whole_heads(slims: Path, name: str) -> None:
    base, small = (load_model(slims / name / which).unet for which in ("base", "slim"))
    kept = load_file(slims / name / "slim" / "unet" / "kept.safetensors")
    inner = [m for g in find_groups(base).prunable for m in g.members if is_inner(m) and f"{m.module}.out" in kept]
    assert inner
    for member in inner:
        attention, slim_attention = (unet.get_submodule(member.module.rpartition(".")[0]) for unet in (base, small))
        width = attention.inner_dim // attention.heads
        assert slim_attention.inner_dim // slim_attention.heads == width
        rows = kept[f"{member.module}.out"].reshape(-1, width)
        assert torch.equal(rows, rows[:, :1] // width * width + torch.arange(width))


def test_it_computes_what_the_free_layout_computes_with_the_same_channels(slims: Path) -> None:
    base = load_model(slims / "ddpm" / "base").unet
    kept = load_file(slims / "ddpm" / "slim" / "unet" / "kept.safetensors")
    torch.testing.assert_close(run(load_model(slims / "ddpm" / "slim").unet), run(slim(base, kept)))


def test_neighbours_of_one_width_stay_of_one_width(make_unet: Callable[..., Any], tmp_path: Path) -> None:
    make_unet(
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D",) * 3,
        up_block_types=("UpBlock2D",) * 3,
    ).save_pretrained(tmp_path / "base")
    prune(str(tmp_path / "base"), tmp_path / "slim", replace(STOCK, ratio=None, target_macs=0.8))
    found = load_model(tmp_path / "slim").unet.config.block_out_channels
    assert found[0] == 32
    assert found[1] == found[2] < 64


def test_the_criterion_chooses_the_channels(make_unet: Callable[..., Any], tmp_path: Path) -> None:
    unet = make_unet()
    loud = torch.arange(64) % 8 >= 4  # the later half of every norm group
    with torch.no_grad():
        unet.mid_block.resnets[0].conv1.weight[loud] *= 100
    unet.save_pretrained(tmp_path / "base")
    prune(str(tmp_path / "base"), tmp_path / "slim", replace(STOCK, ratio=0.5))
    kept = load_file(tmp_path / "slim" / "unet" / "kept.safetensors")["mid_block.resnets.0.conv1.out"]
    assert set(kept.tolist()) <= set(torch.nonzero(loud).flatten().tolist())


def test_of_all_widths_within_the_budget_those_of_most_importance_are_taken() -> None:
    layers = tuple(Layer(name, 1, 1, Side(1), Side(0, {name: 1}), 0) for name in ("level 1", "level 2"))
    network = Network((Span("level 1", 8, 1), Span("level 2", 8, 1)), layers)
    scores = {"level 1": [8.0, 7, 6, 5, 4, 3, 2, 1], "level 2": [3.25] * 8}
    price = partial(network.cost, "macs")
    assert search(network, scores, price, 10, 1, lambda _: True) == {"level 1": 5, "level 2": 5}
    # Not the best where the class cannot have it, and none where it can have none.
    second = search(network, scores, price, 10, 1, lambda found: found["level 1"] != 5)
    assert second == {"level 1": 6, "level 2": 4}
    with pytest.raises(BelowFloor) as caught:
        search(network, scores, price, 10, 1, lambda _: False)
    assert (caught.value.floor, caught.value.whole) == (16, 16)
    # The floor is the least that the class can have.
    with pytest.raises(BelowFloor) as caught:
        search(network, scores, price, 10, 1, lambda found: sum(found.values()) in (12, 14))
    assert caught.value.floor == 12


def test_a_group_hangs_on_one_level(families: Families) -> None:
    unet = families["stable-diffusion"]()
    levels = find_levels(unet, find_groups(unet))
    assert levels.names == ("level 0", "level 1")
    assert levels.ties["time_embedding.linear_1"].times == 4
    assert levels.ties["time_embedding.linear_1"].level == "level 0"
    gated = levels.ties["mid_block.attentions.0.transformer_blocks.0.ff.net.0.proj"]
    assert (gated.level, gated.times) == ("level 1", 4)


@pytest.mark.parametrize(
    ("changed", "recipe", "message"),
    [
        ({}, replace(STOCK, layout="stok"), "unknown layout"),
        ({}, replace(STOCK, keep=("mid_block.*",)), "one width per level"),
        ({}, replace(STOCK, norm_groups=True), "one number of norm groups"),
        ({"block_out_channels": (64, 64)}, STOCK, "width of level 0"),
        ({}, replace(STOCK, ratio=None, target_macs=0.01), "cannot be reached"),
    ],
)
def test_what_the_layout_cannot_do_is_explained(
    make_unet: Callable[..., Any], tmp_path: Path, changed: dict[str, Any], recipe: PruneRecipe, message: str
) -> None:
    make_unet(**changed).save_pretrained(tmp_path / "base")
    with pytest.raises(DpctlError, match=message):
        prune(str(tmp_path / "base"), tmp_path / "slim", recipe)
    assert not (tmp_path / "slim").exists()


def test_a_freely_pruned_model_has_no_stock_layout(make_unet: Callable[..., Any], tmp_path: Path) -> None:
    make_unet().save_pretrained(tmp_path / "base")
    prune(str(tmp_path / "base"), tmp_path / "free", replace(STOCK, layout="free"))
    with pytest.raises(DpctlError, match="needs an unpruned model"):
        prune(str(tmp_path / "free"), tmp_path / "slim", STOCK)
