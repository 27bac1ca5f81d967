"""Data sets of the library `datasets` (the extra [data]): saved on disk, or by name. No code of theirs is run.

The versions that the extra asks for run no loading scripts and read no pickles (docs/data.md).
"""

import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from PIL import Image

from dpctl.data.decoded import Broken, DecodedImages
from dpctl.data.images import Told, told_labels
from dpctl.data.metadata import TEXTS
from dpctl.errors import DpctlError

PREFIX = "datasets:"
SPLIT = "train"
IMAGES = ("image", "img", "picture")
CAPTIONS = (*TEXTS, "prompt")
LABELS = ("label", "labels", "class")


class TableImages(DecodedImages):
    """The images of one column of a data set."""

    def __init__(
        self, name: str, rows: Any, column: str, channels: int, size: tuple[int, int], told: Told, broken: Broken
    ) -> None:
        super().__init__(name, channels, size, told, broken)
        self._rows, self._column = rows, column

    def __len__(self) -> int:
        return len(self._rows)

    def identity(self) -> str:
        return f"{self._column} {self._rows._fingerprint}"

    def _open(self, index: int) -> Image.Image:
        cell = self._rows[index][self._column]
        if cell is None:
            raise ValueError("the row has no image")
        return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else Path(cell["path"]))

    def _path(self, index: int) -> str:
        return f"{self.name}, row {index}"


def is_saved(folder: Path) -> bool:
    """Tell whether a folder was written by `save_to_disk`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def open_saved(
    folder: Path, channels: int, size: tuple[int, int], max_broken: int, report: Callable[[str], None]
) -> TableImages:
    """Open what `save_to_disk` wrote; of several splits `train`."""
    library = _library()
    dataset = _opened(lambda: library.load_from_disk(str(folder)), str(folder))
    if isinstance(dataset, dict):
        split = SPLIT if SPLIT in dataset else next(iter(dataset), "")
        if split != SPLIT and len(dataset) != 1:
            got = f"{folder}: {', '.join(dataset)}"
            raise DpctlError(
                f"the data set has no split {SPLIT}", got, f"name the folder of one, e.g. {folder}/{split}"
            )
        dataset = dataset[split]
    return _images(str(folder), dataset, channels, size, Broken(max_broken, report))


def open_named(
    source: str, channels: int, size: tuple[int, int], max_broken: int, report: Callable[[str], None]
) -> TableImages:
    """Open `datasets:NAME[:SPLIT]`, a data set on the Hub or what the library makes of a folder."""
    name, _, split = source.removeprefix(PREFIX).partition(":")
    library = _library()
    library.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would report every use
    dataset = _opened(lambda: library.load_dataset(name, split=split or SPLIT), source)
    return _images(source, dataset, channels, size, Broken(max_broken, report))


def _library() -> ModuleType:
    try:
        import datasets
    except ImportError as problem:
        raise DpctlError(
            "data sets are read by the library datasets", str(problem), "pip install 'dpctl-diffusion[data]'"
        ) from None
    return datasets


def _opened(load: Callable[[], Any], source: str) -> Any:
    try:
        return load()
    except Exception as problem:  # the library, Arrow, the network and the disk fail in ways of their own
        reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        todo = f"give a folder of save_to_disk, or {PREFIX}NAME[:SPLIT] of a data set without code"
        raise DpctlError("the data set cannot be opened", f"{source}: {reason}", todo) from None


def _images(name: str, dataset: Any, channels: int, size: tuple[int, int], broken: Broken) -> TableImages:
    features = dataset.features
    column = _found([key for key in features if type(features[key]).__name__ == "Image"], IMAGES)
    if column is None:
        listed = ", ".join(f"{key} ({type(feature).__name__})" for key, feature in features.items())
        got = f"{name}: {len(dataset)} rows with the columns {listed}"
        raise DpctlError("no images in the data set", got, "give one with a column of the type Image, best named image")
    told = _told(dataset.with_format(None))
    # The bytes as they are stored: decoding, turning and refusing are done as for every other source.
    undecoded = _library().Image(decode=False)
    rows = dataset.with_format(None).select_columns([column]).cast_column(column, undecoded)
    return TableImages(name, rows, column, channels, size, told, broken)


def _found(columns: list[str], usual: tuple[str, ...]) -> str | None:
    """Return the only column, or the one with a usual name."""
    return columns[0] if len(columns) == 1 else next((name for name in usual if name in columns), None)


def _told(dataset: Any) -> Told:
    features, about = dataset.features, f"with the columns {', '.join(dataset.features)}"
    text = next(
        (name for name in CAPTIONS if getattr(features.get(name), "dtype", "") in ("string", "large_string")), None
    )
    captions = dataset.select_columns([text])[text] if text else None
    named = [key for key in features if type(features[key]).__name__ == "ClassLabel"]
    label = _found(named, LABELS) or next((name for name in LABELS if name in features), None)
    if label is None:
        return Told(captions=captions, about=about)
    try:
        labels, classes = told_labels(dataset.select_columns([label])[:][label], label)
    except DpctlError as problem:  # told when somebody asks for labels: test splits often have -1
        return Told(captions=captions, about=f"{about}; {problem.failed}, {problem.got}")
    return Told(labels, getattr(features[label], "num_classes", None) or classes, captions, about)


def _dtype(feature: Any) -> str:
    return str(getattr(feature, "dtype", ""))
