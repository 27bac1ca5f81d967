"""A batch: clean samples and the conditions that belong to them, whatever they were made of."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Generator, Tensor

from dpctl.data.images import Images, Pictures, draw_views
from dpctl.errors import DpctlError


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

    def __init__(self, images: Images, *, flip: bool = True, crop: str = "center") -> None:
        self.name, self._images, self._flip, self._crop = images.name, images, flip, crop

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, positions: Sequence[int], generators: Sequence[Generator]) -> Batch:
        return self._batch(self._images.read(positions, draw_views(generators, flip=self._flip, crop=self._crop)))

    def plain(self, positions: Sequence[int]) -> Batch:
        return self._batch(self._images.read(positions))

    def _batch(self, pictures: Pictures) -> Batch:
        return Batch(pictures.pixels)


class Labelled(Pixels):
    """Images with their classes, for networks that are conditioned on one of `classes` (`num_class_embeds`).

    Raises a DpctlError for images without labels, or with more classes. No class is dropped in training: no embedding
    of these networks stands for none.
    """

    def __init__(self, images: Images, classes: int, *, flip: bool = True, crop: str = "center") -> None:
        super().__init__(images, flip=flip, crop=crop)
        images.labels([0])  # there are some
        if images.classes > classes:
            got = f"{images.name}: labels up to {images.classes - 1}, the model has the classes 0 to {classes - 1}"
            raise DpctlError("a label is out of range", got, "give the images that belong to the model's classes")

    def _batch(self, pictures: Pictures) -> Batch:
        return Batch(pictures.pixels, {"class_labels": self._images.labels(pictures.indices)})
