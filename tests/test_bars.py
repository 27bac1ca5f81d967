"""Bars of the terminal: as long as the shares they stand for, and readable in a narrow pipe without colour."""

import io
from typing import Any

import pytest
from rich.console import Console

from dpctl import bars
from dpctl.bars import LENGTH, Bar

WIDTHS = {
    "up_blocks.0.resnets.0.conv1": [64, 16],
    "conv_in": [32, 24],
    "down_blocks.0.resnets.1.conv1": [32, 32],
    "down_blocks.0.resnets.0.conv1": [32, 16],
}


def shown(parts: list[Any], width: int = 100, encoding: str = "utf-8") -> list[str]:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    for part in parts:
        Console(file=file, width=width, markup=False, color_system=None).print(part)
    file.seek(0)
    return [line.rstrip() for line in file.read().splitlines()]


def test_a_bar_is_as_long_as_its_share() -> None:
    assert [Bar(share).filled for share in (0.0, 0.25, 0.5, 0.75, 1.0)] == [0, 5, 10, 15, 20]
    lengths = [Bar(step / 100).filled for step in range(101)]
    assert lengths == sorted(lengths)
    assert all(abs(length - LENGTH * step / 100) <= 1 for step, length in enumerate(lengths))


def test_a_cut_can_always_be_seen_and_so_can_what_stays() -> None:
    assert (Bar(0.001).filled, Bar(0.999).filled) == (1, LENGTH - 1)


def test_a_block_has_the_sum_of_its_groups_and_each_group_a_line() -> None:
    assert shown(bars.widths(WIDTHS, {"conv_out": "it is", "x": "it is"}))[3:] == [
        "conv_in                   32 -> 24   75.0 %  ███████████████░░░░░",
        "down_blocks.0             64 -> 48   75.0 %  ███████████████░░░░░",
        "  resnets.0.conv1         32 -> 16   50.0 %  ██████████░░░░░░░░░░",
        "  resnets.1.conv1         32 -> 32  100.0 %  ████████████████████",
        "up_blocks.0               64 -> 16   25.0 %  █████░░░░░░░░░░░░░░░",
        "  resnets.0.conv1         64 -> 16   25.0 %  █████░░░░░░░░░░░░░░░",
        "left alone, it is: conv_out, x",
    ]


def test_a_terminal_that_knows_no_blocks_gets_letters() -> None:
    assert shown(bars.widths(WIDTHS, {}), encoding="ascii")[3].endswith("###############.....")


SCAN = {
    "model": "0123456789abcdef",
    "base_loss": 0.1,
    "fractions": [0.25, 0.5],
    "measured_on": {"data": "[b]", "images": 8, "timesteps": [125, 375], "align": 8, "seed": 0},
    "rows": [
        {"group": "mid_block.resnets.0.conv1", "block": "mid_block", "width": 64, "kept": 48, "loss": 0.09999},
        {"group": "a", "block": "a", "width": 32, "kept": 24, "loss": 0.105},
        {"group": "conv_in", "block": "conv_in", "width": 32, "kept": 24, "loss": 0.12},
        {"group": "conv_in", "block": "conv_in", "width": 32, "kept": 16, "loss": 0.16},
    ],
}


def test_the_group_whose_cuts_raise_the_loss_most_comes_first() -> None:
    lines = shown(bars.reactions(SCAN))
    assert lines[0] == "the loss when a part of one group is cut (of the model 0123456789ab)"
    assert lines[1].split() == ["width", "-25", "%", "-50", "%", "mean"]
    assert lines[3:] == [
        "conv_in                       32   +20 %  +60 %   +40 %  ████████████████████",
        "a                             32  +5.0 %         +5.0 %  ██",
        "mid_block.resnets.0.conv1     64  +0.0 %         +0.0 %",
        "denoising loss 0.1 uncut; 8 images of [b] with fixed noise, each at the timesteps 125, 375",
    ]


def test_a_cut_counts_for_the_fraction_that_it_is_nearest_to() -> None:
    assert bars.nearest({"width": 48, "kept": 32}, [0.25, 0.5, 0.75]) == 0.25
    assert bars.nearest({"width": 48, "kept": 16}, [0.25, 0.5, 0.75]) == 0.75


@pytest.mark.parametrize("width", [100, 80])
def test_long_names_of_transformer_layers_leave_the_figures_whole(width: int) -> None:
    name = "up_blocks.1.attentions.0.transformer_blocks.9.ff.net.0.proj"
    lines = shown(bars.widths({name: [5120, 3584]}, {}), width)
    assert max(map(len, lines)) <= width
    assert sum("5120 -> 3584  70.0 %  ██████████████░░░░░░" in line for line in lines) == 2
