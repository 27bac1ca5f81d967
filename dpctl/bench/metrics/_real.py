"""A feature network that the user names, and the statistics of the real images in its features."""

import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np

from dpctl import progress
from dpctl.bench.metrics._features import FeatureSpace
from dpctl.data import Images, open_data, to_bytes
from dpctl.errors import DpctlError

STATISTICS = "statistics.npz"
# KID compares with so many real images: more of them make the file large and the figure no surer.
KEPT = 10_000
TOGETHER = 256


def open_space(
    network: Path, real_images: str, shape: tuple[int, int, int], out: Path, bar: progress.Bar = progress.no_bar
) -> FeatureSpace:
    """Return the features of `network` with the statistics of `real_images`, for pictures [C, H, W].

    `real_images` is what `open_data` takes, and its statistics are then written into `out`; or it is such a file of
    statistics. A DpctlError where network, images and statistics cannot be used, or not together.
    """
    given = Path(real_images)
    made = not is_statistics(given)
    space = FeatureSpace(network, out / STATISTICS if made else given, "", resizes=True)
    refused = space.refuses(np.zeros((1, *shape[1:], shape[0]), np.uint8))
    if refused:
        raise DpctlError("the feature network cannot judge these models", refused, "give one for such images")
    if made:
        _write_statistics(space, open_data(real_images, channels=shape[0], size=shape[1:]), shape, bar)
    space.features(np.zeros((1, *shape[1:], shape[0]), np.uint8))  # the network and the statistics fit together
    about = (
        f"{_named(space)}; against {space.statistics.count} images of {'' if made else 'the statistics '}{real_images}"
    )
    return replace(space, about=about)


def is_statistics(path: Path) -> bool:
    """Tell whether a file is an `.npz` of statistics; one of images, or none at all, is not."""
    if path.suffix != ".npz" or not path.is_file():
        return False
    try:
        with zipfile.ZipFile(path) as archive:
            return "mean.npy" in archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return False


def _named(space: FeatureSpace) -> str:
    """Say what the network is, by its own words where it has some, and what is done to a picture before it."""
    name = space.about_network or f"the network {space.network.name}"
    wanted = space.size
    size = f"resized to {wanted[0]}x{wanted[1]}, bicubic with antialiasing" if wanted else "not resized"
    return f"{name} ({len(space.statistics.mean)} features of pictures in [-1, 1], {size})"


def _write_statistics(space: FeatureSpace, images: Images, shape: tuple[int, int, int], bar: progress.Bar) -> None:
    """Write mean, covariance and features of the images, with what they are of, beside the result."""
    if len(images) < 2:
        got = f"{images.name}: {len(images)} image"
        raise DpctlError("there are too few real images", got, "give as many as you can, some thousands at best")
    parts = []
    with bar("real images", len(images)) as advance:
        for start in range(0, len(images), TOGETHER):
            batch = images.batch(range(start, min(start + TOGETHER, len(images))))
            parts.append(space.rows(to_bytes(batch)))
            advance(len(batch))
    rows = np.concatenate(parts)
    broken = int((~np.isfinite(rows).all(1)).sum())
    if broken:
        got = f"{space.network}: not finite for {broken} of {len(rows)} real images"
        raise DpctlError("the feature network gives no numbers", got, "give another network, or look at those images")
    kept = np.linspace(0, len(rows) - 1, min(KEPT, len(rows))).astype(int)
    space.statistics_file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(
        space.statistics_file,
        mean=rows.mean(0, dtype=np.float64),
        covariance=np.cov(rows, rowvar=False, dtype=np.float64).reshape(rows.shape[1], -1),
        count=np.int64(len(rows)),
        features=rows[kept],
        network=space.digest,
        shape=np.array(shape),
    )
