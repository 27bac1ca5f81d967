"""Structural similarity of each picture to the baseline's picture from the same noise: consistency, not quality.

Wang et al. 2004: Gaussian window of 11 pixels and sigma 1.5; pictures are bytes scaled to [0, 1], data range 1.
"""

import numpy as np

from dpctl.bench.compare import resample_counts
from dpctl.bench.metrics import RESAMPLES, Drawn, Figure, LeftOut, figure

BETTER = "higher"
WINDOW = 11
BATCH = 256


def measure(drawn: Drawn) -> Figure:
    """Return the mean over samples; its interval is the bootstrap's over samples."""
    if drawn.baseline is None:
        raise LeftOut("there are no other pictures of the baseline to compare with")
    if drawn.images.shape != drawn.baseline.shape:
        raise LeftOut(f"the baseline draws {drawn.baseline.shape[1:]}, this model {drawn.images.shape[1:]}")
    if min(drawn.images.shape[1:3]) <= WINDOW // 2:
        raise LeftOut(f"the pictures are smaller than half of SSIM's window of {WINDOW} pixels")
    similarity = per_image(drawn.images, drawn.baseline)
    count = len(similarity)
    replicates = resample_counts(count, RESAMPLES) @ similarity / count
    return figure(similarity.mean(), replicates, count=count, against="the baseline, same noise", better=BETTER)


def per_image(images: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Return the SSIM of each pair of pictures, [N]."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    parts = []
    for start in range(0, len(images), BATCH):
        one, other = (
            torch.from_numpy(side[start : start + BATCH]).permute(0, 3, 1, 2).double() / 255
            for side in (images, baseline)
        )
        parts.append(structural_similarity_index_measure(one, other, data_range=1.0, reduction="none"))
    return torch.cat(parts).numpy()
