"""Fréchet distance between the features of the samples and of the real images (Heusel et al. 2017).

It is biased: fewer samples give a larger FID, so only figures of the same sample count and network are compared.
"""

import numpy as np

from dpctl.bench.compare import resample_counts
from dpctl.bench.metrics import RESAMPLES, Drawn, Figure, LeftOut, figure
from dpctl.bench.metrics._features import Statistics

BETTER = "lower"
# Eigenvalues below this part of the largest are rounding.
RANK = 1e-10


def measure(drawn: Drawn) -> Figure:
    """Return the FID at this sample count; its interval is a bootstrap over samples of the FID's first-order term.

    Recomputing the FID of every resample costs hours at 2048 features, and gives intervals up to twice as wide as the
    FID's own scatter: a resample repeats samples, and the bias of fewer samples scatters too.
    """
    features = drawn.features
    if len(features) < 2:
        raise LeftOut("a covariance needs two samples")
    assert drawn.space is not None  # or there were no features
    real = drawn.space.statistics
    root = matrix_root(real.covariance)
    count = len(features)
    value = distance(real.mean, root, *moments(features))
    replicates = value + resample_counts(count, RESAMPLES) @ contributions(features, real.mean, root) / count
    return figure(value, replicates, count=count, against=against(count, real), better=BETTER)


def against(count: int, real: Statistics) -> str:
    """Name the real images, and say where there are too few pictures for a covariance of full rank."""
    fewest, features = min(count, real.count), len(real.mean)
    thin = f"; {fewest} pictures cannot fill {features} features: mostly bias, only a difference counts"
    return f"{real.count} real images{thin if fewest <= features else ''}"


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean [D] and covariance [D, D] of features [N, D]."""
    mean = features.mean(0)
    centred = features - mean
    return mean, centred.T @ centred / (len(features) - 1)


def contributions(features: np.ndarray, mean: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Return each sample's influence on the FID, [N], of mean 0: its derivative by the sample's weight, times N.

    The derivative of tr (R C' R)^(1/2) by C' is half of G = R (R C' R)^(-1/2) R, on the range of R C' R.
    """
    own_mean, covariance = moments(features)
    values, vectors = np.linalg.eigh(root @ covariance @ root)
    within = values > values.max() * RANK
    half = root @ (vectors[:, within] * values[within] ** -0.25)  # half half^T = G
    centred = features - own_mean
    spread = np.square(centred).sum(1) - np.square(centred @ half).sum(1)
    found = 2 * centred @ (own_mean - mean) + spread * len(features) / (len(features) - 1)
    return found - found.mean()


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
