"""The cut: what stays computes what it computed before."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from dpctl.errors import DpctlError
from dpctl.prune.groups import find_groups
from dpctl.prune.network import describe
from dpctl.prune.plan import PruningPlan, select, uniform
from dpctl.prune.surgery import compose, kept_indices, slim


def inputs(unet: Any, batch: int = 2) -> tuple[Tensor, ...]:
    size = unet.config.sample_size
    sample = torch.randn(batch, unet.config.in_channels, size, size, generator=torch.Generator().manual_seed(1))
    labels = (torch.arange(batch),) if unet.config.num_class_embeds else ()
    learned = unet.config.time_embedding_type == "learned"
    return sample, torch.tensor([3, 71], dtype=torch.long if learned else torch.float32)[:batch], *labels


@torch.no_grad()
def run(unet: Any) -> Tensor:
    return unet(*inputs(unet)).sample


def everything(unet: Any) -> PruningPlan:
    return PruningPlan({group.name: tuple(range(group.width)) for group in find_groups(unet).prunable})


def random_cut(unet: Any, ratio: float, seed: int = 0) -> tuple[PruningPlan, dict[str, Tensor]]:
    groups = find_groups(unet)
    network = describe(unet, groups)
    generator = torch.Generator().manual_seed(seed)
    scores = {span.name: torch.rand(span.width, generator=generator).tolist() for span in network.spans}
    plan = select(network, scores, uniform(network, ratio, 1))
    return plan, kept_indices(unet, groups, plan)


def test_everything_kept_is_bit_identical(toy_unet: Any) -> None:
    kept = kept_indices(toy_unet, find_groups(toy_unet), everything(toy_unet))
    assert kept == {}
    small = slim(toy_unet, kept)
    assert torch.equal(run(small), run(toy_unet))
    assert small.config.channels == {}


def test_the_original_is_not_changed(toy_unet: Any) -> None:
    before = {name: value.clone() for name, value in toy_unet.state_dict().items()}
    output = run(toy_unet)
    _, kept = random_cut(toy_unet, 0.5)
    small = slim(toy_unet, kept)
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7.0)
    assert all(torch.equal(before[name], value) for name, value in toy_unet.state_dict().items())
    assert torch.equal(run(toy_unet), output)


def test_every_weight_is_the_originals_at_the_kept_positions(toy_unet: Any) -> None:
    _, kept = random_cut(toy_unet, 0.4)
    small = slim(toy_unet, kept)
    original = toy_unet.state_dict()
    for name, value in small.state_dict().items():
        module = name.rpartition(".")[0]
        expected = original[name]
        if f"{module}.out" in kept:
            expected = expected[kept[f"{module}.out"]]
        if f"{module}.in" in kept and expected.ndim > 1:
            expected = expected[:, kept[f"{module}.in"]]
        if ".to_q." in name:
            expected = expected * (len(kept[f"{module}.out"]) / 64) ** 0.5
        assert torch.equal(value, expected), name


def test_attention_keeps_its_softmax_temperature(toy_unet: Any) -> None:
    """The slim attention equals torch's softmax(q k^T / sqrt(d)) v with the *original* head width d."""
    plan, kept = random_cut(toy_unet, 0.5)
    name = "down_blocks.1.attentions.0"
    block, small = toy_unet.get_submodule(name), slim(toy_unet, kept).get_submodule(name)
    staying, inner = kept[f"{name}.to_q.in"], torch.tensor(plan.keep[f"{name}.to_v"])
    assert len(inner) == 32
    tokens = torch.randn(2, 48, len(staying), generator=torch.Generator().manual_seed(3))

    def heads(layer: Any) -> Tensor:
        projected = tokens @ layer.weight[inner][:, staying].T + layer.bias[inner]
        return projected.reshape(2, 48, block.heads, -1).transpose(1, 2)

    q, k, v = (heads(layer) for layer in (block.to_q, block.to_k, block.to_v))
    with torch.no_grad():
        mixed = torch.softmax(q @ k.transpose(-1, -2) / math.sqrt(64 / block.heads), -1) @ v
        expected = mixed.transpose(1, 2).flatten(2) @ small.to_out[0].weight.T + small.to_out[0].bias
        small.group_norm, small.residual_connection = torch.nn.Identity(), False
        found = small(tokens)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


# --- kept.safetensors --------------------------------------------------------------------------------------------


def test_kept_positions_of_two_cuts_compose(toy_unet: Any) -> None:
    _, first = random_cut(toy_unet, 0.25, seed=1)
    once = slim(toy_unet, first)
    _, second = random_cut(once, 0.4, seed=2)
    twice = slim(once, second)
    at_once = slim(toy_unet, compose(first, second))
    assert at_once.config.channels == twice.config.channels
    assert at_once.config.base_config == twice.config.base_config == once.config.base_config
    for name, value in at_once.state_dict().items():
        torch.testing.assert_close(value, twice.state_dict()[name], rtol=1e-6, atol=0.0)


def test_a_second_cut_of_one_group_keeps_the_widths_of_the_first(toy_unet: Any) -> None:
    _, first = random_cut(toy_unet, 0.5)
    once = slim(toy_unet, first)
    plan = PruningPlan(dict(everything(once).keep) | {"time_embedding.linear_1": tuple(range(0, 64, 2))})
    twice = slim(once, kept_indices(once, find_groups(once), plan))
    changed = {name for name, widths in twice.config.channels.items() if once.config.channels.get(name) != widths}
    assert changed == {"time_embedding.linear_1", "time_embedding.linear_2"}
    assert bool(run(twice).isfinite().all())


def test_compose_names_positions_of_the_base() -> None:
    first = {"a.out": torch.tensor([1, 3, 5, 7]), "b.in": torch.tensor([0, 1])}
    second = {"a.out": torch.tensor([0, 3]), "c.out": torch.tensor([2])}
    composed = {key: index.tolist() for key, index in compose(first, second).items()}
    assert composed == {"a.out": [1, 7], "b.in": [0, 1], "c.out": [2]}
    assert compose(None, second) is second


def test_kept_positions_ascend_and_name_only_what_shrank(toy_unet: Any) -> None:
    plan, kept = random_cut(toy_unet, 0.5)
    assert kept["conv_in.out"].tolist() == list(plan.keep["conv_in"])
    for key, index in kept.items():
        name, _, side = key.rpartition(".")
        width = toy_unet.get_submodule(name).weight.shape[1 if side == "in" else 0]
        assert index.tolist() == sorted(set(index.tolist()))
        assert len(index) < width
        assert int(index.max()) < width


def test_one_group_can_be_cut_alone(toy_unet: Any) -> None:
    plan = PruningPlan(dict(everything(toy_unet).keep) | {"time_embedding.linear_1": (0, 5, 9)})
    kept = kept_indices(toy_unet, find_groups(toy_unet), plan)
    assert set(kept) == {"time_embedding.linear_1.out", "time_embedding.linear_2.in"}
    assert slim(toy_unet, kept).time_embedding.linear_1.out_features == 3


def test_a_network_that_gives_nan_is_not_handed_on(toy_unet: Any) -> None:
    with torch.no_grad():
        toy_unet.conv_out.bias.fill_(float("nan"))
    _, kept = random_cut(toy_unet, 0.5)
    with pytest.raises(DpctlError, match="output is not finite"):
        slim(toy_unet, kept)
