"""A broken image is reported once and replaced by the next, up to a limit; never silently."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpctl.data import Images, Labelled, decoded, folder, open_data
from dpctl.diffusion import sample_generator
from dpctl.errors import DpctlError

SIZE = (8, 8)


def shade(path: Path, value: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.new("L", SIZE, value).save(path)


def spoil(path: Path) -> None:
    """Damage the pixels, not the header: only decoding finds it."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Ten shades, of which 3, 4 and 9 are broken."""
    for number in range(10):
        shade(tmp_path / f"{number}.bmp", 20 * number)
    for number in (3, 4, 9):
        (tmp_path / f"{number}.bmp").write_bytes(b"BM no image")
    return tmp_path


def shades(source: Images, indices: list[int]) -> list[int]:
    return [round(float(value)) for value in (source.batch(indices).mean((1, 2, 3)) + 1) * 127.5]


def test_the_next_image_that_can_be_read_takes_the_place(images: Path) -> None:
    said: list[str] = []
    source = open_data(str(images), channels=1, size=SIZE, max_broken=3, report=said.append)
    assert len(source) == 10
    assert shades(source, list(range(10))) == [0, 20, 40, 100, 100, 100, 120, 140, 160, 0]
    assert source.read([9, 3, 5]).indices == [0, 5, 5]


def test_each_is_reported_once_by_path_and_reason(images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = open_data(str(images), channels=1, size=SIZE, max_broken=3)
    for _ in range(3):
        source.batch(list(range(10)))
    shown = capsys.readouterr()
    lines = shown.err.splitlines()
    assert [line.split(": ")[1] for line in lines] == [str(images / f"{number}.bmp") for number in (3, 4, 9)]
    assert all("cannot identify image file" in line for line in lines)
    assert lines[1].startswith("skipped an image (2 of at most 3)")
    assert shown.out == ""


def test_damage_that_only_decoding_finds_counts_too(tmp_path: Path) -> None:
    shade(tmp_path / "b.png", 100)
    spoil(tmp_path / "a.jpg")
    said: list[str] = []
    source = open_data(str(tmp_path), channels=1, size=SIZE, max_broken=1, report=said.append)
    assert said == []
    assert shades(source, [0, 1, 0]) == [100, 100, 100]
    assert len(said) == 1
    assert "a.jpg" in said[0]


def test_one_too_many_is_an_error_every_time(images: Path) -> None:
    said: list[str] = []
    with pytest.raises(DpctlError, match="too many images cannot be read") as caught:
        open_data(str(images), channels=1, size=SIZE, max_broken=2, report=said.append)
    assert len(said) == 2
    assert "9.bmp" in caught.value.got
    assert "--max-broken" in caught.value.todo


def test_one_too_many_in_the_middle_of_a_run(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder.FolderImages.check, "__defaults__", (1,))
    source = open_data(str(images), channels=1, size=SIZE, max_broken=2, report=lambda line: None)
    assert shades(source, [3, 4]) == [100, 100]
    for _ in range(2):
        with pytest.raises(DpctlError, match="too many images cannot be read"):
            source.batch([9])


def test_without_a_limit_the_first_is_an_error(images: Path) -> None:
    with pytest.raises(DpctlError, match="an image cannot be read") as caught:
        open_data(str(images), channels=1, size=SIZE)
    assert "3.bmp" in caught.value.got


def test_nothing_but_broken_images(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.bmp").write_bytes(b"")
    source = open_data(str(tmp_path), channels=1, size=SIZE, max_broken=10, report=lambda line: None)
    with pytest.raises(DpctlError, match="no image can be read"):
        source.batch([1])


def test_a_label_belongs_to_the_image_that_is_shown(tmp_path: Path) -> None:
    for number, name in enumerate(["a/0.bmp", "a/1.bmp", "b/2.bmp"]):
        shade(tmp_path / name, 50 * number)
    (tmp_path / "a" / "1.bmp").write_bytes(b"")
    source = open_data(str(tmp_path), channels=1, size=SIZE, max_broken=1, report=lambda line: None)
    batch = Labelled(source, 2).batch([0, 1], [sample_generator(0, row) for row in range(2)])
    assert batch.conditions["class_labels"].tolist() == [0, 1]
    assert torch.equal(batch.clean[1], source.batch([2])[0])


def test_an_error_leaves_the_rest_unread(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []

    def look(path: str) -> Image.Image:
        looked.append(path)
        raise OSError("no such disk")

    monkeypatch.setattr(folder.Image, "open", look)
    with pytest.raises(DpctlError, match="an image cannot be read"):
        folder.FolderImages("many", ["a"] * 10_000, 1, SIZE).check()
    assert 1 <= len(looked) <= decoded.TOGETHER


@pytest.mark.parametrize(("count", "looked_into"), [(10, 10), (10_000, 10_000), (10_001, 5001), (1_000_000, 10_000)])
def test_of_a_large_folder_some_are_looked_into_first(
    count: int, looked_into: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[str] = []

    def look(path: str) -> Image.Image:
        looked.append(path)
        return Image.new("L", SIZE)

    monkeypatch.setattr(folder.Image, "open", look)
    folder.FolderImages("many", [str(number) for number in range(count)], 1, SIZE).check()
    numbers = sorted(int(path) for path in looked)
    assert len(numbers) == looked_into
    assert len(set(np.diff(numbers))) == 1
    assert numbers[0] == 0
