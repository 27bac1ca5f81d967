"""What is told of every step beside the loss: its parts, images per second, memory."""

import time
from collections import deque
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dpctl import units
from runtime.denoiser import memory_used

STEPS = 20  # over which the speed is taken


class Meter:
    """Takes in what a step computes and says what it was; `clock` tells the time in seconds."""

    def __init__(
        self, batch_size: int, device: torch.device, *, share: int = 1, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._batch_size, self._device, self._share, self._clock = batch_size, device, share, clock
        self._ends = deque([clock()], STEPS + 1)
        self._sums: dict[str, Tensor] = {}

    def add(self, terms: Mapping[str, Tensor], weights: Tensor) -> None:
        """Take in the terms of the loss, [B] each, of a part of this process's images, and the images' weights."""
        for name, values in terms.items():
            total = (values.detach() * weights).sum()
            self._sums[name] = self._sums[name] + total if name in self._sums else total

    def parts(self) -> dict[str, float]:
        """Return the terms of the step's loss before their weights, of this process's images; none of a single one."""
        sums, self._sums = self._sums, {}
        if len(sums) < 2:
            return {}
        return {name: float(total) * self._share / self._batch_size for name, total in sums.items()}

    def speed(self) -> dict[str, float | str]:
        """End a step; return images per second over the last ones, all processes together, and memory taken now."""
        self._ends.append(self._clock())
        took = self._ends[-1] - self._ends[0]
        images = self._batch_size * (len(self._ends) - 1)
        found: dict[str, float | str] = {"images/s": images / took} if took > 0 else {}
        return found | {"memory": units.bytes_(self._memory())}

    def _memory(self) -> int:
        if self._device.type == "cuda":
            return torch.cuda.memory_allocated(self._device)
        return memory_used(self._device)["resident_bytes"]
