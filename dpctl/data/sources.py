"""Opening images by name: a folder, an `.npz`, a data set of the library datasets, or `reference`."""

from collections.abc import Callable
from pathlib import Path

from dpctl.data.archive import open_archive
from dpctl.data.folder import open_folder
from dpctl.data.hub import PREFIX, is_saved, open_named, open_saved
from dpctl.data.images import Images
from dpctl.errors import DpctlError
from dpctl.progress import say

REFERENCE_IMAGES = Path(__file__).parent.parent / "reference" / "images.npz"


def open_data(
    source: str,
    *,
    channels: int,
    size: tuple[int, int],
    max_broken: int = 0,
    report: Callable[[str], None] = say,
) -> Images:
    """Open `source` (docs/data.md) for a network that takes [C, H, W].

    Up to `max_broken` images that cannot be read are reported, once each, and replaced by the next one. Raises a
    DpctlError where there are no images, more are broken, or they do not fit.
    """
    require_pixels(channels)
    if source == "reference":
        return open_archive(REFERENCE_IMAGES, "reference", channels, size)
    if source.startswith(PREFIX):
        return open_named(source, channels, size, max_broken, report)
    path = Path(source)
    if source and path.is_dir():  # an empty name is a variable that was not set, not the folder one is in
        return (open_saved if is_saved(path) else open_folder)(path, channels, size, max_broken, report)
    if path.is_file() and path.suffix == ".npz":
        return open_archive(path, str(path), channels, size)
    raise DpctlError(
        "no such data",
        source,
        f"give a folder of images, an .npz file with the array 'images', {PREFIX}NAME or the word reference",
    )


def require_pixels(channels: int) -> None:
    """Raise a DpctlError unless images have as many channels."""
    if channels not in (1, 3):
        raise DpctlError(
            "images cannot feed this model",
            f"{channels} input channels",
            "bring a model of 1 or 3 channels (pixel space)",
        )
