"""`dpctl export --trt` as it is typed: what is built, what is said of it, and which options are refused."""

import json
import resource
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from dpctl import artifact
from dpctl.errors import DpctlError
from dpctl.recipe import ChainRecipe, EngineRecipe, ExportRecipe, from_dict, read_recipe, to_dict
from runtime import engine as engines

Run = Callable[..., tuple[int, str, str]]


def test_an_engine_is_added_to_an_exported_directory(dpctl: Run, plain_exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = ("--trt-flavor", "rtx", "--compute-capability", "8.9", "--compute-capability", "8.6,12.0")
    out = tmp_path / "out"
    code, said, progress = dpctl("export", plain_exported, "--out", out, "--trt", *options, "--json")
    assert (code, "TensorRT-RTX" in progress) == (0, True)
    document = json.loads(said)
    assert document["recipe"]["engine"]["compute_capability"] == ["8.9", "8.6", "12.0"]
    (name,) = document["stats"]["engines"]
    assert (out / "unet" / name).is_file()
    assert name == "model.fp32.rtx-sm86+sm89+sm120.engine"
    code, said, _ = dpctl("inspect", out)
    assert code == 0
    assert name in said.replace("\n", "")


def test_a_model_is_exported_with_its_engine(dpctl: Run, toy_pipeline: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = ("--batch", "1,2,4", "--trt", "--trt-flavor", "rtx", "--compute-capability", "8.9")
    code, said, error = dpctl("export", toy_pipeline, "--out", tmp_path / "out", *options)
    assert code == 0, error
    assert "parity passed" in said
    manifest = artifact.read_manifest(tmp_path / "out")
    assert manifest is not None
    artifact.verify_files(tmp_path / "out", manifest)
    assert set(manifest.stats["engines"]) == {"model.fp32.rtx-sm89.engine"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--trt-flavor", "rtx"), "flavor"),
        (("--compute-capability", "8.9"), "compute capability"),
        (("--workspace", "2"), "workspace"),
        (("--optimization-level", "1"), "optimization level"),
        (("--version-compatible",), "version compatible"),
        (("--hardware-compatible",), "hardware compatible"),
        (("--refit", "--no-trt"), "refit"),
        (("--tf32",), "tf32"),
    ],
)
def test_options_of_an_engine_without_one_are_refused(
    dpctl: Run, toy_pipeline: Path, tmp_path: Path, options: tuple[str, ...], words: str
) -> None:
    code, said, error = dpctl("export", toy_pipeline, "--out", tmp_path / "out", *options)
    assert (code, said) == (1, "")
    assert f"none is to be built\n  got: {words}" in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("options", [("--precision", "fp32"), ("--batch", "1,2,4"), ("--keep-failed",)])
def test_options_of_the_graph_are_refused_where_it_is_made_already(
    dpctl: Run, plain_exported: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    code, _, error = dpctl("export", plain_exported, "--out", tmp_path / "out", "--trt", *options)
    assert code == 1
    assert f"{options[0]} for" in error
    assert "exported already" in error


def test_a_model_that_is_no_unet_is_refused(dpctl: Run, toy_pipeline: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(toy_pipeline, tmp_path / "vae")
    (directory / "unet" / "config.json").write_text('{"_class_name": "AutoencoderKL"}')
    code, said, error = dpctl("export", directory, "--out", tmp_path / "out")
    assert (code, said) == (1, "")
    assert "not supported yet\n  got: AutoencoderKL" in error
    assert [path.name for path in tmp_path.iterdir()] == ["vae"]


def test_a_refusal_comes_before_any_work(dpctl: Run, toy_pipeline: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    options = ("--trt", "--trt-flavor", "rtx", "--compute-capability", "9.0")
    code, _, error = dpctl("export", toy_pipeline, "--out", tmp_path / "out", *options)
    assert code == 1
    assert "choose from: 7.5, 8.0" in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["changed", "gone", "no manifest"])
def test_the_command_that_a_refusal_names_builds_a_damaged_engine_again(
    dpctl: Run, plain_exported: Path, tmp_path: Path, damage: str
) -> None:
    pytest.importorskip("tensorrt_rtx")
    directory = tmp_path / "out"
    options = ("--trt", "--trt-flavor", "rtx", "--compute-capability", "8.9,12.0", "--tf32")
    assert dpctl("export", plain_exported, "--out", directory, *options)[0] == 0
    engine = directory / "unet" / "model.tf32.rtx-sm89+sm120.engine"
    if damage == "no manifest":
        engines.sidecar(engine).unlink()
        with pytest.raises(DpctlError) as caught:
            engines.read(engine)
    else:
        about = engines.read(engine)
        engine.write_bytes(b"changed")
        with pytest.raises(DpctlError) as caught:
            engines.check_files(engine, about)
    if damage == "gone":
        engine.unlink()
    program, *arguments = shlex.split(caught.value.todo.partition(": ")[2])
    code, _, error = dpctl(*arguments)
    assert (program, code) == ("dpctl", 0), error
    manifest = artifact.read_manifest(directory)
    assert manifest is not None
    artifact.verify_files(directory, manifest)
    engines.check_files(engine, engines.read(engine))
    assert [path.name for path in directory.rglob("*.engine")] == [engine.name]


def test_an_empty_compute_capability_does_not_stand_for_every_gpu(
    dpctl: Run, toy_pipeline: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tensorrt_rtx")
    code, _, error = dpctl("export", toy_pipeline, "--out", tmp_path / "out", "--trt", "--compute-capability", "")
    assert code == 1
    assert "an empty one" in error


@pytest.mark.parametrize("share", [0.5, 1.5], ids=["the copy of the graph", "the engine"])
def test_a_file_that_does_not_fit_ends_the_build_and_leaves_nothing(
    dpctl: Run, plain_exported: Path, tmp_path: Path, share: float
) -> None:
    """The system itself refuses to write on, at a limit of the process in the place of a small disk."""
    pytest.importorskip("tensorrt_rtx")
    size = (plain_exported / "unet" / "model.fp32.onnx").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), hard))
        options = ("--trt", "--trt-flavor", "rtx", "--compute-capability", "8.9")
        code, said, error = dpctl("export", plain_exported, "--out", tmp_path / "out", *options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (code, said) == (1, "")
    assert "a file cannot be read or written" in error
    assert "File too large" in error
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_directory_is_not_exported_from(dpctl: Run, plain_exported: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(plain_exported, tmp_path / "here")
    (directory / "unet" / "model.fp32.onnx").write_bytes(b"")
    code, _, error = dpctl("export", directory, "--out", directory, "--force", "--trt", "--trt-flavor", "rtx")
    assert code == 1
    assert "differs from its digest" in error


def test_the_table_of_an_engine_maps_onto_its_recipe(tmp_path: Path) -> None:
    text = '[export]\nbatch = [1, 2, 4]\n[export.engine]\nflavor = "rtx"\ncompute_capability = ["8.9"]\n'
    text += "workspace_gib = 2\n"
    (tmp_path / "r.toml").write_text(text)
    engine = EngineRecipe(flavor="rtx", compute_capability=("8.9",), workspace_gib=2.0)
    recipe = read_recipe(tmp_path / "r.toml", ChainRecipe)
    assert recipe.export == ExportRecipe(batch=(1, 2, 4), engine=engine)
    assert from_dict(ChainRecipe, to_dict(recipe), "r") == recipe
    (tmp_path / "r.toml").write_text("[export]\nbatch = [1, 2, 4]\n")
    assert read_recipe(tmp_path / "r.toml", ChainRecipe).export.engine is None
    (tmp_path / "r.toml").write_text("[export.engine]\n")
    assert read_recipe(tmp_path / "r.toml", ChainRecipe).export.engine == EngineRecipe()
