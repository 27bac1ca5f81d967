"""Images for scoring and training: a folder, an `.npz` or `reference`, as batches [B, C, H, W] in [-1, 1]."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dpctl.errors import DpctlError

REFERENCE_IMAGES = Path(__file__).parent / "reference" / "images.npz"
SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff"})


class Images(Protocol):
    """A finite set of images of one size."""

    name: str

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Tensor:
        """Return images [B, C, H, W], float32 in [-1, 1]."""


class ArrayImages:
    """Images held in memory as bytes [N, C, H, W]."""

    def __init__(self, name: str, pixels: np.ndarray) -> None:
        self.name, self._pixels = name, pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return _to_float(torch.from_numpy(self._pixels[np.asarray(indices)]))


class FolderImages:
    """Images decoded when they are asked for; resized to cover [H, W], then cropped at the centre."""

    def __init__(self, name: str, paths: list[Path], channels: int, size: tuple[int, int]) -> None:
        self.name, self._paths, self._channels, self._size = name, paths, channels, size

    def __len__(self) -> int:
        return len(self._paths)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return _to_float(torch.stack([self._decode(self._paths[i]) for i in indices]))

    def _decode(self, path: Path) -> Tensor:
        height, width = self._size
        try:
            with Image.open(path) as image:
                picture = _in_8_bits(image).convert("L" if self._channels == 1 else "RGB")
        except Exception as problem:  # a damaged file makes Pillow raise nearly anything
            raise _broken(path, problem) from None
        scale = max(height / picture.height, width / picture.width)
        larger = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        left, top = (larger[0] - width) // 2, (larger[1] - height) // 2
        picture = picture.resize(larger, Image.Resampling.BICUBIC).crop((left, top, left + width, top + height))
        pixels = np.array(picture, dtype=np.uint8).reshape(height, width, self._channels)
        return torch.from_numpy(pixels).permute(2, 0, 1)


def open_data(source: str, *, channels: int, size: tuple[int, int]) -> Images:
    """Open `source` (an image folder, an `.npz` with the array `images`, or ``reference``).

    Raises a DpctlError where there are no images, one is broken, or they do not fit [C, H, W].
    """
    require_pixels(channels)
    if source == "reference":
        return _from_npz(REFERENCE_IMAGES, "reference", channels, size)
    path = Path(source)
    if source and path.is_dir():  # an empty name is a variable that was not set, not the folder one is in
        return _from_folder(path, channels, size)
    if path.is_file() and path.suffix == ".npz":
        return _from_npz(path, str(path), channels, size)
    raise DpctlError(
        "no such data", source, "give a folder of images, an .npz file with the array 'images', or the word reference"
    )


def require_pixels(channels: int) -> None:
    """Raise a DpctlError unless images have as many channels."""
    if channels not in (1, 3):
        raise DpctlError(
            "images cannot feed this model",
            f"{channels} input channels",
            "bring a model of 1 or 3 channels (pixel space)",
        )


def _from_folder(folder: Path, channels: int, size: tuple[int, int]) -> FolderImages:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise DpctlError("no images in the folder", str(folder), f"put images there ({', '.join(sorted(SUFFIXES))})")
    for path in paths:
        try:
            with Image.open(path) as image:
                image.verify()
        except Exception as problem:  # a damaged file makes Pillow raise nearly anything
            raise _broken(path, problem) from None
    return FolderImages(str(folder), paths, channels, size)


def _from_npz(path: Path, name: str, channels: int, size: tuple[int, int]) -> ArrayImages:
    todo = "give an .npz with an array 'images' of uint8, [N, H, W] or [N, H, W, C]"
    try:
        with np.load(path, allow_pickle=False) as archive:
            pixels = archive["images"]
    except Exception as problem:  # a damaged archive fails in zipfile, zlib, numpy or struct
        raise DpctlError("the image archive cannot be read", f"{path}: {problem}", todo) from None
    if pixels.ndim == 3:
        pixels = pixels[..., None]
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) == 0:
        raise DpctlError("the array 'images' is not a set of images", f"{pixels.dtype} {list(pixels.shape)}", todo)
    if pixels.shape[1:] != (*size, channels):
        height, width, depth = pixels.shape[1:]
        raise DpctlError(
            "the data does not fit the model",
            f"images of {height}x{width} with {depth} channel(s); the model takes {size[0]}x{size[1]} with {channels}",
            "convert the images to [N, H, W, C], or give a folder of image files (those are resized)",
        )
    return ArrayImages(name, np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)))


def _in_8_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey to 8 bit, which Pillow would clip to white; refuse pixels whose range is not known."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image).astype(np.float32) / 257.0).round().astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode} have no known range; save it with 8 bit per channel")
    return image


def to_bytes(images: Tensor) -> np.ndarray:
    """Return images [N, C, H, W] in [-1, 1] as bytes [N, H, W, C]; what lies outside is clipped."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def _to_float(pixels: Tensor) -> Tensor:
    return pixels.float().div_(127.5).sub_(1.0)


def _broken(path: Path, problem: Exception) -> DpctlError:
    return DpctlError("an image cannot be read", f"{path}: {problem}", "repair or remove the file")
