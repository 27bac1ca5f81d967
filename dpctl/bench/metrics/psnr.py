"""Peak signal-to-noise ratio of each picture to the baseline's from the same noise, in dB: consistency, not quality.

10 log10(255^2 / mean squared error) over the bytes of a picture, then the mean over pictures. Pictures are rounded to
bytes, and rounding alone has a mean squared error of 1/12: nothing finer counts, so identical pictures have 58.9 dB.
"""

import math

import numpy as np

from dpctl.bench.metrics import SAME_NOISE, Drawn, Figure, mean_figure

BETTER = "higher"
WHITE = 255.0
CEILING = 10 * math.log10(12 * WHITE**2)
BATCH = 256


def measure(drawn: Drawn) -> Figure:
    """Return the mean over samples; its interval is the bootstrap's over samples."""
    return mean_figure(per_image(*drawn.pair), against=SAME_NOISE, better=BETTER)


def per_image(images: np.ndarray, baseline: np.ndarray) -> np.ndarray:
    """Return the PSNR of each pair of pictures, [N], at most CEILING."""
    import torch
    from torchmetrics.functional.image import peak_signal_noise_ratio

    parts = []
    for start in range(0, len(images), BATCH):
        one, other = (torch.from_numpy(side[start : start + BATCH]).double() for side in (images, baseline))
        parts.append(peak_signal_noise_ratio(one, other, data_range=WHITE, reduction="none", dim=(1, 2, 3)))
    return torch.cat(parts).clamp(max=CEILING).numpy()
