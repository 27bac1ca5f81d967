"""DeepCache (Ma, Fang and Wang, CVPR 2024): what eager runs, but the deep part of the network at every N-th call only.

From one step to the next the deep features of a UNet hardly change. So every `INTERVAL`-th call runs the whole network
and keeps what enters the outermost up block; the calls between run the outermost down and up block alone, on their own
sample and timestep, and take what was kept for all that lies deeper (the paper's uniform 1:N). Nothing is trained, and
the outputs are not the model's own: it is a baseline for a pruned model, not another way to run the same one.

A new trajectory begins with a whole call. It is noticed by its timestep, where that is not below the last one in every
row, and by another shape; `runtime.sample`, `dpctl sample` and `dpctl bench` say so themselves, by `restart`. Where
nobody says so, one that begins below the last timestep of the one before it cannot be noticed: after a pipeline's call
that was broken off, say. A scheduler that asks twice at the same timestep (Heun) therefore gets a whole call for the
second.
"""

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dpctl.errors import DpctlError
from runtime.backends import eager
from runtime.backends.eager import EagerDenoiser
from runtime.network import Network

RUNS_EXPORTED = False
# Its outputs are near the model's own, not equal to them.
EXACT = False
# The default of the authors' own package.
INTERVAL = 3
# Blocks that hand on one skip connection per residual block, by concatenation.
PLAIN = frozenset(f"{kind}{way}Block2D" for kind in ("", "Attn", "CrossAttn") for way in ("Down", "Up"))
PLAIN |= {"ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"}


class DeepCacheDenoiser(EagerDenoiser):
    """A Denoiser over a UNet in memory that runs all of it at every `interval`-th call of a trajectory.

    With an interval of 1 it gives what eager gives. On a GPU each call waits for the timesteps: they are compared.
    """

    def __init__(self, unet: Any, interval: int = INTERVAL) -> None:
        super().__init__(unet)
        self._network = DeepCache(unet, interval).eval()

    def restart(self) -> None:
        """Make the next call a whole one."""
        self._network.restart()


class DeepCache(nn.Module):
    """The whole network and its outermost blocks, of the same weights, and which of them runs next.

    `unet` itself gets no hooks. Raises a DpctlError, by the name of what is in the way, for a network that has no
    deep part to leave out.
    """

    def __init__(self, unet: Any, interval: int = INTERVAL) -> None:
        super().__init__()
        check_interval(interval)
        self.interval, self._kept = interval, Kept()
        whole, outermost = shared(unet), outermost_blocks(unet)
        whole.up_blocks[-1].register_forward_pre_hook(self._kept.keep, with_kwargs=True)
        outermost.up_blocks[-1].register_forward_pre_hook(self._kept.give, with_kwargs=True)
        self.whole, self.outermost = Network(whole), Network(outermost)
        self._calls = 0
        self._last: tuple[torch.Size, Tensor] | None = None

    def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        """Return the output of `sample` [B, C, H, W] at `timestep` [B], near the model's own."""
        if self._begins(sample, timestep):
            self._calls = 0
        # Until this call is done nothing is known of a trajectory: after one that fails a whole one follows.
        self._last = None
        network = self.outermost if self._calls % self.interval else self.whole
        output = network(sample, timestep, **conditions)
        self._calls += 1
        self._last = sample.shape, timestep.clone()
        return output

    def restart(self) -> None:
        """Forget the trajectory so far."""
        self._last = None

    def _begins(self, sample: Tensor, timestep: Tensor) -> bool:
        """Tell whether a call is the first of a trajectory."""
        if self._last is None:
            return True
        shape, last = self._last
        return sample.shape != shape or not bool((timestep < last).all())


class Kept:
    """The deep feature: what entered the outermost up block of the whole network last."""

    feature: Tensor

    def keep(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep the first input of an up block that is about to run."""
        self.feature = args[0] if args else kwargs["hidden_states"]

    def give(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Put what was kept in the place of the first input of an up block."""
        if args:
            return (self.feature, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self.feature}


def open_denoiser(
    directory: Path, *, threads: int | None = None, device: str | None = None, precision: str = "fp32"
) -> DeepCacheDenoiser:
    """Load a model directory into PyTorch, as eager does.

    Raises a DpctlError for an exported directory, and for a network that has no deep part to leave out.
    """
    return DeepCacheDenoiser(eager.load(directory, threads, device, precision))


def shared(unet: Any) -> Any:
    """Return a copy of a network that has the very weights of `unet`, to be changed in its structure."""
    return copy.deepcopy(unet, {id(tensor): tensor for tensor in (*unet.parameters(), *unet.buffers())})


def outermost_blocks(unet: Any) -> Any:
    """Return the outermost level of a network, with its weights: its up block wants the deep feature from outside.

    Raises a DpctlError for a network that cannot be divided there.
    """
    require_levels(unet)
    outermost = shared(unet)
    # What its last downsampler makes is a skip connection of the level below.
    outermost.down_blocks = outermost.down_blocks[:1]
    outermost.down_blocks[0].downsamplers = None
    outermost.mid_block = None
    outermost.up_blocks = outermost.up_blocks[-1:]
    return outermost


def require_levels(unet: Any) -> None:
    """Raise a DpctlError unless the network has a level below its outermost one, and plain skip connections."""
    todo = "use the backend eager"
    odd = [type(block).__name__ for block in (*unet.down_blocks, *unet.up_blocks)]
    odd = [kind for kind in odd if kind not in PLAIN]
    if odd:
        raise DpctlError("DeepCache does not know how this network's blocks hang together", odd[0], todo)
    if len(unet.down_blocks) < 2:
        raise DpctlError("DeepCache needs a network of two levels or more", "one level", todo)
    down, up = len(unet.down_blocks[0].resnets), len(unet.up_blocks[-1].resnets)
    if up != down + 1:
        got = f"{up} residual blocks on the way up, {down} on the way down"
        raise DpctlError("the outermost up block takes skip connections from deeper ones", got, todo)


def check_interval(interval: int) -> None:
    """Raise a DpctlError for an interval below 1."""
    if interval < 1:
        raise DpctlError("the interval of whole calls is below 1", str(interval), "give 1 (all are whole) or more")
