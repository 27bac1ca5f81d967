"""Kernel distance between the features of the samples and of the real images (Bińkowski et al. 2018).

The squared maximum mean discrepancy with the kernel (x.y / D + 1)^3, unbiased in the number of samples. All pairs are
used, instead of a mean over random subsets of 1,000: the same expectation, less noise.
"""

from functools import lru_cache

import numpy as np

from dpctl.bench.compare import resample_counts
from dpctl.bench.metrics import RESAMPLES, Drawn, Figure, LeftOut, figure
from dpctl.bench.metrics._features import FeatureSpace

BETTER = "lower"
ROWS = 1000


def measure(drawn: Drawn) -> Figure:
    """Return the KID; its interval is a bootstrap over samples of the estimate's first-order term.

    The estimate is a U-statistic, whose sampling error is twice the mean of each sample's own contribution h(x): what
    it has in common with the other samples less what it has in common with the real images (Hoeffding 1948).
    """
    features = drawn.features
    assert drawn.space is not None  # or there were no features
    real = drawn.space.statistics.features
    if real is None:
        raise LeftOut("the statistics hold no features of real images")
    if min(len(features), len(real)) < 2:
        raise LeftOut("pairs need two samples")
    crossed = mean_kernel(features, real)
    contributions = mean_kernel(features, features, exclude_self=True) - crossed
    value = contributions.mean() - crossed.mean() + among_real(drawn.space)
    count = len(features)
    replicates = value + 2 * (resample_counts(count, RESAMPLES) @ (contributions - contributions.mean())) / count
    return figure(value, replicates, count=count, against=f"{len(real)} real images", better=BETTER)


@lru_cache(maxsize=1)
def among_real(space: FeatureSpace) -> float:
    """Return the mean kernel value of two real images: the same for every model."""
    real = space.statistics.features
    assert real is not None
    return float(mean_kernel(real, real, exclude_self=True).mean())


def mean_kernel(rows: np.ndarray, columns: np.ndarray, *, exclude_self: bool = False) -> np.ndarray:
    """Return for each row its mean kernel value with all columns, [N]; without itself where the two are one set."""
    sums = []
    for start in range(0, len(rows), ROWS):
        kernel = (rows[start : start + ROWS] @ columns.T / rows.shape[1] + 1.0) ** 3
        if exclude_self:
            own = np.arange(len(kernel))
            kernel[own, start + own] = 0.0
        sums.append(kernel.sum(1))
    return np.concatenate(sums) / (len(columns) - exclude_self)
