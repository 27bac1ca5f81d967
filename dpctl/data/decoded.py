"""Images that are decoded when they are asked for: resized to cover [H, W] and cropped; broken ones are replaced."""

import itertools
import os
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpctl.data.images import Pictures, Source, Told, View, to_float
from dpctl.errors import DpctlError
from dpctl.progress import say

T = TypeVar("T")
R = TypeVar("R")

ORIENTATION = 0x0112  # EXIF's number for how the camera was held
TOGETHER = 256  # images that the threads are given at a time
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Broken:
    """The images of one source that cannot be read: each is reported once, more than `limit` are an error."""

    def __init__(self, limit: int = 0, report: Callable[[str], None] = say) -> None:
        self._limit, self._report = limit, report
        self._found: set[int] = set()
        self._lock = threading.Lock()

    def __contains__(self, index: int) -> bool:
        return index in self._found

    def add(self, index: int, where: str, problem: object) -> None:
        """Note an image; a DpctlError when it is one too many."""
        if self._limit == 0:
            todo = "repair or remove the file; finetune and train skip up to N with --max-broken N"
            raise DpctlError("an image cannot be read", f"{where}: {problem}", todo)
        with self._lock:
            if index in self._found:
                return
            if len(self._found) == self._limit:
                got = f"more than {self._limit}, at last {where}: {problem}"
                todo = "repair or remove what was reported, or allow more with --max-broken"
                raise DpctlError("too many images cannot be read", got, todo)
            self._found.add(index)
            self._report(f"skipped an image ({len(self._found)} of at most {self._limit}): {where}: {problem}")


class DecodedImages(Source):
    """Images that are decoded when they are asked for, several at a time."""

    def __init__(self, name: str, channels: int, size: tuple[int, int], told: Told, broken: Broken | None) -> None:
        super().__init__(name, told)
        self._channels, self._size, self._broken = channels, size, broken or Broken()

    @abstractmethod
    def __len__(self) -> int: ...

    def read(self, indices: Sequence[int], views: Sequence[View] | None = None) -> Pictures:
        rows = list(in_threads(self._row, zip(indices, views or [View()] * len(indices), strict=True)))
        pixels, frames, found = zip(*rows, strict=True)
        return Pictures(to_float(torch.stack(pixels)), torch.tensor(frames), list(found))

    def _row(self, asked: tuple[int, View]) -> tuple[Tensor, tuple[int, int, int, int], int]:
        """Return an image, or the next that can be read: the same one in every epoch and process."""
        index, view = asked
        for other in itertools.chain(range(index, len(self)), range(index)):
            if other in self._broken:
                continue
            try:
                picture = self._picture(other)
            except Exception as problem:  # a damaged file makes Pillow raise nearly anything
                self._broken.add(other, self._path(other), problem)
                continue
            return *framed(picture, self._size, view), other
        raise DpctlError("no image can be read", f"all {len(self)} of {self.name}", "repair or replace the files")

    def _picture(self, index: int) -> Image.Image:
        """Return an image, upright, of mode L or RGB."""
        with self._open(index) as image:
            return _upright(image, _in_8_bits(image).convert("L" if self._channels == 1 else "RGB"))

    @abstractmethod
    def _open(self, index: int) -> Image.Image:
        """Return an image as Pillow opens it."""

    @abstractmethod
    def _path(self, index: int) -> str:
        """Return where an image lies, for people."""


def framed(picture: Image.Image, size: tuple[int, int], view: View) -> tuple[Tensor, tuple[int, int, int, int]]:
    """Return bytes [C, H, W] of a picture that was resized to cover [H, W] and cropped, with its frame (Pictures)."""
    height, width = size
    scale = max(height / picture.height, width / picture.width)
    larger = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
    across, down = larger[0] - width, larger[1] - height
    top, left = down // 2, across // 2
    if view.place is not None:
        top, left = int(view.place[0] * (down + 1)), int(view.place[1] * (across + 1))
    cropped = picture.resize(larger, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(cropped, dtype=np.uint8).reshape(height, width, -1)).permute(2, 0, 1)
    if view.flip:  # the same as mirroring first and cropping as far from the other side
        pixels, left = pixels.flip(-1), across - left
    return pixels, (picture.height, picture.width, top, left)


def in_threads(function: Callable[[T], R], values: Iterable[T]) -> Iterator[R]:
    """Yield function(value) in order, hardly ahead of who asks; Pillow decodes without holding Python's lock."""
    left = iter(values)
    with ThreadPoolExecutor(min(8, len(os.sched_getaffinity(0)))) as pool:
        while some := list(itertools.islice(left, TOGETHER)):
            yield from pool.map(function, some)


def _upright(image: Image.Image, picture: Image.Image) -> Image.Image:
    """Turn a picture as its camera was held; what no EXIF reader understands says nothing."""
    try:
        turn = TURNS.get(image.getexif().get(ORIENTATION, 1))
    except Exception:  # a damaged block of EXIF makes Pillow raise nearly anything
        return picture
    return picture if turn is None else picture.transpose(turn)


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bit, which Pillow would clip to white; refuse pixels whose range is not known."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.float32) / 257.0).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 bit per channel")
    return image


def problem_of(opened: Callable[[], Any]) -> Exception | None:
    """Return what is wrong with an image, as far as Pillow tells without decoding it."""
    try:
        with opened() as image:
            image.verify()
    except Exception as problem:  # a damaged file makes Pillow raise nearly anything
        return problem
    return None
