"""Every criterion, found in its folder, keeps the promises of a criterion."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpctl import registry
from dpctl.data import Pixels, open_data
from dpctl.errors import DpctlError
from dpctl.prune import CRITERIA
from dpctl.prune.gradients import Draws, Weighting, each_gradient
from dpctl.prune.groups import ChannelGroup, Member, find_groups
from dpctl.prune.importance import Scores, Scoring, reduce_over, slices
from dpctl.recipe import PruneRecipe

NAMES = registry.names(CRITERIA)
LOOKING = [name for name in NAMES if name != "random"]
NARROW = 0.97  # an untrained network's losses hardly fall with t: this leaves out some timesteps
RECIPE = PruneRecipe(ratio=0.5, images=8, batch_size=4, timesteps=4, threshold=NARROW)


@pytest.fixture
def scoring(toy_model: Any, toy_images: Path) -> Scoring:
    images = Pixels(open_data(str(toy_images), channels=1, size=(8, 8)))
    return Scoring(toy_model.unet, find_groups(toy_model.unet).prunable, toy_model.scheduler, images, RECIPE)


def score(name: str, scoring: Scoring, **changed: Any) -> Scores:
    recipe = dataclasses.replace(scoring.recipe, criterion=name, **changed)
    return registry.load(CRITERIA, name, "criterion").score(dataclasses.replace(scoring, recipe=recipe))


def same(one: Scores, other: Scores) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_the_folder_is_the_registry() -> None:
    assert NAMES == ("diff-pruning", "fisher", "magnitude", "random", "taylor")


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_scores_every_channel_of_every_group(name: str, scoring: Scoring) -> None:
    scores = score(name, scoring)
    assert list(scores) == [group.name for group in scoring.groups]
    for group in scoring.groups:
        assert scores[group.name].shape == (group.width,)
        assert bool(scores[group.name].isfinite().all())
        assert bool((scores[group.name] >= 0).all())
        assert len(scores[group.name].unique()) > group.width // 2  # it tells channels apart


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_says_whether_it_needs_data_and_lives_without_where_it_does_not(
    name: str, scoring: Scoring
) -> None:
    without = dataclasses.replace(scoring, images=None)
    if registry.load(CRITERIA, name, "criterion").NEEDS_DATA:
        with pytest.raises(DpctlError, match=f"needs data\n.*{name}"):
            score(name, without)
    else:
        assert same(score(name, without), score(name, scoring))


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_is_reproducible_bit_for_bit(name: str, scoring: Scoring) -> None:
    one = score(name, scoring)
    torch.manual_seed(99)
    assert same(one, score(name, scoring))
    assert same(one, score(name, dataclasses.replace(scoring, unet=copy.deepcopy(scoring.unet))))
    # Another seed: other images, other noise, other draws; magnitude looks at weights only.
    assert same(one, score(name, scoring, seed=1)) == (name == "magnitude")


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_leaves_the_model_as_it_was(name: str, scoring: Scoring) -> None:
    before = {key: value.clone() for key, value in scoring.unet.state_dict().items()}
    score(name, scoring)
    assert all(torch.equal(before[key], value) for key, value in scoring.unet.state_dict().items())
    assert not scoring.unet.training


@pytest.mark.parametrize("name", NAMES)
def test_a_criterion_documents_itself(name: str) -> None:
    module = registry.load(CRITERIA, name, "criterion")
    assert module.__doc__
    assert module.score.__doc__


# --- permuting channels permutes scores --------------------------------------------------------------------------


def swap_some_neighbours(unet: Any, groups: tuple[ChannelGroup, ...]) -> dict[str, list[int]]:
    """Swap random pairs (2i, 2i + 1) in every group, in every layer: the function of the network stays the same.

    Pairs never cross a border of norm groups, heads or concatenated tensors. Returns group -> the new order.
    """
    generator = torch.Generator().manual_seed(5)
    orders = {}
    for group in groups:
        swapped = torch.rand(group.width // 2, generator=generator) < 0.5
        order = [c ^ 1 if swapped[c // 2] else c for c in range(group.width)]
        for member in group.members:
            place = {(i - i % 2, c): i for i, c in zip(member.index, member.channel, strict=True)}
            here = torch.tensor(member.index)
            there = torch.tensor(
                [place[i - i % 2, order[c]] for i, c in zip(member.index, member.channel, strict=True)]
            )
            for parameter, dimension in slices(unet.get_submodule(member.module), member.side):
                values = unet.get_submodule(member.module).get_parameter(parameter).data.movedim(dimension, 0)
                values[here] = values[there].clone()
        orders[group.name] = order
    return orders


@pytest.mark.parametrize("name", LOOKING)
def test_permuting_channels_permutes_scores(name: str, scoring: Scoring) -> None:
    before = score(name, scoring)
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([5, 50])
    with torch.no_grad():
        expected = scoring.unet(*inputs).sample
        orders = swap_some_neighbours(scoring.unet, scoring.groups)
        torch.testing.assert_close(scoring.unet(*inputs).sample, expected, rtol=1e-4, atol=1e-5)
    after = score(name, scoring)
    for group, order in orders.items():
        assert order != sorted(order)
        torch.testing.assert_close(after[group], before[group][order], rtol=1e-3, atol=1e-6)


# --- what each one says ------------------------------------------------------------------------------------------


def test_magnitude_is_the_squared_norm_over_all_coupled_layers(scoring: Scoring) -> None:
    unet, channel = scoring.unet, 5
    first, second = unet.time_embedding.linear_1, unet.time_embedding.linear_2
    layers = (first.weight[channel], first.bias[channel], second.weight[:, channel])
    found = score("magnitude", scoring)["time_embedding.linear_1"][channel]
    assert float(found) == pytest.approx(sum(values.square().sum().item() for values in layers), rel=1e-5)


@pytest.mark.parametrize("name", LOOKING)
def test_a_channel_of_zeros_is_worth_nothing(name: str, scoring: Scoring) -> None:
    group = next(g for g in scoring.groups if g.name == "time_embedding.linear_1")
    with torch.no_grad():
        for layer, dimension in ((scoring.unet.time_embedding.linear_1, 0), (scoring.unet.time_embedding.linear_2, 1)):
            layer.weight.movedim(dimension, 0)[7] = 0.0
        scoring.unet.time_embedding.linear_1.bias[7] = 0.0
    scores = score(name, scoring)[group.name]
    assert float(scores[7]) == 0.0
    assert int((scores > 0).sum()) == group.width - 1


def test_taylor_is_diff_pruning_over_all_timesteps(scoring: Scoring) -> None:
    taylor = score("taylor", scoring)
    assert same(taylor, score("diff-pruning", scoring, threshold=0.0))
    assert not same(taylor, score("diff-pruning", scoring, threshold=NARROW))
    assert same(taylor, score("taylor", scoring, threshold=0.9))  # its threshold is no knob


def test_the_reduction_is_a_knob_of_its_own(scoring: Scoring) -> None:
    values = {name: torch.ones_like(p) for name, p in scoring.unet.named_parameters()}
    values["time_embedding.linear_1.weight"][3] *= -1
    group = next(g for g in scoring.groups if g.name == "time_embedding.linear_1")
    inputs, outputs = 32, 128  # of linear_1, of linear_2; linear_1 has a bias
    assert reduce_over(scoring.unet, group, values, "sum-abs").tolist() == [inputs + 1 + outputs] * 128
    # Signs cancel within a layer, not between layers.
    expected = [inputs + 1 + outputs] * 128
    expected[3] = abs(1 - inputs) + outputs
    assert reduce_over(scoring.unet, group, values, "abs-sum").tolist() == expected


def test_a_layer_may_hold_the_channels_in_another_order_and_more_than_once() -> None:
    layers = nn.ModuleDict({"one": nn.Linear(1, 3, bias=False), "two": nn.Linear(4, 1)})
    members = (Member("one", "out", (0, 1, 2), (2, 0, 1)), Member("two", "in", (0, 2, 3, 1), (0, 1, 1, 2)))
    values = {
        "one.weight": torch.tensor([[1.0], [2.0], [3.0]]),
        "two.weight": torch.tensor([[10.0, 20.0, -30.0, 40.0]]),
    }
    found = reduce_over(layers, ChannelGroup("one", 3, 1, members), values, "sum-abs")
    assert found.tolist() == [2 + 10, 3 + 30 + 40, 1 + 20]


@pytest.mark.parametrize("name", ["taylor", "diff-pruning"])
def test_both_reductions_can_be_asked_for(name: str, scoring: Scoring) -> None:
    apart, together = score(name, scoring), score(name, scoring, reduction="abs-sum")
    for group in scoring.groups:
        assert bool((together[group.name] <= apart[group.name] * (1 + 1e-9)).all())
    assert not same(apart, together)


def test_random_scores_of_a_group_do_not_depend_on_the_others(scoring: Scoring) -> None:
    alone = dataclasses.replace(scoring, groups=scoring.groups[3:4])
    name, scores = scoring.groups[3].name, score("random", scoring)
    assert torch.equal(score("random", alone)[name], scores[name])
    assert len({tuple(values.tolist()) for values in scores.values()}) == len(scores)


# --- weighting and the second order ------------------------------------------------------------------------------


def test_the_weighting_is_the_recipes_where_it_says_one(scoring: Scoring) -> None:
    assert same(score("taylor", scoring, weighting="threshold"), score("diff-pruning", scoring))
    assert same(score("diff-pruning", scoring, weighting="uniform"), score("taylor", scoring))
    early = score("taylor", scoring, weighting="early")
    assert not same(early, score("taylor", scoring))
    # Of four parts of a hundred timesteps, those from 0 and from 25 are early.
    assert same(early, score("diff-pruning", scoring, weighting="early"))


def test_fisher_adds_up_squares_of_batches_and_layers(scoring: Scoring) -> None:
    """Written out for one group: of each batch and each layer, the square of a channel's sum of w * dL/dw."""
    name = "mid_block.resnets.0.conv1"
    found = score("fisher", scoring)
    group = next(group for group in scoring.groups if group.name == name)
    unet, images, recipe = scoring.unet, scoring.images, scoring.recipe
    assert images is not None
    expected = torch.zeros(group.width, dtype=torch.float64)
    weights = dict(unet.named_parameters())

    def add() -> None:
        for member in group.members:
            module = unet.get_submodule(member.module)
            mask = torch.zeros(group.width, dtype=torch.float64)
            for parameter, dimension in slices(module, member.side):
                key = f"{member.module}.{parameter}"
                product = (weights[key].detach() * weights[key].grad).double()
                mask += product.movedim(dimension, 0).flatten(1).sum(1) if product.ndim > 1 else product
            expected.add_(mask.square())

    draws = Draws(recipe.images, recipe.batch_size, 1, recipe.timesteps, Weighting(), recipe.seed)
    each_gradient(unet, scoring.scheduler, images, draws, add)
    torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=0.0)
