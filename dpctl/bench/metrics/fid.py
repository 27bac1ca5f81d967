"""Fréchet distance between the features of the samples and of the real images (Heusel et al. 2017).

It is biased: fewer samples give a larger FID, so only figures of the same sample count and network are compared.
"""

import numpy as np

from dpctl.bench.compare import resample_counts
from dpctl.bench.metrics import RESAMPLES, Drawn, Figure, LeftOut, figure
from dpctl.bench.metrics._features import Statistics

BETTER = "lower"


def measure(drawn: Drawn) -> Figure:
    """Return the FID; its interval is that of the FID at this sample count.

    A bootstrap resample repeats samples, which raises the FID by about the bias that it already has. The replicates
    are therefore shifted to have the FID itself as their mean.
    """
    features = drawn.features
    if len(features) < 2:
        raise LeftOut("a covariance needs two samples")
    assert drawn.space is not None  # or there were no features
    real = drawn.space.statistics
    root = matrix_root(real.covariance)
    count = len(features)
    value = distance(real.mean, root, *moments(features, np.ones(count)))
    resampled = [moments(features, weights) for weights in resample_counts(count, RESAMPLES)]
    replicates = np.array([distance(real.mean, root, *pair) for pair in resampled])
    shifted = replicates - replicates.mean() + value
    return figure(value, shifted, count=count, against=against(count, real), better=BETTER)


def against(count: int, real: Statistics) -> str:
    """Name the real images, and say where there are too few pictures for a covariance of full rank."""
    fewest, features = min(count, real.count), len(real.mean)
    thin = f"; {fewest} pictures cannot fill {features} features: mostly bias, only a difference counts"
    return f"{real.count} real images{thin if fewest <= features else ''}"


def moments(features: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean [D] and covariance [D, D] of features [N, D], each taken weights[i] times."""
    total = weights.sum()
    mean = weights @ features / total
    centred = features - mean
    return mean, (centred * weights[:, None]).T @ centred / (total - 1)


def matrix_root(covariance: np.ndarray) -> np.ndarray:
    """Return the symmetric square root of a covariance."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(values.clip(min=0))) @ vectors.T


def distance(mean: np.ndarray, root: np.ndarray, other_mean: np.ndarray, other_covariance: np.ndarray) -> float:
    """Return |m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), given the root R of C.

    C C' has the eigenvalues of R C' R, which is symmetric: its roots are real and cheap.
    """
    product = np.linalg.eigvalsh(root @ other_covariance @ root)
    traces = np.square(root).sum() + np.trace(other_covariance)
    return float(np.square(mean - other_mean).sum() + traces - 2 * np.sqrt(product.clip(min=0)).sum())
