"""A batch: clean samples and the conditions that belong to them, whatever they were made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Generator, Tensor

from dpctl.data.images import Images


@dataclass(frozen=True)
class Batch:
    """Clean samples [B, C, H, W] (pixels in [-1, 1], or scaled latents) and the network's conditions, by their names.

    The names are the signature's: class_labels [B], encoder_hidden_states [B, T, D], text_embeds [B, D], time_ids
    [B, 6].
    """

    clean: Tensor
    conditions: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.clean)

    def to(self, device: Any) -> "Batch":
        """Return the batch on a device."""
        return Batch(self.clean.to(device), {name: value.to(device) for name, value in self.conditions.items()})


class TrainingSet(Protocol):
    """A finite set of samples that a network can be trained on."""

    name: str

    def __len__(self) -> int: ...

    def batch(self, positions: Sequence[int], generators: Sequence[Generator]) -> Batch:
        """Return the samples at these positions.

        What is random about row i (its flip, its crop, the noise of its posterior, a dropped condition) is drawn from
        `generators[i]` alone. It may be called from another thread.
        """

    def plain(self, positions: Sequence[int]) -> Batch:
        """Return the samples as they are: not flipped, cropped at the centre, posterior mean, conditions kept."""


class Pixels:
    """Images as they are, for networks without conditions."""

    def __init__(self, images: Images, *, flip: bool = True) -> None:
        self.name, self._images, self._flip = images.name, images, flip

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, positions: Sequence[int], generators: Sequence[Generator]) -> Batch:
        clean = self._images.batch(positions)
        for row, generator in enumerate(generators):
            if self._flip and float(torch.rand((), generator=generator)) < 0.5:
                clean[row] = clean[row].flip(-1)
        return Batch(clean)

    def plain(self, positions: Sequence[int]) -> Batch:
        return Batch(self._images.batch(positions))
