"""What a pipeline's VAE makes of images, as they are and mirrored: encoded once, cached on disk, sampled in training.

For AutoencoderKL that is the mean and the deviation of the posterior, from which every visit draws anew; for VQModel
the latents before quantisation, which latent diffusion is trained on (Rombach et al., arXiv 2112.10752, section 3.2).
"""

import gc
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from dpctl import artifact
from dpctl.data import cache
from dpctl.data.batch import Batch
from dpctl.data.images import Images, View, draw_views
from dpctl.errors import DpctlError
from dpctl.progress import say

# Images are encoded so many pixels at a time: without gradients that takes a GPU some 2 GB.
PIXELS_TOGETHER = 1 << 20
LATENTS, FRAMES, INDICES = "latents", "frames", "indices"
COLUMNS = (LATENTS, FRAMES, INDICES)


@dataclass(frozen=True)
class Scaling:
    """From the VAE's latents to the network's: (z - mean) / deviation * factor; what the pipeline undoes to decode."""

    factor: float
    mean: Tensor | None = None
    deviation: Tensor | None = None

    def __call__(self, latents: Tensor) -> Tensor:
        """Return scaled latents [B, C, H, W]."""
        if self.mean is not None and self.deviation is not None:
            latents = (latents - self.mean) / self.deviation
        return latents * self.factor


def scaling_of(vae: Any, pipeline: str) -> Scaling:
    """Return the scaling of a VAE within a class of pipelines; a DpctlError for one that the class does not undo."""
    mean, deviation = vae.config.get("latents_mean"), vae.config.get("latents_std")
    centred = mean is not None and deviation is not None
    shift = vae.config.get("shift_factor")
    if shift or (centred and pipeline != "StableDiffusionXLPipeline"):
        got = f"shift_factor {shift}" if shift else f"latents_mean {list(mean)}"
        raise DpctlError(
            "the latents are shifted", f"{got}; {pipeline} does not shift them back", "mend the VAE's config"
        )
    if not centred:
        return Scaling(float(vae.config.scaling_factor))
    return Scaling(float(vae.config.scaling_factor), *(torch.tensor(v)[:, None, None] for v in (mean, deviation)))


class Latents:
    """Images that a VAE has encoded, for networks without conditions.

    `rows` are latents [N, F, K, C, H, W] (F: as it is, mirrored; K: mean, deviation), frames [N, F, 4] as `Pictures`
    has them, and indices [N]: the image that is shown.
    """

    def __init__(self, images: Images, rows: cache.Rows, scaling: Scaling) -> None:
        self.name, self._images, self._rows, self._scaling = images.name, images, rows, scaling
        self._flip = rows[LATENTS].shape[1] == 2
        self._indices: list[int] = rows[INDICES].tolist()

    def __len__(self) -> int:
        return len(self._indices)

    def batch(self, positions: Sequence[int], generators: Sequence[Generator]) -> Batch:
        """Return samples: from each row's generator its flip first, then its place in the posterior."""
        flips = [int(view.flip) for view in draw_views(generators, flip=self._flip, crop="center")]
        latents = self._latents(positions, flips)
        clean = latents[:, 0]
        if latents.shape[1] == 2:
            noise = [torch.randn(clean.shape[1:], generator=generator) for generator in generators]
            clean = clean + latents[:, 1] * torch.stack(noise)
        return Batch(self._scaling(clean), self._conditions(positions, flips, generators))

    def plain(self, positions: Sequence[int]) -> Batch:
        flips = [0] * len(positions)
        return Batch(self._scaling(self._latents(positions, flips)[:, 0]), self._conditions(positions, flips, None))

    def _latents(self, positions: Sequence[int], flips: Sequence[int]) -> Tensor:
        """Return what the VAE gave, [B, K, C, H, W]."""
        return torch.from_numpy(np.array(self._rows[LATENTS][list(positions), list(flips)]))

    def _conditions(
        self, positions: Sequence[int], flips: Sequence[int], generators: Sequence[Generator] | None
    ) -> dict[str, Tensor]:
        """Return what the network is told; without generators nothing is left out."""
        return {}


class LabelledLatents(Latents):
    """The same with their classes, of which the network has `classes`; as `Labelled`."""

    def __init__(self, images: Images, rows: cache.Rows, scaling: Scaling) -> None:
        super().__init__(images, rows, scaling)
        self._labels = images.labels(self._indices)

    def _conditions(
        self, positions: Sequence[int], flips: Sequence[int], generators: Sequence[Generator] | None
    ) -> dict[str, Tensor]:
        return {"class_labels": self._labels[list(positions)]}


def encode(
    setting: cache.Setting,
    entry: str,
    vae: Any,
    images: Images,
    *,
    size: tuple[int, int],
    flip: bool,
    chosen: Sequence[int] | None = None,
) -> cache.Rows:
    """Return the rows of images of a size, from the cache or encoded with `vae`, the component called `entry`.

    They are those of the `chosen` images, in that order, or of all.
    """
    numbers = range(len(images)) if chosen is None else chosen
    name = cache.key(
        kind=LATENTS,
        vae=artifact.digest(artifact.hash_files(setting.directory / entry)),
        data=images.identity(),
        size=f"{size[0]}x{size[1]}",
        crop="center",
        flip=str(flip),
        chosen="all" if chosen is None else json.dumps(list(chosen)),
    )

    @contextmanager
    def maker() -> Iterator[Any]:
        vae.to(setting.device)
        try:
            yield lambda rows: _encoded(vae, images, [numbers[row] for row in rows], flip, setting.device)
        finally:
            vae.to("cpu")
            release(setting.device)

    what = f"latents of {len(numbers)} images{', mirrored too' if flip else ''}"
    together = max(1, PIXELS_TOGETHER // (size[0] * size[1]))
    rows = cache.rows(
        setting.folder / name, COLUMNS, len(numbers), maker, what=what, together=together, bar=setting.bar
    )
    if left := int((rows[INDICES] != np.asarray(numbers)).sum()):
        say(f"{left} of {len(numbers)} images could not be read when they were encoded; others take their places")
    return rows


@torch.no_grad()
def _encoded(vae: Any, images: Images, numbers: Sequence[int], flip: bool, device: torch.device) -> cache.Rows:
    """Return the rows of some images: each is mirrored before it is encoded, since no VAE does it after."""
    seen = [images.read(numbers, [View(flip=mirrored)] * len(numbers)) for mirrored in (False, True)[: 1 + flip]]
    latents = torch.stack([posterior(vae, pictures.pixels.to(device)) for pictures in seen], 1).cpu()
    if not latents.isfinite().all():
        raise DpctlError(
            "the latents are not finite", f"images {numbers[0]} to {numbers[-1]}", "check the VAE's weights"
        )
    return {
        LATENTS: latents.numpy(),
        FRAMES: torch.stack([pictures.frames for pictures in seen], 1).numpy(),
        INDICES: np.array(seen[0].indices, np.int64),
    }


def posterior(vae: Any, pixels: Tensor) -> Tensor:
    """Return what a VAE makes of images [B, C, H, W]: mean and deviation, or latents alone. [B, K, C, H, W]"""
    found = vae.encode(pixels)
    if hasattr(found, "latent_dist"):
        return torch.stack([found.latent_dist.mean, found.latent_dist.std], 1)
    return found.latents[:, None]


def own_device() -> torch.device:
    """Return where this process encodes: its GPU, or the processor."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def release(device: torch.device) -> None:
    """Give back the memory of networks that nobody holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
