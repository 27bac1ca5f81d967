"""Data sets of the library `datasets`: on disk and by name, with labels and captions; their code is never run."""

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dpctl.data import Images, open_data
from dpctl.errors import DpctlError

SIZE = (8, 8)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The library with a cache of its own, without progress bars."""
    datasets = pytest.importorskip("datasets", reason="the library datasets is missing (extra [data])")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    return datasets


def pictures(count: int = 4, height: int = 8, width: int = 8) -> list[Image.Image]:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(count)]


def table(library: Any, **columns: tuple[Any, Sequence[Any]]) -> Any:
    """Return a data set: name=(feature, values)."""
    features = library.Features({name: feature for name, (feature, _) in columns.items()})
    return library.Dataset.from_dict({name: list(values) for name, (_, values) in columns.items()}, features=features)


@pytest.fixture
def usual(library: Any) -> Any:
    return table(
        library,
        text=(library.Value("string"), "wxyz"),
        image=(library.Image(), pictures()),
        label=(library.ClassLabel(names=["a", "b", "c"]), [0, 1, 0, 1]),
    )


def opened(source: Any, channels: int = 3, **options: Any) -> Images:
    return open_data(str(source), channels=channels, size=SIZE, **options)


def saved(dataset: Any, folder: Path) -> Path:
    dataset.save_to_disk(folder)
    return folder


def is_the_usual(images: Images) -> None:
    assert len(images) == 4
    shown = ((images.batch([3, 0]) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(shown, np.stack([np.array(pictures()[3]), np.array(pictures()[0])]))
    assert images.labels([3, 0, 1]).tolist() == [1, 0, 1]
    assert images.classes == 3  # the classes that it names, not those that it has
    assert images.captions([3, 0]) == ["z", "w"]


def test_a_data_set_on_disk(usual: Any, tmp_path: Path) -> None:
    is_the_usual(opened(saved(usual, tmp_path / "set")))


def test_a_format_that_was_saved_with_it_changes_nothing(usual: Any, tmp_path: Path) -> None:
    is_the_usual(opened(saved(usual.with_format("numpy", columns=["label"]), tmp_path / "set")))


def test_rows_that_were_selected_stay_selected(usual: Any, tmp_path: Path) -> None:
    images = opened(saved(usual.select([2, 1]), tmp_path / "set"))
    assert images.captions(range(2)) == ["y", "x"]
    assert images.labels(range(2)).tolist() == [0, 1]
    shown = ((images.batch([0]) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(shown[0], np.array(pictures()[2]))


def test_of_several_splits_it_is_train(library: Any, usual: Any, tmp_path: Path) -> None:
    both = library.DatasetDict({"test": usual.select([0]), "train": usual})
    is_the_usual(opened(saved(both, tmp_path / "sets")))
    assert len(opened(tmp_path / "sets" / "test")) == 1
    assert len(opened(saved(library.DatasetDict({"only": usual}), tmp_path / "single"))) == 4
    with pytest.raises(DpctlError, match="has no split train") as caught:
        opened(saved(library.DatasetDict({"one": usual, "two": usual}), tmp_path / "none"))
    assert caught.value.got.endswith("one, two")


def test_a_data_set_by_name(usual: Any, tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    usual.to_parquet(tmp_path / "set" / "train.parquet")
    usual.select([0]).to_parquet(tmp_path / "set" / "test.parquet")
    is_the_usual(opened(f"datasets:{tmp_path / 'set'}"))
    assert len(opened(f"datasets:{tmp_path / 'set'}:test")) == 1
    with pytest.raises(DpctlError, match="cannot be opened") as caught:
        opened(f"datasets:{tmp_path / 'set'}:validation")
    assert "Unknown split" in caught.value.got


@pytest.mark.usefixtures("library")
def test_it_reads_a_folder_as_we_do(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    for number, picture in enumerate(pictures(height=20, width=30)):
        folder = tmp_path / "set" / ("ant" if number % 2 else "bee")
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{number}.png", exif=exif)
    ours, theirs = opened(tmp_path / "set"), opened(f"datasets:{tmp_path / 'set'}")
    assert ours.labels(range(4)).tolist() == theirs.labels(range(4)).tolist() == [0, 0, 1, 1]
    one, other = ours.read(range(4)), theirs.read(range(4))
    assert one.pixels.equal(other.pixels)
    assert one.frames.tolist() == other.frames.tolist() == [[30, 20, 2, 0]] * 4


def test_names_tell_two_columns_of_images_apart(library: Any, tmp_path: Path) -> None:
    two = {"mask": (library.Image(), pictures()[::-1]), "image": (library.Image(), pictures())}
    images = opened(saved(table(library, **two), tmp_path / "set"))
    shown = ((images.batch([0]) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    np.testing.assert_array_equal(shown[0], np.array(pictures()[0]))
    unusual = {"left": two["mask"], "right": two["image"]}
    with pytest.raises(DpctlError, match="no images in the data set") as caught:
        opened(saved(table(library, **unusual), tmp_path / "unusual"))
    assert "left (Image), right (Image)" in caught.value.got


def test_no_images(library: Any, usual: Any, tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match="no images in the data set") as caught:
        opened(saved(table(library, text=(library.Value("string"), "wx")), tmp_path / "text"))
    assert "2 rows with the columns text (Value)" in caught.value.got
    with pytest.raises(DpctlError, match="cannot be opened"):  # the library itself fails at no rows
        opened(saved(usual.select([]), tmp_path / "empty"))


def test_no_captions_and_no_labels(library: Any, tmp_path: Path) -> None:
    images = opened(saved(table(library, image=(library.Image(), pictures())), tmp_path / "set"))
    with pytest.raises(DpctlError, match="no captions for a text model") as caught:
        images.captions([0])
    assert "with the columns image" in caught.value.got
    with pytest.raises(DpctlError, match="no labels for a class-conditional model"):
        images.labels([0])


def test_a_missing_label_or_caption_shows_when_it_is_needed(library: Any, tmp_path: Path) -> None:
    missing = table(
        library,
        image=(library.Image(), pictures()),
        label=(library.ClassLabel(names=["a", "b"]), [0, 1, -1, 1]),
        text=(library.Value("string"), ["w", None, "y", "z"]),
    )
    images = opened(saved(missing, tmp_path / "set"))
    assert images.captions([0, 2]) == ["w", "y"]
    with pytest.raises(DpctlError, match="caption is no text") as caught:
        images.captions([0, 1])
    assert "image 1: None" in caught.value.got
    with pytest.raises(DpctlError, match="no labels for a class-conditional model") as caught:
        images.labels([0])
    assert "label: -1" in caught.value.got


def test_broken_images_are_named_by_their_row(library: Any, tmp_path: Path) -> None:
    stream = io.BytesIO()
    pictures()[0].save(stream, "png")
    cells = [{"bytes": stream.getvalue(), "path": None}, {"bytes": b"no image", "path": None}, None]
    folder = saved(table(library, image=(library.Image(), cells)), tmp_path / "set")
    with pytest.raises(DpctlError, match="an image cannot be read") as caught:
        opened(folder).batch([1])
    assert f"{folder}, row 1" in caught.value.got
    said: list[str] = []
    assert opened(folder, max_broken=2, report=said.append).read([1, 2]).indices == [0, 0]
    assert len(said) == 2
    assert "the row has no image" in "".join(said)


@pytest.mark.usefixtures("library")
def test_code_in_a_data_set_is_not_run(tmp_path: Path) -> None:
    trap = f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(trap)
    with pytest.raises(DpctlError, match="the data set cannot be opened"):
        opened(f"datasets:{tmp_path / 'set'}")
    with pytest.raises(DpctlError, match="the data set cannot be opened"):
        opened(f"datasets:{tmp_path / 'set' / 'set.py'}")
    assert not (tmp_path / "ran").exists()
    exec(compile(trap, "trap", "exec"), {})  # it is a trap indeed
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("damaged", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_a_damaged_data_set(usual: Any, tmp_path: Path, damaged: str) -> None:
    (saved(usual, tmp_path / "set") / damaged).write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(DpctlError, match="the data set cannot be opened"):
        opened(tmp_path / "set")


def test_uses_are_not_reported(library: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library.config, "HF_UPDATE_DOWNLOAD_COUNTS", True)
    with pytest.raises(DpctlError, match="cannot be opened"):
        opened("datasets:no/such")
    assert library.config.HF_UPDATE_DOWNLOAD_COUNTS is False


@pytest.mark.parametrize("by_name", [True, False])
def test_without_the_library_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by_name: bool) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "state.json").touch()
    with pytest.raises(DpctlError, match="read by the library datasets") as caught:
        opened("datasets:some/name" if by_name else tmp_path)
    assert caught.value.todo == "pip install 'dpctl-diffusion[data]'"
