"""The feature network of FID and KID and the statistics of the real images, both as files."""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dpctl.errors import DpctlError
from runtime.backends.ort import require

REFERENCE = Path(__file__).parents[2] / "reference"
BATCH = 256


@dataclass(frozen=True)
class Statistics:
    """Mean [D] and covariance [D, D] of the real images' features; some or all of those features [M, D] for KID."""

    mean: np.ndarray
    covariance: np.ndarray
    count: int
    features: np.ndarray | None


@dataclass(frozen=True)
class FeatureSpace:
    """An ONNX network (images [B, C, H, W] in [-1, 1] -> features [B, D]) and the `.npz` of the real images.

    `about` says in words what the network is and which images the statistics are of: it stands in every report.
    """

    network: Path
    statistics_file: Path
    about: str

    @cached_property
    def statistics(self) -> Statistics:
        """Read the statistics; a DpctlError where the file does not hold them."""
        try:
            with np.load(self.statistics_file, allow_pickle=False) as archive:
                features = archive["features"].astype(np.float64) if "features" in archive else None
                found = Statistics(archive["mean"], archive["covariance"], int(archive["count"]), features)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as problem:
            raise DpctlError(
                "the feature statistics cannot be read",
                f"{self.statistics_file}: {problem}",
                "give an .npz with the arrays mean, covariance and count, and features for KID",
            ) from None
        if found.mean.ndim != 1 or found.covariance.shape != (len(found.mean),) * 2:
            got = f"{self.statistics_file}: mean {found.mean.shape}, covariance {found.covariance.shape}"
            raise DpctlError("the feature statistics do not fit together", got, "give mean [D] and covariance [D, D]")
        return found

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

    def refuses(self, images: np.ndarray) -> str | None:
        """Say why the network cannot take images [N, H, W, C], or return None."""
        try:
            require()
        except DpctlError as problem:
            return f"the feature network runs in ONNX Runtime: {problem.got}"
        _, height, width, channels = images.shape
        wanted = self._session.get_inputs()[0].shape[1:]
        pairs = zip(wanted, (channels, height, width), strict=True)
        if all(not isinstance(want, int) or want == have for want, have in pairs):
            return None
        shape = "x".join(str(axis) for axis in wanted)
        return f"the feature network takes {shape} images, the model draws {channels}x{height}x{width}"

    def features(self, images: np.ndarray) -> np.ndarray:
        """Return the features [N, D], float64, of images [N, H, W, C] of bytes."""
        name, outputs = self._session.get_inputs()[0].name, [self._session.get_outputs()[0].name]
        pixels = images.transpose(0, 3, 1, 2).astype(np.float32) / 127.5 - 1.0
        parts = [self._session.run(outputs, {name: pixels[i : i + BATCH]})[0] for i in range(0, len(pixels), BATCH)]
        features = np.concatenate(parts).astype(np.float64)
        if features.shape[1:] != self.statistics.mean.shape:
            got = f"features {list(features.shape[1:])}, statistics {list(self.statistics.mean.shape)}"
            raise DpctlError("the statistics are not of this feature network", got, "give a pair that belongs together")
        return features

    @cached_property
    def description(self) -> dict[str, Any]:
        """Name the network and the images as bench.json and the reports do."""
        return {
            "about": self.about,
            "network": self.network.name,
            "network_sha256": hashlib.sha256(self.network.read_bytes()).hexdigest(),
            "real_images": self.statistics.count,
        }


def reference_space(folder: Path = REFERENCE) -> FeatureSpace | None:
    """Return the embedded feature network and statistics, or None where they are not there."""
    network, statistics = folder / "features.onnx", folder / "statistics.npz"
    if not (network.is_file() and statistics.is_file()):
        return None
    about = json.loads((folder / "features.json").read_text(encoding="utf-8"))
    return FeatureSpace(network, statistics, f"{about['network']}; against {about['statistics']}")
