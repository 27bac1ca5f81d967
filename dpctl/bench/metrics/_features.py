"""The feature network of FID and KID and the statistics of the real images, both as files."""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dpctl.errors import DpctlError
from runtime.backends.ort import require

REFERENCE = Path(__file__).parents[2] / "reference"
# Pictures that pass through the network together: at most so many, and so many values.
BATCH = 256
VALUES = 2**22
# What a network may say of itself, in its ONNX metadata.
ABOUT = "dpctl.features"
TODO = "give a network that takes images [B, C, H, W] of float32, any B, and gives features [B, D]"


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of the real images' features; some or all of those features [M, D] for KID.

    `network` is the SHA-256 of the network that gave them and `shape` the images' [C, H, W], where the file tells.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    features: np.ndarray | None
    network: str | None = None
    shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FeatureSpace:
    """An ONNX network (images [B, C, H, W] in [-1, 1] -> features [B, D]) and the `.npz` of the real images.

    `about` says in words what the network is and which images the statistics are of: it stands in every report. One
    that `resizes` takes pictures of any size: they are brought to its own, as `resized` does; grey ones as three equal
    channels where it wants three.
    """

    network: Path
    statistics_file: Path
    about: str
    resizes: bool = False

    @cached_property
    def statistics(self) -> Statistics:
        """Read the statistics; a DpctlError where the file does not hold them."""
        try:
            with np.load(self.statistics_file, allow_pickle=False) as archive:
                found = _statistics(archive)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
            raise DpctlError(
                "the feature statistics cannot be read",
                f"{self.statistics_file}: {problem}",
                "give an .npz with the arrays mean, covariance and count, and features for KID",
            ) from None
        if found.mean.ndim != 1 or found.covariance.shape != (len(found.mean),) * 2:
            got = f"{self.statistics_file}: mean {found.mean.shape}, covariance {found.covariance.shape}"
            raise DpctlError("the feature statistics do not fit together", got, "give mean [D] and covariance [D, D]")
        if not (np.isfinite(found.mean).all() and np.isfinite(found.covariance).all()):
            raise DpctlError("the feature statistics are not finite", str(self.statistics_file), "compute them again")
        if found.network not in (None, self.digest):
            got = f"{self.statistics_file}: of SHA-256 {found.network}; {self.network}: {self.digest}"
            raise DpctlError("the statistics are not of this feature network", got, "give a pair that belongs together")
        return found

    @cached_property
    def digest(self) -> str:
        """The SHA-256 of the network's file."""
        return hashlib.sha256(self.network.read_bytes()).hexdigest()

    @cached_property
    def _session(self) -> Any:
        onnxruntime = require()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            return onnxruntime.InferenceSession(self.network, options, providers=["CPUExecutionProvider"])
        except Exception as problem:  # its errors have no class in common
            got = f"{self.network}: {str(problem).strip().splitlines()[0]}"
            raise DpctlError("the feature network cannot be loaded", got, "give an ONNX file") from None

    @cached_property
    def _wanted(self) -> list[int | str | None]:
        """The shape [B, C, H, W] of the network's input: numbers, or names where any will do."""
        inputs = self._session.get_inputs()
        shape = inputs[0].shape
        if len(inputs) != 1 or len(shape) != 4 or inputs[0].type != "tensor(float)" or isinstance(shape[0], int):
            got = f"{self.network}: {', '.join(f'{found.type} {found.shape}' for found in inputs)}"
            raise DpctlError("the feature network takes other inputs", got, TODO)
        return list(shape)

    @property
    def about_network(self) -> str | None:
        """What the network's own metadata say that it is."""
        return self._session.get_modelmeta().custom_metadata_map.get(ABOUT)

    @property
    def size(self) -> tuple[int, int] | None:
        """The height and width that pictures are brought to; None where the network takes any."""
        height, width = self._wanted[2:]
        return (height, width) if isinstance(height, int) and isinstance(width, int) else None

    def refuses(self, images: np.ndarray) -> str | None:
        """Say why the network cannot take images [N, H, W, C], or return None."""
        try:
            require()
        except DpctlError as problem:
            return f"the feature network runs in ONNX Runtime: {problem.got}"
        _, height, width, channels = images.shape
        wanted = self._wanted[1:]
        given = (3 if self.resizes and (channels, wanted[0]) == (1, 3) else channels, height, width)
        compared = 1 if self.resizes else 3
        if all(
            not isinstance(want, int) or want == have for want, have in [*zip(wanted, given, strict=True)][:compared]
        ):
            return None
        shape = "x".join(str(axis) for axis in wanted)
        return f"the feature network takes {shape} images, the model draws {channels}x{height}x{width}"

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return the features [N, D], float64, of images [N, H, W, C] of bytes."""
        shape = (images.shape[3], *images.shape[1:3])
        if self.statistics.shape not in (None, shape):
            got = (
                f"{self.statistics_file}: of images {list(self.statistics.shape or ())}, the model draws {list(shape)}"
            )
            raise DpctlError("the statistics are of images of another size", got, "compute them again, at this size")
        features = self.rows(images).astype(np.float64)
        if features.shape[1:] != self.statistics.mean.shape:
            got = f"features {list(features.shape[1:])}, statistics {list(self.statistics.mean.shape)}"
            raise DpctlError("the statistics are not of this feature network", got, "give a pair that belongs together")
        return features

    def rows(self, images: np.ndarray) -> np.ndarray:
        """Return what the network gives for images [N, H, W, C] of bytes, [N, D], as many at a time as memory likes."""
        name, outputs = self._session.get_inputs()[0].name, [self._session.get_outputs()[0].name]
        channels, size = self._wanted[1], self.size or (images.shape[1], images.shape[2])
        step = max(1, min(BATCH, VALUES // (3 * size[0] * size[1])))
        parts = []
        for start in range(0, len(images), step):
            pixels = resized(images[start : start + step], size)
            if channels == 3:  # grey ones too
                pixels = np.broadcast_to(pixels, (*pixels.shape[:3], 3))
            pixels = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)) / np.float32(127.5) - np.float32(1)
            try:
                parts.append(self._session.run(outputs, {name: pixels})[0])
            except Exception as problem:  # its errors have no class in common
                got = f"{self.network}, images {list(pixels.shape)}: {str(problem).strip().splitlines()[0]}"
                raise DpctlError("the feature network does not run", got, TODO) from None
        if parts[0].ndim != 2:
            got = f"{self.network}: {list(parts[0].shape)} for {step} images"
            raise DpctlError("the feature network gives no features", got, TODO)
        return np.concatenate(parts)

    @cached_property
    def description(self) -> dict[str, Any]:
        """Name the network and the images as bench.json and the reports do."""
        return {
            "about": self.about,
            "network": self.network.name,
            "network_sha256": self.digest,
            "dimensions": len(self.statistics.mean),
            "real_images": self.statistics.count,
        }


def _statistics(archive: Any) -> Statistics:
    """Read what an opened `.npz` holds."""
    return Statistics(
        archive["mean"],
        archive["covariance"],
        int(archive["count"]),
        archive["features"].astype(np.float64) if "features" in archive else None,
        str(archive["network"]) if "network" in archive else None,
        tuple(int(axis) for axis in archive["shape"]) if "shape" in archive else None,
    )


def resized(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return images [N, H, W, C] of bytes as float32 at `size`: bicubic with antialiasing, not rounded back to bytes.

    The aspect ratio is not kept. This is the resizing that clean-fid has shown FID to depend on (Parmar et al. 2022).
    """
    if images.shape[1:3] == size:
        return images.astype(np.float32)
    found = np.empty((len(images), *size, images.shape[3]), np.float32)
    for i, picture in enumerate(images.astype(np.float32)):
        for channel in range(images.shape[3]):
            plane = Image.fromarray(np.ascontiguousarray(picture[..., channel]))
            found[i, ..., channel] = np.asarray(plane.resize((size[1], size[0]), Image.Resampling.BICUBIC))
    return found


def reference_space(folder: Path = REFERENCE) -> FeatureSpace | None:
    """Return the embedded feature network and statistics, or None where they are not there."""
    network, statistics = folder / "features.onnx", folder / "statistics.npz"
    if not (network.is_file() and statistics.is_file()):
        return None
    about = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    return FeatureSpace(network, statistics, f"{about['network']}; against {about['statistics']}")
