"""Structural similarity of each picture to the baseline's picture from the same noise: consistency, not quality.

Wang et al. 2004: Gaussian window of 11 pixels and sigma 1.5; pictures are bytes scaled to [0, 1], data range 1.
"""

import numpy as np

from dpctl.bench.metrics import SAME_NOISE, Drawn, Figure, LeftOut, mean_figure

BETTER = "higher"
WINDOW = 11
BATCH = 256


def measure(drawn: Drawn) -> Figure:
    """Return the mean over samples; its interval is the bootstrap's over samples."""
    images, baseline = drawn.pair
    if min(images.shape[1:3]) <= WINDOW // 2:
        raise LeftOut(f"the pictures are smaller than half of SSIM's window of {WINDOW} pixels")
    return mean_figure(per_image(images, baseline), against=SAME_NOISE, better=BETTER)


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
