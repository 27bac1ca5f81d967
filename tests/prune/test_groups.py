"""What DepGraph's groups are taken to mean, and what planning is told of the network."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from dpctl import cost
from dpctl.errors import DpctlError
from dpctl.prune.groups import ChannelGroup, Groups, find_groups, restrict
from dpctl.prune.network import describe
from dpctl.prune.plan import select, uniform
from dpctl.prune.surgery import kept_indices, slim
from dpctl.pruned_unet import PrunedUNet2DModel


def paper_config(size: int, widths: tuple[int, ...], attention: int) -> dict[str, Any]:
    """Return the config of a network of the paper, with attention at one level."""
    levels = range(len(widths))
    return {
        "sample_size": size,
        "in_channels": 3,
        "out_channels": 3,
        "layers_per_block": 2,
        "block_out_channels": widths,
        "down_block_types": tuple("AttnDownBlock2D" if level == attention else "DownBlock2D" for level in levels),
        "up_block_types": tuple("AttnUpBlock2D" if level == attention else "UpBlock2D" for level in reversed(levels)),
        "attention_head_dim": None,
        "norm_num_groups": 32,
        "norm_eps": 1e-6,
        "flip_sin_to_cos": False,
        "freq_shift": 1,
        "act_fn": "silu",
        "downsample_padding": 0,
    }


# The paper's networks: config, (parameters, MACs) before and after "ratio 0.3". CIFAR-10 and CelebA-HQ are its tables 1
# and 2, LSUN is from a later paper's table (IGSM).
PAPER = {
    "cifar-10": (paper_config(32, (128, 256, 256, 256), 1), (35.7463e6, 6.1e9), (19.8512e6, 3.3928e9)),
    "celeba-64": (paper_config(64, (128, 256, 256, 256, 512), 2), (78.7e6, 23.9e9), (43.7e6, 13.3e9)),
    "lsun-256": (paper_config(256, (128, 128, 256, 256, 512, 512), 4), (113.7e6, 248.7e9), (63.2e6, 138.8e9)),
}


@pytest.fixture
def groups(toy_unet: Any) -> Groups:
    return find_groups(toy_unet)


def by_name(groups: Groups) -> dict[str, ChannelGroup]:
    return {group.name: group for group in groups.prunable}


def sides(groups: Groups) -> Iterator[tuple[str, str]]:
    for group in groups.prunable:
        for member in group.members:
            yield f"{member.module}.{member.side}", group.name


def test_every_width_belongs_to_a_group_but_those_of_input_and_output(toy_unet: Any, groups: Groups) -> None:
    covered = {key for key, _ in sides(groups)}
    layers = {n: m for n, m in toy_unet.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear, nn.GroupNorm))}
    expected = {f"{n}.out" for n in layers} | {f"{n}.in" for n, m in layers.items() if not isinstance(m, nn.GroupNorm)}
    # The image's channels on both ends, and the sinusoid of the timestep, whose width is block_out_channels[0].
    assert expected - covered == {"conv_in.in", "conv_out.out", "time_embedding.linear_1.in"}
    assert covered <= expected
    assert groups.left_alone == {"conv_out": "it is the network's output"}


def test_a_side_is_filled_once(toy_unet: Any, groups: Groups) -> None:
    filled: dict[str, list[int]] = {}
    for group in groups.prunable:
        for member in group.members:
            filled.setdefault(f"{member.module}.{member.side}", []).extend(member.index)
    for key, positions in filled.items():
        name, _, side = key.rpartition(".")
        layer = toy_unet.get_submodule(name)
        width = layer.weight.shape[1 if side == "in" else 0]
        assert sorted(positions) == list(range(width)), key


def test_segments_are_norm_groups_and_heads(toy_unet: Any, groups: Groups) -> None:
    found = by_name(groups)
    assert found["conv_in"].segments == toy_unet.config.norm_num_groups
    assert found["time_embedding.linear_1"].segments == 1
    inner = [g for name, g in found.items() if ".attentions." in name]
    assert [(g.width, g.segments) for g in inner] == [(64, 4)] * 4  # 64 channels, heads of 16
    for group in inner:
        attention = group.name.rpartition(".")[0]
        members = {f"{m.module}.{m.side}" for m in group.members}
        wanted = {f"{attention}.{side}" for side in ("to_q.out", "to_k.out", "to_v.out", "to_out.0.in")}
        assert members == wanted
    assert all(g.width % g.segments == 0 for g in groups.prunable)


def test_heads_and_norm_groups_go_whole_where_they_fit(toy_unet: Any, groups: Groups) -> None:
    whole = find_groups(toy_unet, heads=True, norm_groups=True)
    assert [g.name for g in whole.prunable] == [g.name for g in groups.prunable]
    found = by_name(whole)
    assert all((g.segments, g.block, g.whole) == (1, 16, True) for name, g in found.items() if ".attentions." in name)
    # Its own norms have groups of 8 channels, those over it and itself, 128 channels, groups of 16.
    assert found["down_blocks.1.resnets.0.conv_shortcut"].block == 16
    assert found["mid_block.resnets.0.conv1"].block == 8
    assert not found["time_embedding.linear_1"].whole
    # 64 + 32 channels in groups of 12: the sixth has four of the former and eight of the latter.
    mixed = "a norm group of up_blocks.1.resnets.0.norm1 has channels of others too"
    assert whole.in_parts["conv_in"] == whole.in_parts["up_blocks.0.upsamplers.0.conv"] == mixed
    shares = "it shares up_blocks.1.resnets.1.norm1 with conv_in, which is cut in parts"
    assert whole.in_parts["up_blocks.1.resnets.0.conv_shortcut"] == shares
    for name in whole.in_parts:
        assert found[name] == by_name(groups)[name]


@pytest.mark.parametrize(("norm_groups", "whole"), [(1, False), (2, True), (32, True)])
def test_one_norm_group_cannot_go(make_unet: Callable[..., Any], norm_groups: int, whole: bool) -> None:
    unet = make_unet(norm_num_groups=norm_groups)
    found = find_groups(unet, norm_groups=True)
    group = by_name(found)["down_blocks.0.resnets.0.conv1"]
    assert (group.whole, group.name in found.in_parts) == (whole, not whole)
    assert group.block == (32 // norm_groups if whole else 1)


def test_a_tensor_concatenated_with_itself_counts_twice(groups: Groups) -> None:
    group = by_name(groups)["down_blocks.1.resnets.0.conv_shortcut"]
    twice = next(m for m in group.members if m.module == "up_blocks.0.resnets.0.conv1" and m.side == "in")
    assert len(twice.index) == 2 * group.width
    assert sorted(twice.channel) == sorted(list(range(group.width)) * 2)


def test_looking_changes_nothing(toy_unet: Any) -> None:
    before = {name: value.clone() for name, value in toy_unet.state_dict().items()}
    describe(toy_unet, find_groups(toy_unet))
    after = toy_unet.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not toy_unet.training
    assert all(parameter.grad is None for parameter in toy_unet.parameters())
    assert not any(module._forward_hooks for module in toy_unet.modules())


def test_the_same_network_gives_the_same_groups(toy_unet: Any, groups: Groups) -> None:
    assert find_groups(toy_unet) == groups


def test_scale_and_shift_from_one_layer_go_together(make_unet: Callable[..., Any]) -> None:
    # DepGraph ties the norm to the shift's half of time_emb_proj only; scale and shift of one channel are one channel.
    unet = make_unet(resnet_time_scale_shift="scale_shift")
    found = by_name(find_groups(unet))
    halved = {name: group for name, group in found.items() if name.endswith("time_emb_proj")}
    assert len(halved) == 8
    for name, group in halved.items():
        assert group.width == unet.get_submodule(name).out_features // 2
        assert group.segments == 8
        both, *others = group.members
        assert both.channel == (*range(group.width), *range(group.width))
        assert all(member.channel == tuple(range(group.width)) for member in others)


def test_value_and_gate_of_a_feed_forward_go_together(families: dict[str, Callable[[], Any]]) -> None:
    unet = families["stable-diffusion"]()
    found = by_name(find_groups(unet))
    halved = {name: group for name, group in found.items() if name.endswith("ff.net.0.proj")}
    assert len(halved) == 4
    for name, group in halved.items():
        value_and_gate, down = group.members
        assert group.width == unet.get_submodule(name).out_features // 2
        assert value_and_gate.channel == (*range(group.width), *range(group.width))
        assert (down.module, down.side, down.channel) == (name.replace("0.proj", "2"), "in", tuple(range(group.width)))


def test_resampling_by_a_filter_keeps_channels_apart(families: dict[str, Callable[[], Any]]) -> None:
    from diffusers.models import downsampling, resnet, upsampling

    original = upsampling.upfirdn2d_native
    found = find_groups(families["ncsnpp"]())
    assert found.left_alone == {"conv_out": "it is the network's output"}
    assert all(module.upfirdn2d_native is original for module in (downsampling, resnet, upsampling))


def test_a_bare_parameter_is_left_alone(toy_unet: Any) -> None:
    # A module with a bare parameter coupled to conv_in: DepGraph cannot say which slice belongs to which channel.
    class Scaled(nn.Module):
        def __init__(self, conv: nn.Module) -> None:
            super().__init__()
            self.conv, self.gain = conv, nn.Parameter(torch.ones(1, 32, 1, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) * self.gain

    toy_unet.conv_in = Scaled(toy_unet.conv_in)
    found = find_groups(toy_unet)
    assert found.left_alone["conv_in.conv"] == "a bare parameter is coupled to it"
    assert "conv_in.conv" not in by_name(found)


# --- what may be cut ---------------------------------------------------------------------------------------------


def test_keep_leaves_every_group_alone_that_it_names(toy_unet: Any, groups: Groups) -> None:
    found = restrict(groups, ["mid_block.*", "*.to_v"], [])
    gone = {name: why for name, why in found.left_alone.items() if name not in groups.left_alone}
    assert {g.name for g in groups.prunable} == {g.name for g in found.prunable} | gone.keys()
    assert set(gone.values()) == {"kept by mid_block.*", "kept by *.to_v"}
    for group in found.prunable:
        produced = [m.module for m in group.members if m.side == "out"]
        assert not any(module.startswith("mid_block.") or module.endswith(".to_v") for module in produced)


def test_only_leaves_all_others_alone(groups: Groups) -> None:
    found = restrict(groups, [], ["mid_block.resnets.?.conv1"])
    assert {group.name for group in found.prunable} == {"mid_block.resnets.0.conv1", "mid_block.resnets.1.conv1"}
    assert len(found.left_alone) == len(groups.prunable) - 2 + 1


def test_keep_wins_over_only(groups: Groups) -> None:
    found = restrict(groups, ["*.resnets.0.conv1"], ["mid_block.resnets.?.conv1"])
    assert [group.name for group in found.prunable] == ["mid_block.resnets.1.conv1"]


@pytest.mark.parametrize(("keep", "only"), [(["nosuch.*"], []), ([], ["mid_block.typo"]), (["*"], [])])
def test_a_pattern_that_names_nothing_or_leaves_nothing_is_explained(
    groups: Groups, keep: list[str], only: list[str]
) -> None:
    with pytest.raises(DpctlError, match="names no module|no group is left"):
        restrict(groups, keep, only)


# --- the price ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.6])
def test_the_price_is_the_slim_networks(toy_unet: Any, groups: Groups, ratio: float) -> None:
    network = describe(toy_unet, groups)
    scores = {span.name: torch.rand(span.width).tolist() for span in network.spans}
    plan = select(network, scores, uniform(network, ratio, 1))
    small = slim(toy_unet, kept_indices(toy_unet, groups, plan))
    counted = cost.stats(small)
    assert network.cost("params", plan.widths()) == counted["params"] == sum(p.numel() for p in small.parameters())
    assert network.cost("macs", plan.widths()) == counted["macs"]


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_networks_at_ratio_three_tenths(name: str, align: int) -> None:
    # On the meta device nothing is computed.
    config, before, after = PAPER[name]
    with torch.device("meta"):
        unet = UNet2DModel(**config).eval()
    groups = find_groups(unet)
    network = describe(unet, groups)
    assert network.cost("params", network.full()) == pytest.approx(before[0], rel=0.001)
    assert network.cost("macs", network.full()) == pytest.approx(before[1], rel=0.01)
    widths = uniform(network, 0.3, align)
    normed = {(span.width, widths[span.name]) for span in network.spans if span.segments == 32}
    assert normed <= {(128, 96), (256, 192), (512, 384)}
    assert network.cost("params", widths) == pytest.approx(after[0], rel=0.01)
    assert network.cost("macs", widths) == pytest.approx(after[1], rel=0.01)

    # The price is what the slim network counts.
    scores = {span.name: [1.0] * span.width for span in network.spans}
    kept = kept_indices(unet, groups, select(network, scores, widths))
    shapes = slim_shapes(unet, kept)
    with torch.device("meta"):
        small = PrunedUNet2DModel(base_config=dict(unet.config), channels=shapes).eval()
    assert cost.stats(small)["params"] == network.cost("params", widths)
    assert cost.stats(small)["macs"] == network.cost("macs", widths)


def slim_shapes(unet: Any, kept: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """Return the widths that are left, read off the layers' weights and not by the code under test."""
    shapes = {}
    for name in {key.rpartition(".")[0] for key in kept}:
        layer = unet.get_submodule(name)
        out, *rest = layer.weight.shape
        widths = [rest[0], out] if rest else [out]
        if f"{name}.in" in kept:
            widths[0] = len(kept[f"{name}.in"])
        if f"{name}.out" in kept:
            widths[-1] = len(kept[f"{name}.out"])
        shapes[name] = widths
    return shapes
