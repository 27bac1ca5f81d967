"""Exported directories whose files were changed, with digests that fit: an error that names the entry, no traceback."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpctl import artifact
from dpctl.errors import DpctlError
from dpctl.recipe import ExportRecipe
from dpctl.signature import of_unet
from export import export_model, verify_directory
from export import golden as golden_file

Run = Callable[..., tuple[int, str, str]]
Change = Callable[[dict[str, Any]], Any]


@pytest.fixture
def copied(plain_exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_exported, tmp_path / "copied"))


@pytest.fixture(scope="module")
def half(plain: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in float16. Shared: copy it before changing a file."""
    out = tmp_path_factory.mktemp("half") / "exported"
    export_model(plain, out, ExportRecipe(precision="fp16", batch=(1, 2, 4)))
    return out


def rewrite(directory: Path, change: Change = lambda values: None) -> None:
    """Change the manifest, and make it fit the files as they are."""
    path = directory / artifact.MANIFEST
    values = json.loads(path.read_text()) | {"files": artifact.hash_files(directory)}
    change(values)
    path.write_text(json.dumps(values))


def put(*keys: str, value: Any) -> Change:
    """Return what sets an entry of nested tables, or removes it where the value is Ellipsis."""

    def change(values: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values.setdefault(key, {})
        values[keys[-1]] = value
        if value is ...:
            del values[keys[-1]]

    return change


def arguments(command: str, directory: Path, out: Path) -> list[Any]:
    return {
        "verify": ["verify", directory],
        "sample": ["sample", directory, "--out", out, "--count", 1, "--num-inference-steps", 1],
        "export": ["export", directory, "--out", out, "--trt", "--trt-flavor", "rtx", "--compute-capability", "8.9"],
        "inspect": ["inspect", directory],
    }[command]


EVERY = ("verify", "sample", "export", "inspect")
ENGINE = {"precision": "fp32", "targets": ["8.9"], "size_bytes": 1, "weights_bytes": None, "activation_bytes": 1}
WRONG: list[tuple[Change, str, tuple[str, ...]]] = [
    (put("parity", value=[]), "parity", EVERY),
    (put("parity", "verdict", value="fine"), "verdict is 'fine'", EVERY),
    (put("parity", "checks", value=[]), r"checks is \[\]", EVERY),
    (put("parity", "checks", "grid", value=1), "grid is 1", EVERY),
    (put("parity", "checks", "grid", "verdict", value=...), "grid: verdict is None", EVERY),
    (put("parity", "checks", "grid", "allowed", value=...), "grid: no allowed", EVERY),
    (put("parity", "checks", "grid", "error", value="1"), "error is '1'", EVERY),
    (put("parity", "checks", "sampling", "steps", value=...), "sampling: no steps", EVERY),
    (put("parity", "checks", "device", "reason", value=1), "reason is 1", EVERY),
    (put("parity", "components", value={"vae": {"verdict": "passed", "worst": []}}), r"worst is \[\]", EVERY),
    (put("parity", "worst", value=[]), r"worst is \[\]", EVERY),
    (put("parity", "worst", "timestep", value="0"), "timestep is '0'", EVERY),
    (put("parity", "worst", "finite", value=1), "finite is 1", EVERY),
    (put("parity", "timesteps", value={}), r"timesteps is \{\}", EVERY),
    (put("parity", "precision", value=16), "precision is 16", EVERY),
    (put("parity", "precision", value="fp16"), "not of the precision", ("verify", "export")),
    (put("parity", "yardstick", value=[]), r"yardstick is \[\]", EVERY),
    (put("parity", "yardstick", value={"relative_l2": [1.0] * 9}), "not of these golden outputs", ("verify",)),
    (put("recipe", "precision", value=...), "not of the precision", ("verify", "export")),
    (put("recipe", "precision", value=["fp32"]), "precision is", EVERY),
    (put("recipe", "batch", value="1,2,4"), "batch is '1,2,4'", EVERY),
    (put("signature", value="none"), "signature", EVERY),
    (put("signature", "inputs", value=...), "inputs", EVERY),
    (put("signature", "inputs", value=[{"name": "x", "dtype": "float32", "shape": ["batch"]}]), "inputs", EVERY),
    (put("signature", "outputs", value=[{"name": "y", "dtype": "float32", "shape": ["batch"]}]), "output is y", EVERY),
    (put("signature", "batch", value=[1, 2]), "signature|not enough", EVERY),
    (put("stats", "engines", value=[]), r"engines is \[\]", EVERY),
    (put("stats", "engines", value={"e": ENGINE | {"build_s": "1"}}), "build_s is '1'", EVERY),
    (put("stats", "engines", value={"e": ENGINE}), "build_s is None", EVERY),
    (put("stats", "engines", value={"e": ENGINE | {"build_s": 1.0, "targets": [8.9]}}), r"targets are \[8.9\]", EVERY),
    (put("stats", "precision", value={"not_lowered": []}), r"not_lowered is \[\]", EVERY),
]


@pytest.mark.parametrize(("change", "words", "commands"), WRONG)
def test_a_manifest_with_values_that_are_none_is_an_error_in_three_parts(
    dpctl: Run, copied: Path, tmp_path: Path, change: Change, words: str, commands: tuple[str, ...]
) -> None:
    if "export" in commands:
        pytest.importorskip("tensorrt_rtx")
    rewrite(copied, change)
    for command in commands:
        code, said, error = dpctl(*arguments(command, copied, tmp_path / "out"))
        assert (command, code, said) == (command, 1, "")
        assert "\n  got: " in error
        assert "\n  do:  " in error
        assert re.search(words, error)
        assert not (tmp_path / "out").exists()


def test_what_was_not_changed_passes_all_of_them(dpctl: Run, copied: Path, tmp_path: Path) -> None:
    rewrite(copied)
    for command in ("verify", "sample", "inspect"):
        code, _, error = dpctl(*arguments(command, copied, tmp_path / "out"))
        assert code == 0, error


@pytest.mark.parametrize(
    "value",
    [
        pytest.param(..., id="none"),
        pytest.param({"relative_l2": [1e-3]}, id="shorter than the grid"),
        pytest.param({"relative_l2": [1e-3] * 9, "other_size_relative_l2": [1e-3]}, id="of another size"),
        pytest.param({"relative_l2": ["1e-3"] * 9}, id="texts"),
        pytest.param({"relative_l2": [-1.0] * 9}, id="below 0"),
        pytest.param({"relative_l2": [float("inf")] * 9}, id="not finite"),
        pytest.param({"relative_l2": 1e-3}, id="no list"),
        pytest.param({}, id="empty"),
    ],
)
def test_a_yardstick_that_is_not_of_the_golden_rows_is_refused(half: Path, tmp_path: Path, value: Any) -> None:
    copied = Path(shutil.copytree(half, tmp_path / "copied"))
    rewrite(copied, put("parity", "yardstick", value=value))
    with pytest.raises(DpctlError, match="of these golden outputs|cannot be read") as caught:
        verify_directory(copied)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("sample", lambda value: value.double(), "float64"),
        ("timestep", lambda value: value.long(), "int64"),
        ("out_sample", lambda value: value.half(), "float16"),
        ("timestep", lambda value: value[0], r"float32 \[\]"),
        ("sample", lambda value: value[:, 0], r"\[9, 8, 8\]"),
        ("out_sample", lambda value: value[1:], r"\[8, 1, 8, 8\]"),
        ("out_sample", lambda value: value.index_fill(0, torch.tensor([3]), float("nan")), "not finite.*out_sample"),
        ("sampling/samples", lambda value: value.double(), "samples torch.float64"),
        ("sampling/samples", lambda value: value * float("inf"), "not finite.*samples"),
    ],
)
def test_golden_outputs_of_another_type_shape_or_none_are_refused(
    dpctl: Run, copied: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    path = copied / golden_file.GOLDEN
    tensors = load_file(path)
    save_file(tensors | {name: change(tensors[name]).contiguous()}, path)
    rewrite(copied)
    code, said, error = dpctl("verify", copied)
    assert (code, said) == (1, "")
    assert re.search(rf"(?s){words}.*\n  do:  ", error)


def test_labels_of_no_class_are_refused(dpctl: Run, pruned_exported: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(pruned_exported, tmp_path / "copied"))
    tensors = load_file(copied / golden_file.GOLDEN)
    save_file(tensors | {"class_labels": tensors["class_labels"] + 1}, copied / golden_file.GOLDEN)
    rewrite(copied)
    code, said, error = dpctl("verify", copied)
    assert (code, said) == (1, "")
    assert "class_labels from 1 to 3, and 3 classes\n  do:  " in error


def test_rows_of_a_size_that_is_fixed_are_refused(copied: Path) -> None:
    path = copied / golden_file.GOLDEN
    save_file(load_file(path) | {"size/sample": torch.zeros(1, 1, 16, 16)}, path)
    rewrite(copied)
    with pytest.raises(DpctlError, match="not those of the signature"):
        verify_directory(copied)


def test_the_two_sides_of_guidance_are_of_as_many_rows() -> None:
    config = {"in_channels": 1, "out_channels": 1, "sample_size": 8, "cross_attention_dim": 4}
    signature = of_unet({"_class_name": "UNet2DConditionModel", **config})

    def rows(count: int) -> dict[str, torch.Tensor]:
        return {t.name: torch.zeros(t.at(count)) for t in (*signature.inputs, *signature.outputs)}

    assert golden_file.fits(signature, rows(4))
    assert not golden_file.fits(signature, rows(3))
