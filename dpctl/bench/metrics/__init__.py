"""Quality metrics, one file each; the file's name is the metric's name in tables and in bench.json.

A metric module has ``BETTER`` ("higher" or "lower") and ``measure(drawn: Drawn) -> Figure``, which raises `LeftOut`
where the metric says nothing about these images.
"""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dpctl.bench.compare import interval, resample_counts
from dpctl.bench.metrics._features import FeatureSpace

# They place a 95 % interval well enough, and stand in bench.json one by one.
RESAMPLES = 400
SAME_NOISE = "the baseline, same noise"


class LeftOut(Exception):
    """The metric does not apply; the message says why, for the report."""


@dataclass(frozen=True)
class Figure:
    """One metric of one model, with its bootstrap 95 % interval over samples.

    `replicates` are the bootstrap's values: those of two models of the same samples pair up (`result.difference`).
    """

    value: float
    low: float
    high: float
    count: int
    against: str
    better: str
    replicates: tuple[float, ...]


@dataclass(frozen=True)
class Drawn:
    """Pictures of one model and of the baseline from the same noise: bytes [N, H, W, C], row i from (seed, i).

    `baseline` is None where the model is the baseline itself, or where the baseline's pictures are missing; `prompts`
    where the model takes none, else prompt i is picture i's. `clip` is the directory of a CLIP model to compare both.
    """

    images: np.ndarray
    baseline: np.ndarray | None
    space: FeatureSpace | None = None
    prompts: tuple[str, ...] | None = None
    clip: Path | None = None

    @cached_property
    def features(self) -> np.ndarray:
        """The features [N, D] of `images`; LeftOut where no feature network takes such images."""
        if self.space is None:
            raise LeftOut("no feature network was given")
        reason = self.space.refuses(self.images)
        if reason:
            raise LeftOut(reason)
        found = self.space.features(self.images)
        broken = int((~np.isfinite(found).all(1)).sum())
        if broken:
            raise LeftOut(f"the feature network gives no finite features for {broken} of {len(found)} pictures")
        return found

    @property
    def pair(self) -> tuple[np.ndarray, np.ndarray]:
        """The images and the baseline's from the same noise; LeftOut where they cannot be compared one by one."""
        if self.baseline is None:
            raise LeftOut("there are no other pictures of the baseline to compare with")
        if self.images.shape != self.baseline.shape:
            raise LeftOut(f"the baseline draws {self.baseline.shape[1:]}, this model {self.images.shape[1:]}")
        return self.images, self.baseline


def figure(value: float, replicates: np.ndarray, *, count: int, against: str, better: str) -> Figure:
    """Make a Figure whose interval is the percentile interval of `replicates`."""
    low, high = interval(replicates)
    return Figure(float(value), low, high, count, against, better, tuple(float(r) for r in replicates))


def mean_figure(values: np.ndarray, *, against: str, better: str) -> Figure:
    """Make a Figure of the mean of one value per sample; its interval is the bootstrap's over samples."""
    count = len(values)
    replicates = resample_counts(count, RESAMPLES) @ values / count
    return figure(values.mean(), replicates, count=count, against=against, better=better)
