"""How an image is looked at: mirrored, cropped, upright; what a row shows depends on its own generator alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from dpctl.data import Pixels, View, decoded, draw_views, open_data
from dpctl.data.decoded import in_threads
from dpctl.diffusion import sample_generator

SIZE = (8, 12)


def noisy(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number, shape in enumerate([(20, 20), (9, 40), (8, 12), (4, 5)]):
        noisy(*shape, seed=number).save(tmp_path / f"{number}.png")
    return tmp_path


def generators(count: int, seed: int = 0) -> list[torch.Generator]:
    return [sample_generator(seed, index, "view") for index in range(count)]


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("place", [None, (0.0, 0.0), (0.99, 0.3), (0.4, 0.999)])
def test_the_frame_says_what_was_cut_from_where(folder: Path, flip: bool, place: tuple[float, float] | None) -> None:
    images = open_data(str(folder), channels=3, size=SIZE)
    read = images.read(range(4), [View(flip, place)] * 4)
    assert read.indices == [0, 1, 2, 3]
    for row, (height, width, top, left) in enumerate(read.frames.tolist()):
        with Image.open(folder / f"{row}.png") as image:
            assert (height, width) == (image.height, image.width)
            scale = max(SIZE[0] / height, SIZE[1] / width)
            larger = (max(SIZE[1], round(width * scale)), max(SIZE[0], round(height * scale)))
            resized = image.resize(larger, Image.Resampling.BICUBIC)
        seen = ImageOps.mirror(resized) if flip else resized
        cut = np.array(seen.crop((left, top, left + SIZE[1], top + SIZE[0])))
        assert cut.shape == (*SIZE, 3)
        assert 0 <= top <= larger[1] - SIZE[0]
        assert 0 <= left <= larger[0] - SIZE[1]
        shown = ((read.pixels[row] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(shown, cut)


def test_without_views_it_is_the_centre(folder: Path) -> None:
    images = open_data(str(folder), channels=3, size=SIZE)
    read = images.read(range(4))
    assert torch.equal(read.pixels, images.batch(range(4)))
    assert read.frames.tolist() == [[20, 20, 2, 0], [9, 40, 0, 12], [8, 12, 0, 0], [4, 5, 1, 0]]
    assert read.frames.dtype == torch.int64


@pytest.mark.parametrize("across", [False, True])
def test_random_crops_reach_every_place_and_no_other(tmp_path: Path, across: bool) -> None:
    noisy(*((8, 11) if across else (11, 8))).save(tmp_path / "a.png")
    images = open_data(str(tmp_path), channels=3, size=(8, 8))
    corners = images.read([0] * 64, draw_views(generators(64), flip=False, crop="random")).frames[:, 2:]
    assert set(corners[:, int(across)].tolist()) == {0, 1, 2, 3}
    assert set(corners[:, 1 - int(across)].tolist()) == {0}


def test_the_flip_is_drawn_first_so_that_a_crop_does_not_change_it() -> None:
    centred = draw_views(generators(32), flip=True, crop="center")
    cropped = draw_views(generators(32), flip=True, crop="random")
    assert [view.flip for view in centred] == [view.flip for view in cropped]
    assert 0 < sum(view.flip for view in centred) < 32
    assert all(view.place is None for view in centred)
    assert len({view.place for view in cropped}) == 32


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_row_is_a_function_of_its_position_and_generator(folder: Path, crop: str) -> None:
    pixels = Pixels(open_data(str(folder), channels=3, size=SIZE), crop=crop)
    together = pixels.batch([3, 0, 1], generators(3)).clean
    for row, position in enumerate([3, 0, 1]):
        alone = pixels.batch([position], [sample_generator(0, row, "view")]).clean
        assert torch.equal(alone[0], together[row])


def test_a_plain_batch_is_neither_flipped_nor_moved(folder: Path) -> None:
    images = open_data(str(folder), channels=3, size=SIZE)
    pixels = Pixels(images, crop="random")
    assert torch.equal(pixels.plain([2, 1]).clean, images.batch([2, 1]))
    assert not torch.equal(pixels.batch([1], generators(1)).clean, images.batch([1]))


def test_an_archive_is_mirrored_but_has_nothing_to_crop(toy_images: Path) -> None:
    images = open_data(str(toy_images), channels=1, size=(8, 8))
    read = images.read([5, 5], [View(flip=True, place=(0.9, 0.9)), View()])
    assert torch.equal(read.pixels[0], images.batch([5])[0].flip(-1))
    assert torch.equal(read.pixels[1], images.batch([5])[0])
    assert read.frames.tolist() == [[8, 8, 0, 0]] * 2


def test_the_number_of_threads_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = open_data(str(folder), channels=3, size=SIZE)
    order = [index % 4 for index in range(40)]
    views = draw_views(generators(40), flip=True, crop="random")
    many = images.read(order, views)
    monkeypatch.setattr(decoded.os, "sched_getaffinity", lambda _: {0})
    one = images.read(order, views)
    assert torch.equal(many.pixels, one.pixels)
    assert torch.equal(many.frames, one.frames)
    assert many.indices == one.indices


def test_threads_keep_the_order_and_pass_errors_on() -> None:
    assert list(in_threads(lambda value: value * value, range(600))) == [value * value for value in range(600)]
    assert list(in_threads(lambda value: value, [])) == []
    with pytest.raises(ZeroDivisionError):
        list(in_threads(lambda value: 1 // value, [1, 0]))


# --- upright -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["png", "jpg", "tif", "webp"])
def test_a_photograph_stands_as_the_camera_was_held(tmp_path: Path, orientation: int, kind: str) -> None:
    # A dark corner on a bright ground, larger than what compression smears.
    pixels = np.full((32, 48, 3), 220, np.uint8)
    pixels[:16, :16] = 30
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / f"a.{kind}", exif=exif)
    with Image.open(tmp_path / f"a.{kind}") as image:
        upright = ImageOps.exif_transpose(image)
        assert upright is not None
    size = (upright.height, upright.width)
    read = open_data(str(tmp_path), channels=3, size=size).read([0])
    assert read.frames.tolist() == [[*size, 0, 0]]
    shown = ((read.pixels[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(shown, np.array(upright.convert("RGB")))


def test_damaged_exif_makes_no_image_unreadable(tmp_path: Path) -> None:
    noisy(8, 12).save(tmp_path / "a.png", exif=b"Exif\x00\x00no such header")
    batch = open_data(str(tmp_path), channels=3, size=SIZE).batch([0])
    shown = ((batch[0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(shown, np.array(noisy(8, 12)))
