"""Images become batches in [-1, 1]; what is no image, or not one that fits, is refused by name."""

import io
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dpctl.data import open_data, to_bytes
from dpctl.errors import DpctlError

SIZE = (8, 8)


def picture(height: int = 8, width: int = 8, mode: str = "RGB", seed: int = 0) -> Image.Image:
    shape = (height, width) if mode == "L" else (height, width, 3)
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8))


def encoded(kind: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture(64, 64).save(stream, kind, **options)
    return stream.getvalue()


# --- folders -----------------------------------------------------------------------------------------------------


def test_an_image_of_the_models_size_keeps_its_pixels(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    batch = open_data(str(tmp_path), channels=3, size=SIZE).batch([0, 0])
    assert (batch.shape, batch.dtype) == ((2, 3, 8, 8), torch.float32)
    pixels = torch.from_numpy(np.array(picture())).permute(2, 0, 1)
    torch.testing.assert_close((batch[1] + 1) * 127.5, pixels.float(), rtol=0, atol=1e-4)


def test_bytes_become_minus_one_to_one(tmp_path: Path) -> None:
    for value in (0, 255):
        Image.new("L", (8, 8), value).save(tmp_path / f"{value}.png")
    batch = open_data(str(tmp_path), channels=1, size=SIZE).batch([0, 1])
    assert [batch[0].unique().tolist(), batch[1].unique().tolist()] == [[-1.0], [1.0]]


@pytest.mark.parametrize(("height", "width"), [(16, 16), (16, 40), (40, 16), (5, 3), (1, 90), (8, 9)])
@pytest.mark.parametrize("size", [(8, 8), (8, 12), (12, 8)])
def test_every_size_is_brought_to_the_models(tmp_path: Path, height: int, width: int, size: tuple[int, int]) -> None:
    picture(height, width).save(tmp_path / "a.png")
    batch = open_data(str(tmp_path), channels=3, size=size).batch([0])
    assert batch.shape == (1, 3, *size)
    assert -1.0 <= float(batch.min()) < float(batch.max()) <= 1.0


@pytest.mark.parametrize("upright", [False, True])
def test_the_middle_is_kept_and_the_sides_are_cut(tmp_path: Path, upright: bool) -> None:
    # Three squares in a row, black, white, black: only the middle one is left.
    pixels = np.zeros((32, 96), np.uint8)
    pixels[:, 32:64] = 255
    Image.fromarray(pixels.T if upright else pixels).save(tmp_path / "a.png")
    batch = open_data(str(tmp_path), channels=1, size=SIZE).batch([0])
    assert float(batch[..., 1:-1, 1:-1].min()) > 0.95


def test_shapes_are_not_distorted(tmp_path: Path) -> None:
    # Two stripes of the height's quarter and half: after scaling they are still a quarter and a half.
    pixels = np.zeros((64, 128), np.uint8)
    pixels[16:48] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    batch = open_data(str(tmp_path), channels=1, size=SIZE).batch([0])
    assert (batch[0, 0] > 0).float().mean(1).tolist() == [0, 0, 1, 1, 1, 1, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
@pytest.mark.parametrize("channels", [1, 3])
def test_grey_and_colour_in_every_mode(tmp_path: Path, mode: str, channels: int) -> None:
    # Dark left, bright right: that is what must come out, whatever the file holds.
    pixels = np.repeat(np.array([[30] * 4 + [220] * 4], np.uint8), 8, 0)
    grey = Image.fromarray(pixels)
    image = Image.fromarray(pixels.astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    image = grey.point(lambda value: 255 * (value > 99)).convert("1") if mode == "1" else image
    image.save(tmp_path / "a.tif")
    with Image.open(tmp_path / "a.tif") as again:
        assert again.mode == mode
    batch = open_data(str(tmp_path), channels=channels, size=SIZE).batch([0])
    assert batch.shape == (1, channels, 8, 8)
    dark, bright = (0, 255) if mode == "1" else (30, 220)
    torch.testing.assert_close(
        (batch[..., :4] + 1) * 127.5, torch.full((1, channels, 8, 4), dark + 0.0), rtol=0, atol=2
    )
    torch.testing.assert_close(
        (batch[..., 4:] + 1) * 127.5, torch.full((1, channels, 8, 4), bright + 0.0), rtol=0, atol=2
    )


def test_folders_are_searched_in_the_order_of_their_names(tmp_path: Path) -> None:
    (tmp_path / "deep" / "er").mkdir(parents=True)
    (tmp_path / "deep-er").mkdir()
    for value, name in enumerate(["b.JPG", "deep/a.webp", "deep/er/c.bmp", "deep-er/a.png", "z.png"]):
        Image.new("L", (8, 8), 50 * value).save(tmp_path / name)
    (tmp_path / "labels.csv").write_text("no image")
    (tmp_path / "folder.png").mkdir()
    images = open_data(str(tmp_path), channels=1, size=SIZE)
    assert len(images) == 5
    assert images.name == str(tmp_path)
    shades = (images.batch(range(5)).mean((1, 2, 3)) + 1) * 127.5
    torch.testing.assert_close(shades, torch.tensor([0.0, 50.0, 100.0, 150.0, 200.0]), rtol=0, atol=2)


@pytest.mark.parametrize(
    "content", [b"", b"no image at all", b"\x80\x04cos\nsystem\n", b"\x89PNG\r\n\x1a\n" + bytes(50)]
)
def test_a_broken_image_is_named_before_any_work(tmp_path: Path, content: bytes) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(content)
    with pytest.raises(DpctlError, match="image cannot be read") as caught:
        open_data(str(tmp_path), channels=3, size=SIZE)
    assert str(tmp_path / "b.png") in caught.value.got


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp", "bmp", "tiff"])
@pytest.mark.parametrize("part", [0.02, 0.5, 0.9])
def test_a_truncated_image_is_named_at_the_latest_when_it_is_read(tmp_path: Path, kind: str, part: float) -> None:
    content = encoded(kind)
    (tmp_path / f"a.{kind}").write_bytes(content[: int(part * len(content))])
    with pytest.raises(DpctlError, match="image cannot be read") as caught:
        open_data(str(tmp_path), channels=3, size=SIZE).batch([0])
    assert f"a.{kind}" in caught.value.got


def test_a_damaged_png_is_named_before_any_work(tmp_path: Path) -> None:
    content = bytearray(encoded("png"))
    content[len(content) // 2] ^= 0xFF
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(DpctlError, match="image cannot be read"):
        open_data(str(tmp_path), channels=3, size=SIZE)


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    picture(64, 64).save(tmp_path / "a.png")
    with pytest.raises(DpctlError, match="image cannot be read"):
        open_data(str(tmp_path), channels=3, size=SIZE)


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((8, 8), np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DpctlError, match="image cannot be read") as caught:
        open_data(str(tmp_path), channels=1, size=SIZE).batch([0])
    assert "no known range" in caught.value.got


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_image_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(DpctlError, match="image cannot be read"):
        open_data(str(tmp_path), channels=3, size=SIZE)


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "readme.txt").write_text("nothing here")
    with pytest.raises(DpctlError, match="no images in the folder") as caught:
        open_data(str(tmp_path), channels=3, size=SIZE)
    assert ".png" in caught.value.todo


# --- archives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "channels"), [((5, 8, 8), 1), ((5, 8, 8, 1), 1), ((5, 8, 8, 3), 3)])
def test_an_archive_keeps_its_pixels(tmp_path: Path, shape: tuple[int, ...], channels: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", images=pixels)
    images = open_data(str(tmp_path / "a.npz"), channels=channels, size=SIZE)
    assert len(images) == 5
    batch = images.batch([3, 0])
    assert batch.dtype == torch.float32
    expected = torch.from_numpy(pixels.reshape(5, 8, 8, channels)[[3, 0]]).permute(0, 3, 1, 2).float()
    torch.testing.assert_close((batch + 1) * 127.5, expected, rtol=0, atol=1e-4)


def test_a_batch_is_a_copy(toy_images: Path) -> None:
    images = open_data(str(toy_images), channels=1, size=SIZE)
    before = images.batch([0]).clone()
    images.batch([0]).zero_()
    assert torch.equal(images.batch([0]), before)


def test_the_reference_images_fit_the_reference_model() -> None:
    images = open_data("reference", channels=1, size=(28, 28))
    assert len(images) == 10_000
    assert images.name == "reference"
    batch = images.batch(range(64))
    assert (float(batch.min()), float(batch.max())) == (-1.0, 1.0)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((3, 8, 8), np.float32), "not a set of images"),
        (np.zeros((3, 8, 8), np.int64), "not a set of images"),
        (np.zeros((8, 8), np.uint8), "not a set of images"),
        (np.zeros((0, 8, 8), np.uint8), "not a set of images"),
        (np.zeros((), np.uint8), "not a set of images"),
        (np.zeros((3, 8, 8, 8, 1), np.uint8), "not a set of images"),
        (np.zeros((3, 9, 8), np.uint8), "does not fit the model"),
        (np.zeros((3, 8, 8, 3), np.uint8), "does not fit the model"),
    ],
)
def test_an_array_that_holds_no_fitting_images_is_refused(tmp_path: Path, images: np.ndarray, message: str) -> None:
    np.savez(tmp_path / "a.npz", images=images)
    with pytest.raises(DpctlError, match=message):
        open_data(str(tmp_path / "a.npz"), channels=1, size=SIZE)


class Trap:
    """An object whose unpickling writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_a_pickle_inside_an_archive_is_refused_and_not_opened(tmp_path: Path) -> None:
    trap = np.empty(1, dtype=object)
    trap[0] = Trap(tmp_path / "opened")
    np.savez(tmp_path / "a.npz", images=trap)
    with pytest.raises(DpctlError, match="archive cannot be read"):
        open_data(str(tmp_path / "a.npz"), channels=1, size=SIZE)
    assert not (tmp_path / "opened").exists()
    # It is a trap indeed.
    with np.load(tmp_path / "a.npz", allow_pickle=True) as archive:
        archive["images"]
    assert (tmp_path / "opened").exists()


def an_array_file(path: Path) -> None:
    with path.open("wb") as stream:
        np.save(stream, np.zeros((3, 8, 8), np.uint8))


def a_damaged_archive(path: Path) -> None:
    np.savez_compressed(path, images=np.random.default_rng(0).integers(0, 256, (50, 8, 8), dtype=np.uint8))
    content = bytearray(path.read_bytes())
    content[200:260] = bytes(60)
    path.write_bytes(content)


def a_truncated_archive(path: Path) -> None:
    np.savez(path, images=np.zeros((50, 8, 8), np.uint8))
    path.write_bytes(path.read_bytes()[:1000])


def another_array(path: Path) -> None:
    np.savez(path, pictures=np.zeros((3, 8, 8), np.uint8))


def a_huge_header(path: Path) -> None:
    header = b"{'descr': '|u1', 'fortran_order': False, 'shape': (10000000000000, 8, 8), }"
    header += b" " * (118 - len(header)) + b"\n"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("images.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


@pytest.mark.parametrize(
    "make",
    [
        an_array_file,
        a_damaged_archive,
        a_truncated_archive,
        another_array,
        a_huge_header,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x80\x04cos\nsystem\n"),
        lambda path: path.write_text("text"),
    ],
)
def test_what_is_no_archive_of_images_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "a.npz")
    with pytest.raises(DpctlError, match="archive cannot be read") as caught:
        open_data(str(tmp_path / "a.npz"), channels=1, size=SIZE)
    assert "a.npz" in caught.value.got


# --- neither -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["missing", "missing.npz", "a.tar", "", "\0"])
def test_what_is_neither_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "a.tar").touch()
    picture().save(tmp_path / "a.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DpctlError, match="no such data"):
        open_data(str(tmp_path / name) if name else "", channels=1, size=SIZE)


@pytest.mark.parametrize("channels", [0, 2, 4])
def test_a_model_of_other_channels_is_refused(toy_images: Path, channels: int) -> None:
    with pytest.raises(DpctlError, match="images cannot feed"):
        open_data(str(toy_images), channels=channels, size=SIZE)


def test_bytes_become_images_and_bytes_again(tmp_path: Path) -> None:
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=3)
    pixels[..., 1], pixels[..., 2] = 255 - pixels[..., 1], 7
    np.savez(tmp_path / "all.npz", images=pixels)
    batch = open_data(str(tmp_path / "all.npz"), channels=3, size=(16, 16)).batch([0])
    assert (to_bytes(batch) == pixels).all()
    assert to_bytes(torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).reshape(1, 1, 1, 5)).flatten().tolist() == [
        *(0, 0, 128, 255, 255)
    ]
