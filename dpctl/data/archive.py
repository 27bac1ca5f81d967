"""Images held in memory, and the `.npz` that they come from."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpctl.data.images import Pictures, Source, Told, View, to_float, told_labels
from dpctl.errors import DpctlError

TODO = "give an .npz with an array 'images' of uint8, [N, H, W] or [N, H, W, C]"


class ArrayImages(Source):
    """Images held in memory as bytes [N, C, H, W]."""

    def __init__(self, name: str, pixels: np.ndarray, told: Told | None = None) -> None:
        super().__init__(name, told or Told())
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def read(self, indices: Sequence[int], views: Sequence[View] | None = None) -> Pictures:
        pixels = to_float(torch.from_numpy(self._pixels[np.asarray(indices, np.int64)]))
        for row, view in enumerate(views or ()):
            if view.flip:
                pixels[row] = pixels[row].flip(-1)
        frame = (*self._pixels.shape[2:], 0, 0)
        return Pictures(pixels, torch.tensor([frame] * len(indices)), list(indices))

    def identity(self) -> str:
        return f"{self._pixels.shape} {hashlib.sha256(np.ascontiguousarray(self._pixels).data).hexdigest()}"


def open_archive(path: Path, name: str, channels: int, size: tuple[int, int]) -> ArrayImages:
    """Open an `.npz` with `images`, and `labels` [N] and `captions` [N] if it has them; never as a pickle."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            pixels = archive["images"]
            labels, captions = (archive.get(key) for key in ("labels", "captions"))
            about = f"with the arrays {', '.join(archive)}"
    except Exception as problem:  # a damaged archive fails in zipfile, zlib, numpy or struct
        raise DpctlError("the image archive cannot be read", f"{path}: {problem}", TODO) from None
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) == 0:
        raise DpctlError("the array 'images' is not a set of images", f"{pixels.dtype} {list(pixels.shape)}", TODO)
    if pixels.shape[1:] != (*size, channels):
        height, width, depth = pixels.shape[1:]
        raise DpctlError(
            "the data does not fit the model",
            f"images of {height}x{width} with {depth} channel(s); the model takes {size[0]}x{size[1]} with {channels}",
            "convert the images to [N, H, W, C], or give a folder of image files (those are resized)",
        )
    told = _told(path, len(pixels), labels, captions, about)
    return ArrayImages(name, np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)), told)


def _told(path: Path, count: int, labels: Any, captions: Any, about: str) -> Told:
    for name, array, kinds, wanted in (("labels", labels, "iu", "integers"), ("captions", captions, "U", "texts")):
        if array is not None and (array.shape != (count,) or array.dtype.kind not in kinds):
            got = f"{path}: {array.dtype} {list(array.shape)} for {count} images"
            raise DpctlError(f"the array '{name}' does not fit the images", got, f"give it as {wanted} [N]")
    numbers, classes = told_labels(labels.tolist(), f"{path}, labels") if labels is not None else (None, 0)
    return Told(numbers, classes, captions.tolist() if captions is not None else None, about)
