"""Blocks and the order of data in them, by names alone; a real network's own order of calls is the oracle."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from dpctl.blocks import block_of, by_block, within
from dpctl.cost import example_inputs
from dpctl.prune.groups import find_groups
from dpctl.signature import unet_arguments


@pytest.mark.parametrize(
    ("name", "block", "rest"),
    [
        ("conv_in", "conv_in", ""),
        ("time_embedding.linear_1", "time_embedding", "linear_1"),
        ("down_blocks.10.resnets.0.conv1", "down_blocks.10", "resnets.0.conv1"),
        ("mid_block.attentions.0.to_v", "mid_block", "attentions.0.to_v"),
        ("up_blocks.0.attentions.2.proj_in", "up_blocks.0", "attentions.2.proj_in"),
    ],
)
def test_a_name_falls_into_block_and_rest(name: str, block: str, rest: str) -> None:
    assert (block_of(name), within(name)) == (block, rest)


def test_blocks_and_names_are_in_the_order_of_data() -> None:
    names = [
        *("conv_out", "up_blocks.0.upsamplers.0.conv", "up_blocks.0.resnets.10.conv1", "up_blocks.0.resnets.2.conv1"),
        *("mid_block.resnets.1.conv1", "mid_block.attentions.0.to_v", "mid_block.resnets.0.conv1"),
        *("down_blocks.10.resnets.0.conv1", "down_blocks.9.resnets.0.conv1", "time_embedding.linear_1", "conv_in"),
    ]
    assert list(by_block(names).items()) == [
        ("conv_in", ["conv_in"]),
        ("time_embedding", ["time_embedding.linear_1"]),
        ("down_blocks.9", ["down_blocks.9.resnets.0.conv1"]),
        ("down_blocks.10", ["down_blocks.10.resnets.0.conv1"]),
        ("mid_block", ["mid_block.resnets.0.conv1", "mid_block.attentions.0.to_v", "mid_block.resnets.1.conv1"]),
        ("up_blocks.0", [f"up_blocks.0.{n}" for n in ("resnets.2.conv1", "resnets.10.conv1", "upsamplers.0.conv")]),
        ("conv_out", ["conv_out"]),
    ]


@pytest.mark.parametrize("family", ["ddpm", "stable-diffusion"])
def test_the_order_is_the_one_in_which_a_network_runs(family: str, families: dict[str, Callable[[], Any]]) -> None:
    unet = families[family]()
    called: list[str] = []
    watched = {group.name for group in find_groups(unet).prunable}
    for name, module in unet.named_modules():
        # The convolution of a shortcut runs at the end of its block, the layers of an attention in turns of their own.
        if name in watched and "attentions" not in name and "embedding" not in name:
            module.register_forward_hook(lambda *_, name=name: called.append(name))
    with torch.no_grad():
        unet(**unet_arguments(example_inputs(unet)))
    assert called == [name for names in by_block(called).values() for name in names]
