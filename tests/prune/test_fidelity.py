"""Fidelity, one kind of layer at a time: what says nothing goes without a trace in the output, beyond rounding."""

from collections.abc import Callable, Collection, Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import load_file
from torch import Tensor, nn

from dpctl import cost
from dpctl.models import load_model
from dpctl.prune import prune
from dpctl.prune.groups import ChannelGroup, Groups, find_groups
from dpctl.prune.plan import PruningPlan
from dpctl.prune.surgery import kept_indices, regrouped, slim
from dpctl.recipe import PruneRecipe
from dpctl.signature import unet_arguments

NAMES = (
    *("ddpm", "ldm", "class-conditional", "ncsnpp", "resnet-resampling", "scale-shift"),
    *("stable-diffusion", "sdxl", "inpainting"),
)
# All levels of one width: no norm group has channels of two concatenated tensors.
FLAT: dict[str, Any] = {"block_out_channels": (32, 32)}
WHOLE = {"heads": True, "norm_groups": True}
Families = dict[str, Callable[..., Any]]


@torch.no_grad()
def run(unet: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + 1
        for name, value in cost.example_inputs(unet, 2).items()
    }
    learned = unet.config.get("time_embedding_type") == "learned"
    inputs["timestep"] = torch.tensor([3, 71], dtype=torch.long if learned else torch.float32)
    return unet(**unet_arguments(inputs)).sample


def is_inner(group: ChannelGroup) -> bool:
    return any(member.module.endswith(".to_q") and member.side == "out" for member in group.members)


def norms(unet: Any) -> Iterator[tuple[str, nn.GroupNorm]]:
    yield from ((name, module) for name, module in unet.named_modules() if isinstance(module, nn.GroupNorm))


def cut(unet: Any, groups: Groups, gone: dict[str, set[int]]) -> Any:
    keep = {g.name: tuple(c for c in range(g.width) if c not in gone.get(g.name, ())) for g in groups.prunable}
    return slim(unet, kept_indices(unet, groups, PruningPlan(keep)), whole=groups.whole)


def mute(unet: Any, group: ChannelGroup, channels: Collection[int], sides: tuple[str, ...] = ("in",)) -> None:
    """Set to zero what reads these channels; with the side ``out`` also what writes them."""
    for member in group.members:
        at = [i for i, c in zip(member.index, member.channel, strict=True) if c in channels]
        for parameter in unet.get_submodule(member.module).parameters() if member.side in sides else ():
            if member.side == "out":
                parameter.data[at] = 0.0
            elif parameter.ndim > 1:
                parameter.data[:, at] = 0.0


def some(group: ChannelGroup, seed: int) -> set[int]:
    """Return about half of a group's channels, in whole blocks and equally many of each segment."""
    generator = torch.Generator().manual_seed(seed)
    part = group.width // group.segments // group.block
    found = set()
    for start in range(0, group.width, part * group.block):
        for number in torch.randperm(part, generator=generator)[: part // 2].tolist():
            found |= set(range(start + number * group.block, start + (number + 1) * group.block))
    return found


# --- no normalisation in between ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changed", "pattern", "count"),
    [
        ("ddpm", {}, "time_embedding.linear_1", 1),
        ("class-conditional", {}, "time_embedding.linear_2", 1),  # with the table of the classes
        ("sdxl", {}, "add_embedding.linear_1", 1),
        ("stable-diffusion", {"encoder_hid_dim": 20, "encoder_hid_dim_type": "text_proj"}, "encoder_hid_proj", 1),
        ("stable-diffusion", {}, "*.ff.net.0.proj", 4),  # GEGLU: value and gate
        ("sdxl", {}, "*.ff.net.0.proj", 8),
    ],
)
def test_what_nothing_reads_goes(
    families: Families, name: str, changed: dict[str, Any], pattern: str, count: int
) -> None:
    unet = families[name](**changed)
    groups, before = find_groups(unet), run(unet)
    chosen = [group for group in groups.prunable if fnmatchcase(group.name, pattern)]
    assert len(chosen) == count
    gone = {group.name: some(group, seed) for seed, group in enumerate(chosen)}
    for group in chosen:
        mute(unet, group, gone[group.name])
    expected = run(unet)
    assert not torch.allclose(before, expected)  # the oracle is not about an idle network
    torch.testing.assert_close(run(cut(unet, groups, gone)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["ddpm", "ldm", "stable-diffusion", "sdxl"])
def test_part_of_each_head_goes_at_the_old_softmax_temperature(families: Families, name: str) -> None:
    unet = families[name]()
    groups, before = find_groups(unet), run(unet)
    inner = [group for group in groups.prunable if is_inner(group)]
    gone = {group.name: some(group, seed) for seed, group in enumerate(inner)}
    for group in inner:
        mute(unet, group, gone[group.name], ("in", "out"))
    expected = run(unet)
    assert not torch.allclose(before, expected)
    small = cut(unet, groups, gone)
    torch.testing.assert_close(run(small), expected, rtol=1e-5, atol=1e-6)
    for group in inner:
        attention, new = (network.get_submodule(group.name.rpartition(".")[0]) for network in (unet, small))
        assert (new.heads, new.inner_dim) == (attention.heads, attention.inner_dim - len(gone[group.name]))


# --- whole heads and whole norm groups ---------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [False, True], ids=["", "flat"])
@pytest.mark.parametrize("name", NAMES)
def test_whole_heads_and_norm_groups_that_nothing_reads_go(families: Families, name: str, flat: bool) -> None:
    changed: dict[str, Any] = {"block_out_channels": (128, 128)} if name == "ncsnpp" else FLAT
    unet = families[name](**changed) if flat else families[name]()
    groups, before = find_groups(unet, **WHOLE), run(unet)
    whole = [group for group in groups.prunable if group.whole]
    gone = {group.name: some(group, seed) for seed, group in enumerate(whole)}
    for group in whole:
        mute(unet, group, gone[group.name])
    expected = run(unet)
    assert not torch.allclose(before, expected)
    small = cut(unet, groups, gone)
    torch.testing.assert_close(run(small), expected, rtol=1e-4, atol=1e-5)
    fewer = [n for n, norm in norms(unet) if small.get_submodule(n).num_groups < norm.num_groups]
    assert any(n.endswith("resnets.0.norm2") for n in fewer)
    if flat:  # every norm, also those over a skip connection and around down- and upsampling
        assert groups.in_parts == {}
        assert fewer == [n for n, _ in norms(unet)]


def test_a_head_that_stays_is_the_originals(families: Families) -> None:
    unet = families["sdxl"]()
    groups = find_groups(unet, heads=True)
    heads = [group for group in groups.prunable if group.whole]
    assert len(heads) == 16
    small = cut(unet, groups, {group.name: set(range(group.block)) for group in heads})
    for group in heads:
        name = group.name.rpartition(".")[0]
        old, new = unet.get_submodule(name), small.get_submodule(name)
        assert new.heads == new.sliceable_head_dim == old.heads - 1
        assert new.scale == old.scale
        for projection in ("to_q", "to_k", "to_v"):
            whole = old.get_submodule(projection).weight
            assert torch.equal(new.get_submodule(projection).weight, whole[group.block :])
        assert torch.equal(new.to_out[0].weight, old.to_out[0].weight[:, group.block :])


def test_fewer_heads_give_the_same_with_every_attention_processor(families: Families) -> None:
    unet = families["sdxl"]()
    groups = find_groups(unet, heads=True)
    small = cut(unet, groups, {group.name: set(range(group.block)) for group in groups.prunable if group.whole})
    expected = run(small)
    small.set_attention_slice("auto")
    torch.testing.assert_close(run(small), expected)
    for attention in (module for module in small.modules() if isinstance(module, Attention)):
        attention.set_processor(AttnProcessor())
    torch.testing.assert_close(run(small), expected)


# --- under a normalisation ---------------------------------------------------------------------------------------


def odd_channels_say_nothing(unet: Any) -> dict[str, tuple[int, ...]]:
    """Change `unet` so that its odd channels can go without a trace; return the even ones of every group.

    Where a norm looks at a group each odd channel becomes a copy of its even neighbour, so that no mean and no
    variance depends on it; elsewhere it becomes zero. What reads the odd channels gets weight zero.
    """
    even = {}
    for group in find_groups(unet).prunable:
        copied = not is_inner(group)
        for member in group.members:
            odd = [(i, j) for i, c in zip(member.index, member.channel, strict=True) for j in [i - 1] if c % 2]
            for parameter in unet.get_submodule(member.module).parameters():
                if member.side == "in" and parameter.ndim == 1:
                    continue
                # An embedding is a table [labels, channels]; every other layer has [out, in, ...].
                table = member.module == "class_embedding"
                view = parameter.data.movedim(1, 0) if member.side == "in" or table else parameter.data
                for there, here in odd:
                    view[there] = view[here] if copied and member.side == "out" else 0.0
        even[group.name] = tuple(range(0, group.width, 2))
    return even


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"layers_per_block": 2},
        {"num_class_embeds": 3},
        {"attention_head_dim": None},
        {"add_attention": False},
        {"downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1},
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
        {"resnet_time_scale_shift": "scale_shift"},
        {"time_embedding_type": "fourier"},
        {"time_embedding_type": "learned", "num_train_timesteps": 100},
        {
            "down_block_types": ("AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D"),
            "block_out_channels": (32, 48, 64),
        },
    ],
    ids=lambda changed: ",".join(changed) or "toy",
)
def test_channels_that_say_nothing_go_without_a_trace(make_unet: Callable[..., Any], changed: dict[str, Any]) -> None:
    unet = make_unet(**changed)
    before = run(unet)
    even = odd_channels_say_nothing(unet)
    expected = run(unet)
    assert not torch.allclose(before, expected)  # the oracle is not about an idle network
    small = slim(unet, kept_indices(unet, find_groups(unet), PruningPlan(even)))
    assert sum(p.numel() for p in small.parameters()) < 0.5 * sum(p.numel() for p in unet.parameters())
    torch.testing.assert_close(run(small), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_copies_of_a_neighbour_go_from_every_family(families: Families, name: str) -> None:
    """GroupNorm and LayerNorm see the same mean and variance without them."""
    unet = families[name]()
    before = run(unet)
    even = odd_channels_say_nothing(unet)
    expected = run(unet)
    assert not torch.allclose(before, expected)
    small = slim(unet, kept_indices(unet, find_groups(unet), PruningPlan(even)))
    torch.testing.assert_close(run(small), expected, rtol=1e-4, atol=1e-5)


# --- norms over two tensors --------------------------------------------------------------------------------------


def test_boundaries_that_move_are_reported(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    groups = find_groups(unet)
    gone = {"conv_in": set(range(1, 32, 2))}
    keep = {g.name: tuple(c for c in range(g.width) if c not in gone.get(g.name, ())) for g in groups.prunable}
    kept = kept_indices(unet, groups, PruningPlan(keep))

    def moved(first: int, before: int, after: int) -> float:
        """Count by hand: `first` channels stay whole before 16 of 32; norm groups had `before` channels each."""
        staying = [*range(first), *range(first, first + 32, 2)]
        return sum(old // before != new // after for new, old in enumerate(staying)) / len(staying)

    found = regrouped(unet, slim(unet, kept), kept)
    expected = {"up_blocks.1.resnets.0.norm1": moved(64, 12, 10), "up_blocks.1.resnets.1.norm1": moved(32, 8, 6)}
    assert found == expected


def test_whole_norm_groups_move_no_boundaries(make_unet: Callable[..., Any]) -> None:
    unet = make_unet(**FLAT)
    groups = find_groups(unet, norm_groups=True)
    keep = {g.name: tuple(c for c in range(g.width) if c >= g.block or not g.whole) for g in groups.prunable}
    kept = kept_indices(unet, groups, PruningPlan(keep))
    small = slim(unet, kept, whole=groups.whole)
    assert regrouped(unet, small, kept) == {}
    assert small.up_blocks[1].resnets[0].norm1.num_groups == 6  # one group of 8 channels from each tensor


@pytest.mark.parametrize("name", NAMES)
def test_a_norm_loses_whole_groups_of_all_that_it_sees_or_of_nothing(families: Families, name: str) -> None:
    unet = families[name]()
    groups = find_groups(unet, **WHOLE)
    seen: dict[str, list[tuple[ChannelGroup, tuple[int, ...], tuple[int, ...]]]] = {}
    for group in groups.prunable:
        for member in group.members:
            seen.setdefault(member.module, []).append((group, member.index, member.channel))
    for norm_name, norm in norms(unet):
        kinds = {group.whole for group, _, _ in seen[norm_name]}
        assert len(kinds) == 1
        size = norm.num_channels // norm.num_groups
        for group, index, channel in seen[norm_name] if kinds == {True} else ():
            for start in range(0, group.width, group.block):
                block = [i for i, c in zip(index, channel, strict=True) if start <= c < start + group.block]
                assert len(block) == size * len({i // size for i in block})
    for group in groups.prunable:
        assert group.whole or group.name in groups.in_parts or group.segments == 1
    assert all("up_blocks" in reason for reason in groups.in_parts.values())


def test_what_is_left_alone_does_not_stop_the_others(make_unet: Callable[..., Any], tmp_path: Path) -> None:
    make_unet(**FLAT).save_pretrained(tmp_path / "base")
    recipe = PruneRecipe(criterion="magnitude", ratio=0.4, align=1, keep=("conv_in",), norm_groups=True)
    prune(str(tmp_path / "base"), tmp_path / "slim", recipe)
    norm = load_model(tmp_path / "slim").unet.up_blocks[1].resnets[1].norm1
    assert (norm.num_channels, norm.num_groups) == (32 + 24, 7)


# --- one cut after another ---------------------------------------------------------------------------------------


@pytest.fixture
def rounds(families: Families, tmp_path: Path) -> list[Any]:
    """A network, cut once and cut twice in whole heads and norm groups."""
    families["ldm"](**FLAT, attention_head_dim=4).save_pretrained(tmp_path / "0")
    for number in (0, 1):
        recipe = PruneRecipe(criterion="magnitude", ratio=0.4, align=1, **WHOLE)
        prune(str(tmp_path / str(number)), tmp_path / str(number + 1), recipe)
    return [load_model(tmp_path / str(number)) for number in range(3)]


def test_heads_and_norm_groups_keep_their_size_over_rounds(rounds: list[Any]) -> None:
    for before, after in zip(rounds, rounds[1:], strict=False):
        stats = after.manifest.stats
        assert stats["left_alone"] == {"conv_out": "it is the network's output"}
        assert stats["in_parts"] == stats["regrouped_norms"] == {}
        for name, norm in norms(before.unet):
            new = after.unet.get_submodule(name)
            assert new.num_groups < norm.num_groups
            assert new.num_channels * norm.num_groups == norm.num_channels * new.num_groups
        for name, module in before.unet.named_modules():
            if isinstance(module, Attention):
                new = after.unet.get_submodule(name)
                assert new.heads < module.heads
                assert new.inner_dim * module.heads == module.inner_dim * new.heads


def test_two_cuts_are_one(rounds: list[Any]) -> None:
    base, _, twice = (model.unet for model in rounds)
    both = load_file(rounds[2].directory / "unet" / "kept.safetensors")
    at_once = slim(base, both, whole=find_groups(base, **WHOLE).whole)
    assert at_once.config.channels == twice.config.channels
    assert all(torch.equal(value, twice.state_dict()[name]) for name, value in at_once.state_dict().items())
    assert torch.equal(run(at_once), run(twice))


def test_a_cut_in_parts_may_follow(rounds: list[Any], tmp_path: Path) -> None:
    recipe = PruneRecipe(criterion="magnitude", ratio=0.4, align=1)
    manifest = prune(str(rounds[1].directory), tmp_path / "after", recipe)
    small, before = load_model(tmp_path / "after").unet, rounds[1].unet
    assert {n: m.num_groups for n, m in norms(small)} == {n: m.num_groups for n, m in norms(before)}
    assert manifest.stats["achieved"]["params"] < rounds[1].manifest.stats["achieved"]["params"]
    assert all("no multiple of" in why for name, why in manifest.stats["left_alone"].items() if name != "conv_out")
