"""Depth: a residual branch without channels is gone, and the block is its shortcut and a constant."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file
from torch import Tensor, nn

from dpctl import cost
from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.prune import check, prune
from dpctl.prune.adapters import slice_lora
from dpctl.prune.branches import Branch, find_branches
from dpctl.prune.compensate import compensate
from dpctl.prune.groups import Groups, find_groups, restrict
from dpctl.prune.network import describe
from dpctl.prune.plan import Network, PruningPlan, select, widths_for_target
from dpctl.prune.removal import with_removals
from dpctl.prune.surgery import compose, kept_indices, slim
from dpctl.prune.terms import Term
from dpctl.pruned_unet import Removed, _require_fitting
from dpctl.recipe import PruneRecipe
from dpctl.signature import unet_arguments

NAMES: tuple[Any, ...] = ("ddpm", "ldm", "resnet-resampling", "scale-shift", "stable-diffusion", "sdxl")
NAMES += tuple(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("class-conditional", "ncsnpp", "inpainting", "latent-consistency")
)
DEEP = PruneRecipe(criterion="magnitude", target_macs=0.1, scope="global", depth=True, align=1)
Families = dict[str, Callable[..., Any]]


def inputs(unet: Any, count: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + 1
        for name, value in cost.example_inputs(unet, count).items()
    }
    return drawn | {"timestep": torch.linspace(3, 71, count)}


@torch.no_grad()
def run(unet: Any) -> Tensor:
    return unet(**unet_arguments(inputs(unet))).sample


def traced(unet: Any) -> tuple[Groups, Network]:
    groups = find_groups(unet, depth=True)
    return groups, describe(unet, groups)


def without(unet: Any, groups: Groups, network: Network, **widths: int) -> tuple[Any, dict[str, Tensor], PruningPlan]:
    """Cut a network at these widths by group, its others whole; return it, what was kept, and the plan."""
    plan = select(network, network.alike(), network.full() | widths)
    kept = kept_indices(unet, groups, plan)
    return slim(unet, kept, whole=groups.whole), kept, plan


def priced(small: Any, network: Network, widths: Mapping[str, int]) -> bool:
    counted = cost.stats(small)
    return (counted["params"], counted["macs"]) == (network.cost("params", widths), network.cost("macs", widths))


def branch(unet: Any, block: str) -> Branch:
    return next(found for found in find_branches(unet) if found.block == block)


@pytest.mark.parametrize("name", NAMES)
def test_each_branch_that_goes_leaves_what_its_last_layer_gives_of_nothing(families: Families, name: str) -> None:
    unet = families[name]()
    groups, network = traced(unet)
    optional = {group.name: group.branch for group in groups.prunable if group.branch is not None}
    plain = [
        n for n, m in unet.named_modules() if type(m).__name__ == "ResnetBlock2D" and not (m.upsample or m.downsample)
    ]
    assert {block for block in optional.values() if "resnets" in block} == set(plain) - {
        n for n in plain if "resnets" not in n
    }
    for group, block in optional.items():
        small, _, plan = without(unet, groups, network, **{group: 0})
        last = unet.get_submodule(branch(unet, block).last)
        weight = last.weight.data.clone()
        last.weight.data.zero_()
        expected = run(unet)
        last.weight.data.copy_(weight)
        torch.testing.assert_close(run(small), expected, rtol=1e-5, atol=1e-5)
        assert isinstance(small.get_submodule(block), Removed)
        assert priced(small, network, plan.widths())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_left_is_cut_again(families: Families, name: str) -> None:
    """The constants are coupled to what passes by: the second cut takes their channels, and more branches."""
    unet = families[name]()
    groups, network = traced(unet)
    first = {span.name: 0 for span in network.spans if span.optional and not span.within}
    first = dict(list(first.items())[::2])
    once, kept, _ = without(unet, groups, network, **first)
    again, net = traced(once)
    assert set(again.left_alone) == set(groups.left_alone)
    assert priced(once, net, net.full())
    narrow = {s.name: 0 if s.optional else s.widths(1)[len(s.widths(1)) // 2] for s in net.spans}
    twice, later, last = without(once, again, net, **narrow)
    assert priced(twice, net, last.widths())
    removed = {n: m for n, m in twice.named_modules() if isinstance(m, Removed)}
    assert len(removed) >= len(first)
    # Positions are those of the base, whichever cut took the branch: the constant is that part of the base's own.
    both = compose(kept, later)
    for block, left in removed.items():
        bias = unet.get_submodule(branch(unet, block).last).bias
        assert torch.equal(left.bias.flatten(), bias[both[f"{block}.out"]])


def test_positions_are_the_bases_where_the_stream_narrowed_before_the_branch_went(toy_unet: Any) -> None:
    groups, network = traced(toy_unet)
    stream = next(g.name for g in groups.prunable if any(m.module == "mid_block.resnets.1.conv2" for m in g.members))
    inner = next(group.name for group in groups.prunable if group.branch == "mid_block.resnets.1")
    once, kept, _ = without(toy_unet, groups, network, **{stream: 32})
    again, net = traced(once)
    for narrower in (32, 16):
        twice, later, _ = without(once, again, net, **{stream: narrower, inner: 0})
        both = compose(kept, later)
        bias = toy_unet.mid_block.resnets[1].conv2.bias
        assert torch.equal(twice.mid_block.resnets[1].bias.flatten(), bias[both["mid_block.resnets.1.out"]])
        assert {key for key in both if key.startswith("mid_block.resnets.1.")} == {
            "mid_block.resnets.1.conv2.in",
            "mid_block.resnets.1.out",
        }


@pytest.mark.parametrize(
    ("keep", "only", "stays"),
    [
        ((), (), False),
        (("*.attn1.to_q",), (), True),  # an attention inside
        (("mid_block.attentions.0.transformer_blocks.0.norm2",), (), True),
        ((), ("mid_block.attentions.0.proj_in",), True),  # its attentions are left alone
        (("conv_in",), (), False),
    ],
)
def test_a_branch_with_something_to_keep_in_it_stays(
    families: Families, keep: tuple[str, ...], only: tuple[str, ...], stays: bool
) -> None:
    groups = restrict(find_groups(families["stable-diffusion"](), depth=True), keep, only)
    assert ("mid_block.attentions.0" not in {group.branch for group in groups.prunable}) is stays


def test_a_branch_that_went_may_still_be_named(families: Families) -> None:
    groups = find_groups(families["ddpm"]())
    with pytest.raises(DpctlError, match="names no module"):
        restrict(groups, ("mid_block.resnets.7.conv1",), ())
    restrict(groups, ("mid_block.resnets.7.conv1",), (), ("mid_block.resnets.7",))


@pytest.mark.parametrize("name", ["ddpm", "stable-diffusion", "sdxl"])
def test_terms_charge_nothing_for_what_is_in_a_branch_that_is_gone(
    families: Families, terms_of: Callable[[Any, str], list[Term]], name: str
) -> None:
    """Keys and values of words have an input of their own, and norms the one that passes by."""
    _, network = traced(families[name]())
    for span in network.spans:
        if span.optional:
            widths = network.full() | {span.name: 0}
            closed = network.closed(widths)
            assert sum(term.cost(widths) for term in terms_of(network, "macs")) == network.cost("macs", closed)
            left = sum(term.cost(widths) for term in terms_of(network, "params"))
            last = [layer for layer in network.layers if layer.vectors and not layer.inputs.width(closed)]
            assert left <= network.cost("params", closed) <= left + sum(layer.params(closed) for layer in last)


def test_a_transformer_goes_with_everything_in_it(families: Families) -> None:
    unet = families["sdxl"]()
    groups, network = traced(unet)
    outer = next(group for group in groups.prunable if group.branch == "mid_block.attentions.0")
    inner = [span.name for span in network.inside[outer.name]]
    assert len(inner) == 6  # two blocks of two attentions and a feed-forward
    small, kept, plan = without(unet, groups, network, **{outer.name: 0})
    assert all(plan.keep[name] == () for name in (outer.name, *inner))
    assert not any("mid_block.attentions.0." in name for name in small.state_dict() if not name.endswith(".bias"))
    assert {key for key in kept if key.startswith("mid_block.attentions.0")} == {
        "mid_block.attentions.0.proj_out.in",
        "mid_block.attentions.0.out",
    }
    assert priced(small, network, plan.widths())


def test_a_budget_decides_what_goes(toy_unet: Any) -> None:
    groups, network = traced(toy_unet)
    scores = {span.name: [1.0 + c for c in range(span.width)] for span in network.spans}
    worthless = next(group.name for group in groups.prunable if group.branch == "mid_block.resnets.1")
    scores[worthless] = [1e-6] * len(scores[worthless])
    budget = 0.6 * network.cost("macs", network.full())
    widths = widths_for_target(network, scores, "macs", budget, 8)
    assert widths[worthless] == 0
    assert network.cost("macs", widths) <= budget
    plain = describe(toy_unet, find_groups(toy_unet))
    assert min(widths_for_target(plain, scores, "macs", budget, 8).values()) > 0


def test_what_is_inside_counts_when_a_transformer_is_weighed(families: Families) -> None:
    """Its own channels are worth next to nothing here, and those of its attentions a lot."""
    groups, network = traced(families["stable-diffusion"]())
    outer = next(group.name for group in groups.prunable if group.branch == "mid_block.attentions.0")
    scores = {span.name: [1.0] * span.width for span in network.spans}
    scores[outer] = [1e-6] * len(scores[outer])
    budget = 0.7 * network.cost("macs", network.full())
    for worth, stays in ((1e3, True), (1e-6, False)):
        scores |= {span.name: [worth] * span.width for span in network.inside[outer]}
        assert (widths_for_target(network, scores, "macs", budget, 8)[outer] > 0) is stays


@pytest.mark.parametrize("name", ["ddpm", "scale-shift", "stable-diffusion"])
def test_the_constant_becomes_the_mean_of_what_the_branch_added(families: Families, name: str) -> None:
    unet = families[name]()
    groups, network = traced(unet)
    going = {
        group.name: group.branch
        for group in groups.prunable
        if group.branch in ("mid_block.resnets.0", "mid_block.attentions.0")
    }
    assert len(going) == 2
    small, kept, _ = without(unet, groups, network, **dict.fromkeys(going, 0))
    seen: dict[str, Tensor] = {}
    for block in going.values():
        last = unet.get_submodule(branch(unet, block).last)
        last.register_forward_hook(lambda layer, given, output, block=block: seen.update({block: output}))
    given = inputs(unet, 16)
    fits = compensate(unet, small, kept, given)
    for block in going.values():
        output = seen[block].movedim(1, -1) if seen[block].ndim == 4 else seen[block]
        torch.testing.assert_close(small.get_submodule(block).bias.flatten(), output.flatten(0, -2).mean(0))
        assert fits[block].after < fits[block].before


def test_a_branch_that_added_nothing_leaves_no_figure(toy_unet: Any) -> None:
    groups, network = traced(toy_unet)
    last = toy_unet.mid_block.resnets[0].conv2
    last.weight.data.zero_()
    last.bias.data.zero_()
    name = next(group.name for group in groups.prunable if group.branch == "mid_block.resnets.0")
    small, kept, _ = without(toy_unet, groups, network, **{name: 0})
    assert "mid_block.resnets.0" not in compensate(toy_unet, small, kept, inputs(toy_unet, 16))


def test_a_branch_is_worth_what_the_loss_says_of_it(toy_unet: Any) -> None:
    """Its channels' scores are those of all others here: alone they would say that each branch is worth the same."""
    unet = toy_unet
    groups, network = traced(unet)
    names = {group.branch: group.name for group in groups.prunable}
    dear, idle = names["up_blocks.1.resnets.1"], names["mid_block.resnets.0"]
    with torch.no_grad():
        unet.up_blocks[1].resnets[1].conv2.weight *= 4
        unet.mid_block.resnets[0].conv2.weight.zero_()
    # An untrained network has no loss that a cut would raise: the distance to itself is one.
    whole = run(unet)
    probe: Any = SimpleNamespace(loss=lambda other: 1.0 + float((run(other) - whole).square().mean()))
    before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    scores = network.alike()
    found = with_removals(network, unet, groups, scores, probe, 8)
    removal = {span.name: span.removal for span in found.spans}
    assert removal[idle] == 0.0
    assert removal[dear] == max(removal.values()) > 64
    assert all(removal[span.name] == 0.0 for span in network.spans if not span.optional)
    assert all(torch.equal(before[name], tensor) for name, tensor in unet.state_dict().items())
    budget = 0.1 * network.cost("macs", network.full())
    plain, weighed = (widths_for_target(each, scores, "macs", budget, 8) for each in (network, found))
    assert (plain[dear], weighed[dear] > 0) == (0, True)


@pytest.fixture(scope="module")
def deep(families: Families, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Toys whose branches went, NAME/slim, beside what they were cut from, NAME/base."""
    folder = tmp_path_factory.mktemp("deep")
    for name in ("ddpm", "sdxl"):
        families[name]().save_pretrained(folder / name / "base" / "unet")
        DDPMScheduler().save_pretrained(folder / name / "base" / "scheduler")
        prune(str(folder / name / "base"), folder / name / "slim", DEEP)
    return folder


@pytest.mark.parametrize("name", ["ddpm", "sdxl"])
def test_it_loads_in_stock_diffusers_and_is_saved_again(deep: Path, name: str, tmp_path: Path) -> None:
    model = load_model(deep / name / "slim")
    assert any(isinstance(module, Removed) for module in model.unet.modules())
    model.unet.save_pretrained(tmp_path / "mine")
    code = (
        "import sys; from diffusers import AutoModel\n"
        "unet = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "assert 'dpctl' not in sys.modules\n"
        "unet.save_pretrained(sys.argv[2])"
    )
    path = {"PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    subprocess.run(
        [sys.executable, "-c", code, deep / name / "slim" / "unet", tmp_path / "stock"], check=True, env=path
    )
    weights = "diffusion_pytorch_model.safetensors"
    mine, stock = (load_file(tmp_path / which / weights) for which in ("mine", "stock"))
    assert mine.keys() == stock.keys()
    assert all(torch.equal(mine[key], stock[key]) for key in mine)


def test_it_is_cut_in_a_second_round(deep: Path, tmp_path: Path) -> None:
    before = load_model(deep / "ddpm" / "slim").manifest
    after = prune(str(deep / "ddpm" / "slim"), tmp_path / "twice", replace(DEEP, target_macs=0.08))
    assert after.stats["achieved"]["macs"] <= 0.08
    assert before is not None
    once, twice = before.stats["widths"], after.stats["widths"]
    assert once.keys() == twice.keys()
    assert all(twice[name][0] == whole and twice[name][1] <= kept for name, (whole, kept) in once.items())
    assert any(kept == 0 for _, kept in once.values())


def test_a_lora_loses_the_layers_that_are_gone(deep: Path) -> None:
    base, small = (load_model(deep / "sdxl" / which).unet for which in ("base", "slim"))
    lora = {}
    for name, layer in base.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith((".to_q", ".to_v")):
            lora[f"{name}.lora_A.weight"] = torch.ones(2, layer.in_features)
            lora[f"{name}.lora_B.weight"] = torch.ones(layer.out_features, 2)
        elif name.endswith(".conv1"):
            lora[f"{name}.lora_A.weight"] = torch.ones(2, layer.in_channels, 3, 3)
            lora[f"{name}.lora_B.weight"] = torch.ones(layer.out_channels, 2, 1, 1)
    sliced = slice_lora(lora, load_file(deep / "sdxl" / "slim" / "unet" / "kept.safetensors"), small)
    there = {name for name, _ in small.named_modules()}
    assert 0 < len(sliced) < len(lora)
    assert {key.partition(".lora_")[0] for key in sliced} <= there
    _require_fitting(small, sliced, None)


@pytest.mark.parametrize(
    "changed",
    [
        {"layout": "stock", "scope": "auto"},
        {"scope": "local"},
        {"scope": "auto"},  # local, under a criterion whose scores do not compare
        {"floor": 0.1},
        {"target_macs": None, "ratio": 0.3, "scope": "auto"},
    ],
)
def test_what_cannot_lose_a_whole_branch_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(DpctlError, match="--depth needs groups"):
        check(replace(DEEP, **changed))


def test_gradients_reach_the_constant(families: Families) -> None:
    unet = families["ddpm"]()
    groups, network = traced(unet)
    name = next(group.name for group in groups.prunable if group.branch == "mid_block.resnets.0")
    small, _, _ = without(unet, groups, network, **{name: 0})
    small.train().enable_gradient_checkpointing()
    small(**unet_arguments(inputs(small))).sample.square().mean().backward()
    assert float(small.get_submodule("mid_block.resnets.0").bias.grad.abs().sum()) > 0
