"""Feature distillation: nothing where the student is its teacher, channels by their partners, whatever the wrapper."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpctl.cost import example_inputs
from dpctl.finetune.features import Features, Kept, attention_map, match, read_kept
from dpctl.models import load_model
from dpctl.prune import prune
from dpctl.prune.groups import find_groups
from dpctl.prune.plan import PruningPlan
from dpctl.prune.surgery import kept_indices, slim
from dpctl.recipe import PruneRecipe
from dpctl.signature import unet_arguments

NAMES = (
    *("ddpm", "ldm", "class-conditional", "ncsnpp", "resnet-resampling", "scale-shift"),
    *("stable-diffusion", "sdxl", "inpainting", "latent-consistency"),
)
Families = dict[str, Callable[..., Any]]


def run(unet: Any) -> Tensor:
    """Return a network's output for three samples of some noise."""
    generator = torch.Generator().manual_seed(1)
    inputs = {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for name, value in example_inputs(unet, 3).items()
    }
    output: Tensor = unet(**unet_arguments(inputs | {"timestep": torch.tensor([3.0, 40.0, 71.0])})).sample
    return output


def outputs(found: Features, unet: Any, forward: Callable[[Any], Tensor] = run) -> dict[str, Tensor]:
    with found.watching(unet) as seen:
        forward(unet)
    return seen


def errors(found: Features, student: Any, teacher: Any) -> list[float]:
    with torch.no_grad():
        return found.error(outputs(found, student), outputs(found, teacher)).tolist()


def half_says_nothing(unet: Any, without: str | None = None) -> Kept:
    """Change `unet` so that half of its channels can go without a trace; return the positions that stay.

    Of every four channels of a group the second two (of every other group: the second and the fourth) become copies of
    their neighbours, so that no norm sees them go, and nothing reads them. Channels that no norm sees become zero. The
    branch of the resnet `without` says nothing at all.
    """
    groups, keep = find_groups(unet, depth=True), {}
    for number, group in enumerate(groups.prunable):
        back = 1 + number % 2
        gone = {c for c in range(group.width) if c % 4 in ((1, 3) if back == 1 else (2, 3))}
        inner = any(member.module.endswith(".to_q") and member.side == "out" for member in group.members)
        for member in group.members:
            table = member.module == "class_embedding"
            for parameter in unet.get_submodule(member.module).parameters():
                if member.side == "in" and parameter.ndim == 1:
                    continue
                rows = parameter.data.movedim(1, 0) if member.side == "in" or table else parameter.data
                for i, channel in zip(member.index, member.channel, strict=True):
                    if channel in gone:
                        rows[i] = rows[i - back] if member.side == "out" and not inner else 0.0
        keep[group.name] = tuple(c for c in range(group.width) if c not in gone)
        if without is not None and group.branch == without:
            keep[group.name] = ()
            unet.get_submodule(f"{without}.conv2").weight.data.zero_()
    return kept_indices(unet, groups, PruningPlan(keep))


def hooks(network: nn.Module) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())


# --- partners -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_student_that_is_its_teacher_differs_in_nothing(families: Families, name: str) -> None:
    teacher = families[name]()
    found = match(copy.deepcopy(teacher), teacher, {})
    assert found.blocks == ("down_blocks.0", "down_blocks.1", "mid_block", "up_blocks.0", "up_blocks.1")
    assert found.by_map == ()
    assert errors(found, copy.deepcopy(teacher), teacher) == [0.0] * 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("without", [None, "mid_block.resnets.1"])
def test_a_student_whose_channels_are_its_teachers_differs_in_nothing(
    families: Families, name: str, without: str | None
) -> None:
    teacher = families[name]()
    kept = half_says_nothing(teacher, without)
    student = slim(teacher, kept)
    found = match(student, teacher, kept)
    assert found.by_map == ()
    seen = outputs(found, student), outputs(found, teacher)
    assert all(2 * ours.shape[1] == theirs.shape[1] for ours, theirs in zip(*(s.values() for s in seen), strict=True))
    assert found.error(*seen).tolist() == pytest.approx([0.0] * 3, abs=1e-8)
    # In another order of channels they differ: the oracle is not about blocks that say nothing.
    shifted = {block: torch.arange(ours.shape[1]) for block, ours in seen[0].items()}
    assert min(Features(shifted).error(*seen).tolist()) > 0.05


def test_the_artifacts_of_pruning_say_which_channels_are_partners(family: Path, tmp_path: Path) -> None:
    pruned, teacher = load_model(family / "pruned"), load_model(family / "teacher")
    kept = read_kept(family / "pruned")
    assert kept
    assert read_kept(family / "teacher") is None
    found = match(pruned.unet, teacher.unet, kept)
    assert found.by_map == ()
    assert 0.0 < max(errors(found, pruned.unet, teacher.unet)) < 5.0
    # Pruned again, its channels are found in the unpruned network and in the one between.
    prune(str(family / "pruned"), tmp_path / "again", PruneRecipe("magnitude", target_macs=0.3))
    again, kept_again = load_model(tmp_path / "again").unet, read_kept(tmp_path / "again")
    for network, theirs in ((teacher.unet, None), (pruned.unet, kept)):
        assert match(again, network, kept_again, theirs).by_map == ()
    between = match(again, pruned.unet, kept_again, kept)._channels["mid_block"]
    assert between is not None
    key = "mid_block.resnets.1.conv2.out"
    assert kept_again is not None
    assert torch.equal(kept[key][between], kept_again[key])


def test_the_stock_layout_has_partners_too(family: Path, tmp_path: Path) -> None:
    prune(str(family / "teacher"), tmp_path / "stock", PruneRecipe("magnitude", target_macs=0.6, layout="stock"))
    stock, teacher = load_model(tmp_path / "stock").unet, load_model(family / "teacher").unet
    assert type(stock) is type(teacher)
    kept = read_kept(tmp_path / "stock")
    assert kept
    found = match(stock, teacher, kept)
    assert found.by_map == ()
    seen = outputs(found, stock), outputs(found, teacher)
    assert seen[0]["mid_block"].shape[1] < seen[1]["mid_block"].shape[1]
    assert max(found.error(*seen).tolist()) < 5.0


def test_where_the_partners_are_not_known_the_maps_are_compared(make_unet: Callable[..., Any]) -> None:
    student, teacher = make_unet(1, block_out_channels=(16, 32)), make_unet(2)
    found = match(student, teacher)
    assert found.by_map == found.blocks
    assert min(errors(found, student, teacher)) > 0.01
    # Kept positions of another network are no partners either.
    foreign = {"mid_block.resnets.1.conv2.out": torch.arange(32) + 40}
    assert "mid_block" in match(student, teacher, foreign).by_map


def test_a_map_knows_no_channel_and_no_scale(make_unet: Callable[..., Any]) -> None:
    output = torch.randn(3, 12, 4, 5, generator=torch.Generator().manual_seed(0))
    shuffled = 7.0 * output[:, torch.randperm(12, generator=torch.Generator().manual_seed(1))]
    assert attention_map(output).shape == (3, 4, 5)
    found = Features({"block": None})
    assert found.error({"block": shuffled}, {"block": output}).tolist() == pytest.approx([0.0] * 3, abs=1e-10)
    assert min(found.error({"block": output.flip(-1)}, {"block": output}).tolist()) > 0.01


def test_a_wider_teacher_of_another_base_has_no_partners(make_unet: Callable[..., Any]) -> None:
    base = make_unet()
    kept = half_says_nothing(base)
    student = slim(base, kept)
    assert match(student, base, kept).by_map == ()
    wider = match(student, make_unet(2, block_out_channels=(64, 128)), kept)
    assert wider.by_map == wider.blocks


def test_networks_of_other_blocks_are_refused(make_unet: Callable[..., Any], refused: Callable[..., Any]) -> None:
    deeper = make_unet(
        block_out_channels=(32, 32, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )
    with refused("the teacher's blocks are not the model's", got="down_blocks.2 at 2x2", todo="--feature-distillation"):
        match(make_unet(), deeper)
    with refused("the teacher's blocks are not the model's", got="up_blocks.1 at 16x16"):
        match(make_unet(), make_unet(sample_size=16))


# --- the error ------------------------------------------------------------------------------------------------------


def test_the_error_is_relative_to_the_teacher_for_each_sample_and_block() -> None:
    generator = torch.Generator().manual_seed(0)
    teacher = {name: torch.randn(3, 8, 4, 4, generator=generator) for name in ("large", "small")}
    found = Features({name: torch.tensor([1, 4]) for name in teacher})
    # One block is off by a tenth everywhere, the other by half, for the second sample alone.
    student = {name: output[:, [1, 4]] for name, output in teacher.items()}
    student = {"large": 1.1 * student["large"], "small": student["small"] * torch.tensor([1, 1.5, 1]).view(3, 1, 1, 1)}
    expected = [0.01 / 2, (0.01 + 0.25) / 2, 0.01 / 2]
    assert found.error(student, teacher).tolist() == pytest.approx(expected, rel=1e-4)
    # And stays so in whatever units a block is.
    for outputs_of in (student, teacher):
        outputs_of["large"] = 1e3 * outputs_of["large"]
    assert found.error(student, teacher).tolist() == pytest.approx(expected, rel=1e-4)


def test_a_teacher_that_is_silent_divides_nothing_by_zero() -> None:
    silent = {"block": torch.zeros(2, 4, 3, 3)}
    for index in (torch.arange(4), None):
        found = Features({"block": index})
        assert found.error(silent, silent).tolist() == [0.0, 0.0]


# --- wrappers -------------------------------------------------------------------------------------------------------


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A group of this process alone."""
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def gradients(found: Features, student: Any, teacher: Any) -> dict[str, Tensor]:
    """Return the gradient of the error for a student, wrapped or not."""
    with torch.no_grad():
        theirs = outputs(found, teacher)
    inner = getattr(student, "module", student)
    inner.zero_grad()
    with found.watching(student) as ours:
        output = student(torch.ones(3, 1, 8, 8), torch.tensor([3.0, 40.0, 71.0])).sample
    assert hooks(student) == 0
    (found.error(ours, theirs).mean() + 0.0 * output.mean()).backward()
    return {name: parameter.grad.clone() for name, parameter in inner.named_parameters()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.usefixtures("process_group")
def test_through_the_wrapper_for_several_processes_it_is_the_same(make_unet: Callable[..., Any]) -> None:
    student, teacher = make_unet(1), make_unet(2)
    found = match(student, teacher)
    plain = gradients(found, student, teacher)
    assert float(plain["conv_in.weight"].abs().max()) > 0.0
    wrapped = nn.parallel.DistributedDataParallel(student)
    for _ in range(2):  # a second step fails where the first left a parameter without gradient
        assert same(gradients(found, wrapped, teacher), plain)


def test_with_gradient_checkpointing_it_is_the_same(make_unet: Callable[..., Any]) -> None:
    student, teacher = make_unet(1).train(), make_unet(2)
    found = match(student, teacher)
    plain = gradients(found, student, teacher)
    student.enable_gradient_checkpointing()
    again = gradients(found, student, teacher)
    assert all(torch.allclose(again[name], plain[name], rtol=1e-4, atol=1e-7) for name in plain)


def test_nothing_stays_on_a_network_that_failed(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    found = match(unet, make_unet(1))

    def fail(network: Any) -> Tensor:
        assert hooks(network) == len(found.blocks)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        outputs(found, unet, fail)
    assert hooks(unet) == 0
