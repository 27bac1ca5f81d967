"""Labels and captions of folders, metadata files and archives; where they do not fit, an error says which and why."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image

from dpctl.data import Images, Labelled, open_data
from dpctl.diffusion import denoising_loss
from dpctl.errors import DpctlError

SIZE = (8, 8)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three images, in the order of their names: a.png, b.png, more/c.png."""
    (tmp_path / "more").mkdir()
    for value, name in enumerate(["a.png", "b.png", "more/c.png"]):
        Image.new("L", SIZE, 50 * value).save(tmp_path / name)
    return tmp_path


def opened(folder: Path) -> Images:
    return open_data(str(folder), channels=1, size=SIZE)


def lines(path: Path, *rows: Any) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def rows(**columns: list[Any]) -> list[dict[str, Any]]:
    names = ["more/c.png", "a.png", "b.png"]
    return [{"file_name": name, **{key: values[i] for key, values in columns.items()}} for i, name in enumerate(names)]


# --- captions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["text", "caption"])
def test_captions_of_json_lines(photos: Path, column: str) -> None:
    lines(photos / "metadata.jsonl", *rows(**{column: ["sea", "ein Fuß", ""]}))
    assert opened(photos).captions([2, 0, 1]) == ["sea", "ein Fuß", ""]


def test_captions_and_labels_of_a_table(photos: Path) -> None:
    text = 'label,file_name,text\r\n7,b.png,"one, two"\r\n0,a.png,"two\nlines"\r\n3,more/c.png,sea\r\n'
    (photos / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    images = opened(photos)
    assert images.captions(range(3)) == ["two\nlines", "one, two", "sea"]
    assert images.labels(range(3)).tolist() == [0, 7, 3]
    assert images.classes == 8


def test_a_file_in_each_folder_names_its_own(photos: Path) -> None:
    lines(photos / "metadata.jsonl", *rows(text=["", "a", "b"])[1:])
    (photos / "more" / "metadata.csv").write_text("file_name,text\nc.png,c\n")
    assert opened(photos).captions(range(3)) == ["a", "b", "c"]


def test_no_captions_for_a_text_model(photos: Path) -> None:
    with pytest.raises(DpctlError, match="no captions for a text model") as caught:
        opened(photos).captions([0])
    assert "no metadata.jsonl" in caught.value.got
    example = json.loads(caught.value.todo[caught.value.todo.index("{") :])
    assert set(example) == {"file_name", "text"}


def test_metadata_without_a_column_of_captions(photos: Path) -> None:
    lines(photos / "metadata.jsonl", *rows(title=["x", "y", "z"]))
    with pytest.raises(DpctlError, match="no captions for a text model") as caught:
        opened(photos).captions([0])
    assert "columns file_name, title" in caught.value.got


def test_a_caption_that_is_no_text(photos: Path) -> None:
    lines(photos / "metadata.jsonl", *rows(text=["x", ["y"], "z"]))
    with pytest.raises(DpctlError, match="caption is no text"):
        opened(photos).captions([0])


# --- labels ------------------------------------------------------------------------------------------------------


def test_folders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    for name in ["train/cat/1.png", "train/ant/2.png", "test/cat/3.png", "test/bee/0.png"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", SIZE).save(tmp_path / name)
    images = opened(tmp_path)
    labels = images.labels(range(4))
    assert (labels.tolist(), labels.dtype, images.classes) == ([1, 2, 0, 2], torch.int64, 3)


def test_names_in_metadata_are_classes_in_sorted_order(photos: Path) -> None:
    lines(photos / "metadata.jsonl", *rows(label=["zebra", "ant", "zebra"]))
    images = opened(photos)
    assert images.labels([0, 1, 2]).tolist() == [0, 1, 1]
    assert images.classes == 2


@pytest.mark.parametrize("nested", [False, True])
def test_no_labels_for_a_class_conditional_model(photos: Path, nested: bool) -> None:
    if not nested:  # images beside folders are no classes, and neither is one folder
        (photos / "more" / "c.png").unlink()
    with pytest.raises(DpctlError, match="no labels for a class-conditional model") as caught:
        Labelled(opened(photos), 5)
    assert "one folder per class" in caught.value.todo


@pytest.mark.parametrize("labels", [[0, 1, -1], [0, 1, 1.5], [0, 1, True], [0, 1, "a"], [0, 1, [2]], [0, 1, 2**40]])
def test_a_label_that_is_no_class(photos: Path, labels: list[Any]) -> None:
    lines(photos / "metadata.jsonl", *rows(label=labels))
    with pytest.raises(DpctlError, match="a label is no class") as caught:
        opened(photos)
    assert repr(labels[2]) in caught.value.got


def test_labels_are_checked_against_the_models_classes(photos: Path) -> None:
    lines(photos / "metadata.jsonl", *rows(label=[0, 4, 1]))
    batch = Labelled(opened(photos), 5).plain([0, 2])
    assert batch.conditions["class_labels"].tolist() == [4, 0]
    with pytest.raises(DpctlError, match="a label is out of range") as caught:
        Labelled(opened(photos), 4)
    assert "labels up to 4, the model has the classes 0 to 3" in caught.value.got


def test_a_class_conditional_network_is_trained_on_them(tmp_path: Path, families: dict[str, Any]) -> None:
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        Image.new("L", SIZE, 90).save(tmp_path / name / "0.png")
    unet = families["class-conditional"]()
    images = open_data(str(tmp_path), channels=3, size=SIZE)
    batch = Labelled(images, unet.config.num_class_embeds).plain([0, 1])
    noise, timesteps = torch.ones(2, 3, *SIZE), torch.tensor([5, 5])
    losses = denoising_loss(unet, DDPMScheduler(), batch.clean, noise, timesteps, batch.conditions)
    assert losses[0].item() != losses[1].item()  # the same pixels and noise: only the class differs


# --- metadata that does not fit ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["d.png", "../a.png", "more/a.png", "/etc/passwd", "more", ""])
def test_metadata_that_names_a_missing_image(photos: Path, name: str) -> None:
    lines(photos / "metadata.jsonl", *rows(text=["x", "y", "z"]), {"file_name": name, "text": "t"})
    with pytest.raises(DpctlError, match="names an image that is not there") as caught:
        opened(photos)
    assert f"metadata.jsonl, line 4: {name}" in caught.value.got


def test_images_that_the_metadata_leaves_out(photos: Path) -> None:
    lines(photos / "metadata.jsonl", *rows(text=["x", "y", "z"])[:1])
    with pytest.raises(DpctlError, match="images without a line in the metadata") as caught:
        opened(photos)
    assert "2 of 3, the first:" in caught.value.got
    assert "a.png" in caught.value.got


def test_an_image_that_is_named_twice(photos: Path) -> None:
    lines(photos / "metadata.jsonl", *rows(text=["x", "y", "z"]), {"file_name": "more/../a.png"})
    with pytest.raises(DpctlError, match="names an image twice") as caught:
        opened(photos)
    assert "line 2" in caught.value.got
    assert "line 4" in caught.value.got


def test_metadata_without_names(photos: Path) -> None:
    (photos / "metadata.csv").write_text("name,text\na.png,x\n")
    with pytest.raises(DpctlError, match="has no file_name") as caught:
        opened(photos)
    assert "line 2: the columns name, text" in caught.value.got


@pytest.mark.parametrize("column", ["text", "label"])
def test_a_line_without_what_the_others_have(photos: Path, column: str) -> None:
    told = rows(**{column: ["x", "y", "z"]})
    del told[1][column]
    lines(photos / "metadata.jsonl", *told)
    with pytest.raises(DpctlError, match=f"a line of the metadata has no {column}") as caught:
        opened(photos)
    assert caught.value.got.endswith("line 2")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", b"not json\n"),
        ("metadata.jsonl", b'["a.png"]\n'),
        ("metadata.jsonl", b"[" * 100_000),
        ("metadata.jsonl", b"\xff\xfe\n"),
        ("metadata.csv", b"file_name,text\n\xff,x\n"),
        ("metadata.csv", b"file_name,text\na.png," + b"x" * 200_000),
    ],
)
def test_metadata_that_cannot_be_read(photos: Path, name: str, content: bytes) -> None:
    (photos / name).write_bytes(content)
    with pytest.raises(DpctlError, match="the metadata cannot be read") as caught:
        opened(photos)
    assert name in caught.value.got


# --- archives ----------------------------------------------------------------------------------------------------


def test_an_archive_has_labels_and_captions(tmp_path: Path) -> None:
    told = {"labels": np.uint8([2, 0, 1]), "captions": np.array(["x", "y", "z"])}
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), **told)
    images = opened(tmp_path / "a.npz")
    assert images.labels([0, 1]).tolist() == [2, 0]
    assert images.classes == 3
    assert images.captions([2, 0]) == ["z", "x"]


def test_an_archive_without_them_says_so(toy_images: Path) -> None:
    images = opened(toy_images)
    assert images.classes == 0
    with pytest.raises(DpctlError, match="no captions for a text model"):
        images.captions([0])
    with pytest.raises(DpctlError, match="no labels for a class-conditional model") as caught:
        images.labels([0])
    assert "with the arrays images" in caught.value.got


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("labels", np.zeros(2, np.int64)),
        ("labels", np.zeros((3, 1), np.int64)),
        ("labels", np.zeros(3)),
        ("labels", np.zeros(3, bool)),
        ("captions", np.zeros(3, np.int64)),
        ("captions", np.array(["x", "y"])),
        ("captions", np.array([b"x", b"y", b"z"])),
    ],
)
def test_arrays_that_do_not_fit_the_images(tmp_path: Path, name: str, array: np.ndarray) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), **{name: array})
    with pytest.raises(DpctlError, match=f"the array '{name}' does not fit the images"):
        opened(tmp_path / "a.npz")


def test_a_label_of_an_archive_below_zero(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), labels=np.array([0, -1, 2]))
    with pytest.raises(DpctlError, match="a label is no class"):
        opened(tmp_path / "a.npz")


def test_captions_that_are_a_pickle_are_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((3, 8, 8), np.uint8), captions=np.array(["x", 1, None], object))
    with pytest.raises(DpctlError, match="archive cannot be read") as caught:
        opened(tmp_path / "a.npz")
    assert "pickle" in caught.value.got
