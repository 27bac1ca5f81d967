"""Feature distillation: the outputs of the student's blocks against those of its teacher, as far as they correspond.

The outputs of the blocks of both networks at the same noisy samples, as in BK-SDM (Kim et al., arXiv 2305.15798), each
error relative to the teacher's output there, so that a weight means the same for every block and scale. A slim
network's channels are some of its teacher's: where the kept ones are known, these are compared one by one. Where they
are not, no channel has a partner; what remains comparable is where a block is active: its attention map (Zagoruyko and
Komodakis, arXiv 1612.03928, section 3.1).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpctl.cost import example_inputs, without_weights
from dpctl.errors import DpctlError
from dpctl.models import unet_directory
from dpctl.pruned_unet import Removed
from dpctl.signature import PRUNED, unet_arguments

KEPT = "kept.safetensors"
# Below this mean square an output of the teacher counts as none: nothing is divided by less.
TINY = 1e-8

Kept = Mapping[str, Tensor]


class Features:
    """Which blocks are compared, and how.

    `channels` has for each block the teacher's channels in the student's order, None where their maps are compared.
    """

    def __init__(self, channels: Mapping[str, Tensor | None]) -> None:
        self._channels = dict(channels)

    @property
    def blocks(self) -> tuple[str, ...]:
        """Return the names of the blocks, in the order of computation."""
        return tuple(self._channels)

    @property
    def by_map(self) -> tuple[str, ...]:
        """Return the blocks whose channels have no known partners in the teacher."""
        return tuple(name for name, index in self._channels.items() if index is None)

    @contextmanager
    def watching(self, network: Any) -> Iterator[dict[str, Tensor]]:
        """Yield what gets the output [B, C, H, W] of every block in the next forward pass, wrapped or not."""
        with watching(network, self.blocks) as outputs:
            yield outputs

    def error(self, student: Mapping[str, Tensor], teacher: Mapping[str, Tensor]) -> Tensor:
        """Return the mean over the blocks of |student - teacher|^2 / |teacher|^2 for each sample, [B]."""
        return torch.stack([self._relative(name, student[name], teacher[name]) for name in self.blocks]).mean(0)

    def _relative(self, name: str, student: Tensor, teacher: Tensor) -> Tensor:
        if (index := self._channels[name]) is not None:
            index = self._channels[name] = index.to(teacher.device)  # once
            student, teacher = student.float(), teacher.index_select(1, index).float()
        else:
            student, teacher = attention_map(student.float()), attention_map(teacher.float())
        error, size = ((student - teacher).square().flatten(1).mean(1), teacher.square().flatten(1).mean(1))
        return error / size.clamp(min=TINY)


def attention_map(output: Tensor) -> Tensor:
    """Return the mean square over the channels of [B, C, H, W], of mean square 1 over the positions: [B, H, W]."""
    activity = output.square().mean(1)
    return activity / activity.square().flatten(1).mean(1).clamp(min=TINY).sqrt().view(-1, 1, 1)


@contextmanager
def watching(network: Any, blocks: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield block -> its output in the next forward pass; nothing stays on the network afterwards.

    Hooks go on the network itself: a wrapper for several processes calls it. With gradient checkpointing a block runs
    once, its layers again in the backward pass.
    """
    inner = network.module if isinstance(network, nn.parallel.DistributedDataParallel) else network
    outputs: dict[str, Tensor] = {}

    def remember(name: str) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            # A down block also returns what it hands across, some blocks an image too.
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [inner.get_submodule(name).register_forward_hook(remember(name)) for name in blocks]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def match(student: Any, teacher: Any, kept: Kept | None = None, teachers_kept: Kept | None = None) -> Features:
    """Return how the blocks of two networks correspond; a DpctlError where one has blocks that the other has not.

    `kept` holds the positions of the unpruned network's channels that the student keeps (`read_kept`), `teachers_kept`
    those that a teacher keeps which is pruned itself; None where that is not known.
    """
    ours, theirs = _shapes(student), _shapes(teacher)
    if [(name, *shape[1:]) for name, shape in ours.items()] != [(name, *shape[1:]) for name, shape in theirs.items()]:
        raise DpctlError(
            "the teacher's blocks are not the model's",
            f"{_told(theirs)}; the model has {_told(ours)}",
            "name the model it was pruned from, or distil without features (--feature-distillation 0)",
        )
    known = (kept or {}) if _same_base(student, teacher) else {}
    channels = {}
    for name, shape in ours.items():
        own, other = (f"{_last_layer(network, name)}.out" for network in (student, teacher))
        channels[name] = _positions(known.get(own), (teachers_kept or {}).get(other), shape[0], theirs[name][0])
    return Features(channels)


def read_kept(directory: Path) -> Kept | None:
    """Return the kept positions of a pruned model's directory; None where it says nothing of them."""
    from safetensors.torch import load_file

    path = unet_directory(directory) / KEPT
    return load_file(path) if path.is_file() else None


def _blocks(unet: Any) -> list[str]:
    down, up = ([f"{side}.{i}" for i in range(len(getattr(unet, side)))] for side in ("down_blocks", "up_blocks"))
    return [*down, *(["mid_block"] if getattr(unet, "mid_block", None) is not None else []), *up]


def _shapes(unet: Any) -> dict[str, tuple[int, int, int]]:
    """Return block -> (C, H, W) of its output, by a forward pass without weights."""
    outline = without_weights(unet)
    with torch.no_grad(), watching(outline, _blocks(unet)) as outputs:
        outline(**unet_arguments(example_inputs(outline)))
    return {name: (output.shape[1], output.shape[2], output.shape[3]) for name, output in outputs.items()}


def _told(shapes: Mapping[str, tuple[int, int, int]]) -> str:
    return ", ".join(f"{name} at {height}x{width}" for name, (_, height, width) in shapes.items())


def _same_base(student: Any, teacher: Any) -> bool:
    """Tell whether kept positions may be the teacher's; a stock layout does not say what it was cut from."""
    if not type(student).__name__.startswith(PRUNED):
        return True
    return list(student.config.block_out_channels) == list(teacher.config.block_out_channels)


def _last_layer(unet: Any, name: str) -> str:
    """Return the layer whose outputs are the channels of a block's: of its resampling, else of its last resnet.

    Where that has no branch any more, the resnet itself.
    """
    block = unet.get_submodule(name)
    for resampling in ("resnet_down", "resnet_up"):  # of blocks that carry an image beside
        if hasattr(block, resampling):
            return f"{name}.{resampling}.conv2" if getattr(block, resampling) is not None else _last_resnet(block, name)
    for resamplers in ("downsamplers", "upsamplers"):
        for leaf in ("conv", "Conv2d_0", "conv2") if getattr(block, resamplers, None) is not None else ():
            if isinstance(getattr(getattr(block, resamplers)[-1], leaf, None), nn.Conv2d):
                return f"{name}.{resamplers}.{len(getattr(block, resamplers)) - 1}.{leaf}"
    return _last_resnet(block, name)


def _last_resnet(block: Any, name: str) -> str:
    last = f"{name}.resnets.{len(block.resnets) - 1}"
    return last if isinstance(block.resnets[-1], Removed) else f"{last}.conv2"


def _positions(ours: Tensor | None, theirs: Tensor | None, width: int, teachers: int) -> Tensor | None:
    """Return where the student's channels are among the teacher's; None where they are not, or it is not known.

    `ours` and `theirs` are the positions that the two keep of the unpruned network's, None for all.
    """
    if ours is None and theirs is None:
        return torch.arange(width) if width == teachers else None
    ours = torch.arange(width) if ours is None else ours
    theirs = torch.arange(teachers) if theirs is None else theirs
    if (len(ours), len(theirs)) != (width, teachers):
        return None
    places = torch.searchsorted(theirs, ours).clamp(max=teachers - 1)
    return places if torch.equal(theirs[places], ours) else None
