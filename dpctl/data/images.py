"""What every source of images offers: batches [B, C, H, W] in [-1, 1], and what is told about each image."""

import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from dpctl.artifact import no_space_left_explained
from dpctl.errors import DpctlError

CAPTION = '{"file_name": "a.png", "text": "a red bicycle"}'
LABEL = '{"file_name": "a.png", "label": 3}'


@dataclass(frozen=True)
class View:
    """How an image is looked at: mirrored or not, and where it is cropped.

    `place` is how much of the surplus lies above and to the left, each in [0, 1); without one it is the centre.
    """

    flip: bool = False
    place: tuple[float, float] | None = None


def draw_views(generators: Sequence[Generator], *, flip: bool, crop: str) -> list[View]:
    """Draw the view of each row from its own generator: first the flip, then the place of a random crop."""
    views = []
    for generator in generators:
        flipped = flip and float(torch.rand((), generator=generator)) < 0.5
        place = torch.rand(2, generator=generator).tolist() if crop == "random" else None
        views.append(View(flipped, (place[0], place[1]) if place else None))
    return views


@dataclass(frozen=True)
class Pictures:
    """Images as they were read.

    * `pixels` [B, C, H, W], float32 in [-1, 1].
    * `frames` [B, 4], int64: the original height and width, then top and left of the crop in the picture that was
      resized to cover [H, W] (and mirrored, where it was): what SDXL's time_ids begin with.
    * `indices`: which image each row shows: another one than asked for where that cannot be read. Ask for labels and
      captions by these.
    """

    pixels: Tensor
    frames: Tensor
    indices: list[int]


class Images(Protocol):
    """A finite set of images of one size, with a label each (below `classes`, which is 0 without), or a caption."""

    name: str
    classes: int

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return images [B, C, H, W], float32 in [-1, 1], cropped at the centre."""

    def read(self, indices: Sequence[int], views: Sequence[View] | None = None) -> Pictures:
        """Return images as the views show them, one view each; without any not mirrored, cropped at the centre."""

    def labels(self, indices: Sequence[int]) -> Tensor:
        """Return the class of each image, [B] int64; a DpctlError where the source has none."""

    def captions(self, indices: Sequence[int]) -> list[str]:
        """Return the caption of each image; a DpctlError where the source has none."""

    def identity(self) -> str:
        """Return a text that is another one as soon as the images are others: what is cached of them belongs to it."""


@dataclass(frozen=True)
class Told:
    """What a source says about its images: a class of `classes` each, a caption each; `about` is where it says so."""

    labels: np.ndarray | None = None
    classes: int = 0
    captions: Sequence[str] | None = None
    about: str = ""


class Source(ABC):
    """What all sources have in common: a name, and labels and captions where they are told."""

    def __init__(self, name: str, told: Told) -> None:
        self.name, self.classes, self._told = name, told.classes, told

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self.read(indices).pixels

    @abstractmethod
    def read(self, indices: Sequence[int], views: Sequence[View] | None = None) -> Pictures:
        """Return images as `Images` says."""

    def labels(self, indices: Sequence[int]) -> Tensor:
        if self._told.labels is None:
            todo = f"sort the images into one folder per class, or give metadata.jsonl with lines such as {LABEL}"
            raise DpctlError("no labels for a class-conditional model", self._where(), todo)
        return torch.from_numpy(self._told.labels[np.asarray(indices, np.int64)])

    def captions(self, indices: Sequence[int]) -> list[str]:
        todo = f"put metadata.jsonl into the folder of images, one line for each, such as {CAPTION}"
        if self._told.captions is None:
            raise DpctlError("no captions for a text model", self._where(), todo)
        captions = [self._told.captions[index] for index in indices]
        for index, caption in zip(indices, captions, strict=True):
            if not isinstance(caption, str):
                raise DpctlError("a caption is no text", f"{self.name}, image {index}: {caption!r}", "give it a text")
        return captions

    @abstractmethod
    def identity(self) -> str:
        """Return a text as `Images` says."""

    def _where(self) -> str:
        return f"{self.name} ({self._told.about})" if self._told.about else self.name


def told_labels(values: Sequence[object], about: str) -> tuple[np.ndarray, int]:
    """Return labels as int64 [N] with the number of classes: numbers as they are, names in sorted order.

    Raises a DpctlError where they are neither, or below 0.
    """
    if values and all(isinstance(value, str) for value in values):
        names = {name: number for number, name in enumerate(sorted({str(value) for value in values}))}
        return np.array([names[str(value)] for value in values], np.int64), len(names)
    wrong = next((value for value in values if not _is_class(value)), None)
    if wrong is not None or not all(_is_class(value) for value in values):
        raise DpctlError("a label is no class", f"{about}: {wrong!r}", "give whole numbers from 0 up, or names, to all")
    labels = np.array(values, np.int64)
    return labels, int(labels.max()) + 1


def _is_class(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool) and 0 <= int(value) < 2**31


def to_bytes(images: Tensor) -> np.ndarray:
    """Return images [N, C, H, W] in [-1, 1] as bytes [N, H, W, C]; what lies outside is clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def picture(pixels: np.ndarray) -> Image.Image:
    """Return bytes [H, W, C] as a picture; of more than three channels the first three."""
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels[..., :3])


def save_picture(pixels: np.ndarray, path: Path) -> None:
    """Write bytes [H, W, C] as a PNG that is whole or not there."""
    temporary = path.with_suffix(".writing")
    with no_space_left_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                picture(pixels).save(stream, "png")
                stream.flush()
                os.fsync(stream.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


def to_float(pixels: Tensor) -> Tensor:
    """Return bytes as float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1.0)
