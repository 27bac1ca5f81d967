"""Checkpoints: one safetensors file each, written whole or not at all; the newest that can be read is taken."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dpctl.errors import DpctlError
from dpctl.finetune import checkpoint
from dpctl.finetune.checkpoint import Checkpoint
from dpctl.recipe import FinetuneRecipe, TrainRecipe, to_dict


def make(step: int) -> Checkpoint:
    tensors = {
        "model.a": torch.full((2, 3), float(step)),
        "ema.a": torch.zeros(2, 3),
        "optimizer.0.step": torch.tensor(1.0),
    }
    return Checkpoint(step, {"seed": 0, "steps": 9}, [0.5] * step, tensors)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "deep" / "folder", make(3))
    found = checkpoint.newest(path.parent)
    assert found is not None
    assert (found.step, found.recipe, found.losses) == (3, {"seed": 0, "steps": 9}, [0.5] * 3)
    assert found.tensors.keys() == make(3).tensors.keys()
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in make(3).tensors.items())
    assert found.part("model").keys() == {"a"}
    assert found.part("optimizer").keys() == {"0.step"}


def test_a_checkpoint_is_safetensors_and_json(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, make(3))
    with safe_open(path, framework="pt") as stream:
        assert json.loads(stream.metadata()["dpctl"])["step"] == 3


def test_the_two_newest_are_kept_and_nothing_else_lies_about(tmp_path: Path) -> None:
    for step in (1, 2, 9, 10, 100):
        checkpoint.save(tmp_path, make(step))
    assert names(tmp_path) == ["step-00000010.safetensors", "step-00000100.safetensors"]
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 100


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) is None
    assert checkpoint.newest(tmp_path / "missing") is None


def test_they_lie_beside_the_output() -> None:
    assert checkpoint.folder_for(Path("runs/small.v2")) == Path("runs/small.v2.checkpoints")


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "zeros": bytes(len(content)),
        "a pickle": b"\x80\x04cos\nsystem\n",
        "another header": content.replace(b"dpctl", b"other"),
        "no JSON inside": content.replace(b'{\\"step', b'[\\"step'),
    }[how]
    assert damaged != content
    path.write_bytes(damaged)


@pytest.mark.parametrize("how", ["truncated", "empty", "zeros", "a pickle", "another header", "no JSON inside"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_older(tmp_path: Path, how: str) -> None:
    checkpoint.save(tmp_path, make(2))
    damage(checkpoint.save(tmp_path, make(4)), how)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 2


def test_where_all_are_damaged_it_says_so(tmp_path: Path) -> None:
    for step in (2, 4):
        damage(checkpoint.save(tmp_path, make(step)), "truncated")
    with pytest.raises(DpctlError, match="no checkpoint can be read") as caught:
        checkpoint.newest(tmp_path)
    assert "step-00000002" in caught.value.got
    assert "step-00000004" in caught.value.got
    assert str(tmp_path) in caught.value.todo


def test_what_a_killed_writer_left_is_no_checkpoint(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, make(2))
    (tmp_path / "step-00000004.writing").write_bytes(path.read_bytes()[:100])
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 2


def test_a_folder_that_is_a_file_is_explained(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a letter")
    with pytest.raises(DpctlError, match="cannot be read or written"):
        checkpoint.save(tmp_path / "file", make(1))
    assert (tmp_path / "file").read_text() == "a letter"


def test_a_failed_write_leaves_the_older_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, make(2))

    def half(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", half)
    with pytest.raises(DpctlError, match="no space left"):
        checkpoint.save(tmp_path, make(4))
    assert names(tmp_path) == ["step-00000002.safetensors"]


@pytest.mark.parametrize(
    ("changed", "entry"),
    [
        ({"seed": 1}, "seed was 0, now 1"),
        ({"min_snr_gamma": 5.0}, "min_snr_gamma was None, now 5.0"),
        ({"data": "teacher", "prompts": "a.txt"}, "data was 'reference', now 'teacher'"),
    ],
)
def test_another_recipe_is_refused_by_the_entry(tmp_path: Path, changed: dict[str, Any], entry: str) -> None:
    saved = to_dict(FinetuneRecipe(steps=9))
    with pytest.raises(DpctlError, match="another recipe") as caught:
        checkpoint.require_same_recipe(saved, FinetuneRecipe(**{"steps": 9} | changed), tmp_path)
    assert entry in caught.value.got
    assert str(tmp_path) in caught.value.got
    checkpoint.require_same_recipe(saved, FinetuneRecipe(steps=9, keep=5), tmp_path)


def test_prompts_count_where_the_teacher_draws_them(tmp_path: Path) -> None:
    saved = to_dict(FinetuneRecipe(sample_every=5, prompts="a.txt"))
    checkpoint.require_same_recipe(saved, FinetuneRecipe(sample_every=2, prompts="b.txt"), tmp_path)
    checkpoint.require_same_recipe(saved, FinetuneRecipe(), tmp_path)
    with pytest.raises(DpctlError, match="another recipe"):
        checkpoint.require_same_recipe(saved | {"data": "teacher"}, FinetuneRecipe(data="teacher"), tmp_path)


def test_what_an_older_version_did_not_write_is_the_default(tmp_path: Path) -> None:
    older = {name: value for name, value in to_dict(TrainRecipe(steps=9)).items() if name != "optimizer"}
    checkpoint.require_same_recipe(older, TrainRecipe(steps=9), tmp_path)
    with pytest.raises(DpctlError, match="another recipe") as caught:
        checkpoint.require_same_recipe(older, TrainRecipe(steps=9, optimizer="adamw-8bit"), tmp_path)
    assert "optimizer was 'adamw', now 'adamw-8bit'" in caught.value.got
    with pytest.raises(DpctlError, match="another recipe") as caught:
        checkpoint.require_same_recipe(older | {"of_a_later_version": 1}, TrainRecipe(steps=9), tmp_path)
    assert "of_a_later_version" in caught.value.got
