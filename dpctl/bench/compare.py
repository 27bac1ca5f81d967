"""Estimates with their uncertainty: bootstrap intervals, and ratios of measurements taken side by side.

Machines drift: the same graph can take 100 ms now and 350 ms a minute later. So only what was measured in the same
round is compared, and the interval is over rounds. Everything here is pure and seeded: the same values give the same
interval.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
CONFIDENCE = 0.95
# A 99th percentile of fewer observations is one or two outliers.
P99_FROM = 1000


@dataclass(frozen=True)
class Estimate:
    """A value with its bootstrap 95 % interval, from `count` observations."""

    value: float
    low: float
    high: float
    count: int

    def holds(self, value: float) -> bool:
        """Tell whether the interval holds `value`: then there is no significant difference from it."""
        return self.low <= value <= self.high


@dataclass(frozen=True)
class Percentiles:
    """Percentiles of `count` observations; `p99` is None below 1,000 of them."""

    p50: float
    p90: float
    p99: float | None
    count: int


def percentiles(values: Sequence[float]) -> Percentiles:
    """Return the percentiles of raw values (linear between ranks)."""
    p50, p90, p99 = (float(p) for p in np.percentile(values, [50, 90, 99]))
    return Percentiles(p50, p90, p99 if len(values) >= P99_FROM else None, len(values))


def paired_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Estimate:
    """Return the median over rounds of numerator / denominator, with the bootstrap interval of that median.

    The two sequences are of the same rounds, in the same order. With latencies, baseline / candidate is the speed-up.
    """
    ratios = np.asarray(numerator, dtype=float) / np.asarray(denominator, dtype=float)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(RESAMPLES, len(ratios)))
    low, high = interval(np.median(ratios[drawn], axis=1))
    return Estimate(float(np.median(ratios)), low, high, len(ratios))


def interval(replicates: np.ndarray | Sequence[float]) -> tuple[float, float]:
    """Return the percentile interval of bootstrap replicates."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.asarray(replicates, dtype=float), [tail, 1 - tail])
    return float(low), float(high)


def resample_counts(count: int, resamples: int) -> np.ndarray:
    """Return how often each of `count` samples is drawn in each resample, [resamples, count].

    It depends on the two numbers alone, so that models whose samples come from the same noise are resampled together
    and their difference is a paired one.
    """
    return np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=resamples)


def relative_spread(values: Sequence[float]) -> float:
    """Return the distance between the quartiles over the median."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float((high - low) / middle)
