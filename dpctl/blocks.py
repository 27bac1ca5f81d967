"""The blocks of a UNet, by module names alone: which block a channel group is in, and the order in which data flows."""

import re
from collections.abc import Iterable

_BLOCK = re.compile(r"(?:down|up)_blocks\.\d+|[^.]+")
_PATH = {"conv_in": 0, "down_blocks": 2, "mid_block": 3, "up_blocks": 4, "conv_norm_out": 5, "conv_out": 5}
_EMBEDDINGS = 1  # of the time, the class, the text: whatever else a UNet has at its top
_PAIRS = {"resnets": 0, "attentions": 1}  # run in turns; the samplers come after them


def block_of(name: str) -> str:
    """Return the block of a module: ``down_blocks.0`` of ``down_blocks.0.resnets.1.conv1``."""
    return _BLOCK.match(name)[0]  # type: ignore[index]  # it matches any name


def within(name: str) -> str:
    """Return the rest of a module's name inside its block; empty for the block itself."""
    return name[len(block_of(name)) :].lstrip(".")


def by_block(names: Iterable[str]) -> dict[str, list[str]]:
    """Return block -> its names, both in the order in which data flows through the network."""
    blocks: dict[str, list[str]] = {}
    for name in sorted(names, key=_place):
        blocks.setdefault(block_of(name), []).append(name)
    return blocks


def _place(name: str) -> tuple:
    block, rest = block_of(name), within(name)
    kind, _, tail = rest.partition(".")
    index = re.match(r"\d+", tail)
    turn = (kind not in _PAIRS, int(index[0]) if index else 0, _PAIRS.get(kind, 0))
    return _PATH.get(block.partition(".")[0], _EMBEDDINGS), _natural(block), turn, _natural(rest)


def _natural(text: str) -> tuple:
    """Return a key that sorts 2 before 10: words and numbers in turns."""
    return tuple(int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text))
