"""What cannot be used is refused by prune, finetune and train alike: exit 1, three parts, nothing half-written."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dpctl import artifact, cli
from dpctl.prune import prune
from dpctl.recipe import PruneRecipe

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
COMMANDS = ("prune", "finetune", "train")
Refuse = Callable[..., str]


def command(name: str, *, model: object, data: object, out: object = "out", more: tuple = ()) -> list[str]:
    """Return the arguments of a short run."""
    loop = ["--steps", "2", "--batch-size", "2", "--checkpoint-every", "1"]
    parts = {
        "prune": ["prune", model, "--ratio", "0.3", "--images", "2", "--timesteps", "2"],
        "finetune": ["finetune", model, "--distillation", "0", *loop],
        "train": ["train", "--config", model, *loop],
    }[name]
    return [str(part) for part in (*parts, "--data", data, "--out", out, *more)]


def contents(folder: Path) -> dict[str, str]:
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*")}
    return {name: artifact.hash_file(path) if path.is_file() else "" for name, path in files.items()}


@pytest.fixture
def refuse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Refuse:
    """Return what runs a command below `tmp_path`, expects a refusal and returns its text."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        before = contents(tmp_path)
        monkeypatch.setattr(sys, "argv", ["dpctl", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capfd.readouterr()
        assert ended.value.code == 1, err
        assert out == ""
        assert "Traceback" not in err
        said = re.search(r"^error: (\S.*)\n  got: (\S.*)\n  do:  (\S.*)\n\Z", err, re.MULTILINE)
        assert said, err
        assert contents(tmp_path) == before
        return said[0]

    return run


@pytest.fixture
def model(toy_pipeline: Path, tmp_path: Path) -> Path:
    """A pipeline of the test's own."""
    shutil.copytree(toy_pipeline, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def _pruned(toy_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("refusals") / "pruned"
    prune(str(toy_pipeline), directory, PruneRecipe("magnitude", target_macs=0.6))
    return directory


@pytest.fixture
def pruned(_pruned: Path, tmp_path: Path) -> Path:
    """An artifact of the test's own."""
    shutil.copytree(_pruned, tmp_path / "pruned")
    return tmp_path / "pruned"


# --- the model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("path", ["missing", "deep/er/missing", "no-such-owner/no-such-model", "", "a\0b"])
def test_a_missing_model(refuse: Refuse, toy_images: Path, name: str, path: str) -> None:
    refuse(*command(name, model=path, data=toy_images))


def empty(model: Path) -> None:
    shutil.rmtree(model)
    model.mkdir()


def a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_bytes(b"\x80\x04cos\nsystem\n")


def no_network(model: Path) -> None:
    shutil.rmtree(model / "unet")


def text(file: str, content: str | bytes) -> Callable[[Path], None]:
    def write(model: Path) -> None:
        (model / file).write_bytes(content if isinstance(content, bytes) else content.encode())

    write.__name__ = f"{file} is {content[:20]!r}"
    return write


def another_class(model: Path) -> None:
    config = json.loads((model / "unet" / "config.json").read_text())
    (model / "unet" / "config.json").write_text(json.dumps(config | {"_class_name": "UNet3DConditionModel"}))


UNUSABLE = [
    empty,
    a_file,
    no_network,
    another_class,
    text("unet/config.json", "no JSON"),
    text("unet/config.json", "[1, 2]"),
    text("unet/config.json", '{"a": 1}'),
    text("unet/config.json", b"\xff\xfe"),
]


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("spoil", UNUSABLE, ids=lambda spoil: spoil.__name__)
def test_a_directory_that_is_no_model(
    refuse: Refuse, model: Path, toy_images: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(model)
    refuse(*command(name, model=model, data=toy_images))


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def headless(path: Path) -> None:
    path.write_bytes(path.read_bytes()[100:])


def garbled(path: Path) -> None:
    path.write_bytes(b"\x80\x04cos\nsystem\n" * 1000)


def void(path: Path) -> None:
    path.write_bytes(b"")


def one_tensor_missing(path: Path) -> None:
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)


def one_tensor_more(path: Path) -> None:
    save_file(load_file(path) | {"extra": torch.zeros(1)}, path)


def one_tensor_reshaped(path: Path) -> None:
    save_file(load_file(path) | {"conv_in.bias": torch.zeros(5)}, path)


@pytest.mark.parametrize("name", ["prune", "finetune"])
@pytest.mark.parametrize(
    "spoil", [truncated, headless, garbled, void, one_tensor_missing, one_tensor_more, one_tensor_reshaped]
)
def test_weights_that_are_damaged(
    refuse: Refuse, model: Path, toy_images: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(model / WEIGHTS)
    said = refuse(*command(name, model=model, data=toy_images))
    assert "weights cannot be loaded" in said
    assert str(model) in said


@pytest.mark.parametrize("name", ["prune", "finetune"])
def test_a_pickle_is_never_read(refuse: Refuse, model: Path, toy_images: Path, tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "opened",))

    (model / WEIGHTS).unlink()
    for file in ("diffusion_pytorch_model.bin", "pytorch_model.bin", "model.pt"):
        torch.save({"conv_in.weight": Trap()}, model / "unet" / file)  # noqa: TID251 (what we must not read)
    assert "pickles are never read" in refuse(*command(name, model=model, data=toy_images))
    assert not (tmp_path / "opened").exists()


def flipped(directory: Path) -> None:
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (directory / WEIGHTS).write_bytes(content)


def file_gone(directory: Path) -> None:
    (directory / "scheduler" / "scheduler_config.json").unlink()


@pytest.mark.parametrize("name", ["prune", "finetune"])
@pytest.mark.parametrize(
    "spoil",
    [
        flipped,
        file_gone,
        text("dpctl.json", "no JSON"),
        text("dpctl.json", b"\xff"),
        text("dpctl.json", "{}"),
        text("dpctl.json", '{"format_version": 99}'),
        text("unet/kept.safetensors", "other"),
    ],
    ids=lambda spoil: spoil.__name__,
)
def test_a_manifest_that_does_not_match(
    refuse: Refuse, pruned: Path, toy_images: Path, name: str, spoil: Callable[[Path], None]
) -> None:
    spoil(pruned)
    assert str(pruned) in refuse(*command(name, model=pruned, data=toy_images))


def test_code_in_a_model_is_not_run(model: Path, toy_images: Path, tmp_path: Path, refuse: Refuse) -> None:
    code = f"import pathlib; pathlib.Path({str(tmp_path / 'ran')!r}).touch()"
    for file in ("unet/pruned_unet.py", "pipeline.py", "unet/modeling.py"):
        (model / file).write_text(code)
    config = json.loads((model / "unet" / "config.json").read_text())
    config |= {"_class_name": "Evil", "auto_map": {"AutoModel": "pruned_unet.Evil"}}
    (model / "unet" / "config.json").write_text(json.dumps(config))
    assert "not supported" in refuse(*command("finetune", model=model, data=toy_images))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["prune", "finetune"])
@pytest.mark.parametrize("content", ["no JSON", '{"_class_name": "os"}', '{"_class_name": "UNet2DModel"}', "[]"])
def test_a_scheduler_that_is_none(refuse: Refuse, model: Path, toy_images: Path, name: str, content: str) -> None:
    (model / "scheduler" / "scheduler_config.json").write_text(content)
    assert "scheduler" in refuse(*command(name, model=model, data=toy_images))


# --- the data ----------------------------------------------------------------------------------------------------


def no_folder(path: Path) -> None:
    pass


def empty_folder(path: Path) -> None:
    path.mkdir()


def no_images(path: Path) -> None:
    path.mkdir()
    (path / "labels.csv").write_text("a,b")


def a_broken_image(path: Path) -> None:
    path.mkdir()
    Image.new("L", (8, 8)).save(path / "good.png")
    (path / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(20))


def truncated_images(path: Path) -> None:
    path.mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path / "a.jpg")
    (path / "a.jpg").write_bytes((path / "a.jpg").read_bytes()[:1000])


def no_archive(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04 nothing")


def too_large(path: Path) -> None:
    np.savez(path, images=np.zeros((4, 9, 9), np.uint8))


def objects(path: Path) -> None:
    np.savez(path, images=np.array([{}] * 4, dtype=object))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize(
    ("make", "file"),
    [
        *((make, "data") for make in (no_folder, empty_folder, no_images, a_broken_image, truncated_images)),
        *((make, "data.npz") for make in (no_folder, no_archive, too_large, objects)),
    ],
)
def test_data_that_is_none(
    refuse: Refuse, model: Path, tmp_path: Path, name: str, make: Callable[[Path], None], file: str
) -> None:
    make(tmp_path / file)
    refuse(*command(name, model=model, data=tmp_path / file))


# --- the options -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--ratio", "--target-macs", "--target-params"])
@pytest.mark.parametrize("value", ["0", "1", "-0.5", "1.5", "nan", "inf"])
def test_a_fraction_outside_0_and_1(refuse: Refuse, option: str, value: str) -> None:
    assert option in refuse("prune", "model", "--out", "out", option, value)


@pytest.mark.parametrize("more", [[], ["--ratio", "0.3", "--target-macs", "0.5"]])
def test_not_exactly_one_target(refuse: Refuse, more: list[str]) -> None:
    assert "exactly one target" in refuse("prune", "model", "--out", "out", *more)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["prune", "--ratio", "0.3", "--criterion", "magnitud"], "did you mean magnitude"),
        (["prune", "--ratio", "0.3", "--reduction", "max"], "unknown reduction"),
        (["prune", "--ratio", "0.3", "--align", "0"], "count is below 1"),
        (["prune", "--ratio", "0.3", "--threshold", "1"], "--threshold"),
        (["prune", "--ratio", "0.3", "--threshold", "nan"], "--threshold"),
        (["prune", "--ratio", "0.3", "--keep", ""], "empty pattern"),
        (["prune", "--ratio", "0.3", "--only", " , "], "empty pattern"),
        (["prune", "--ratio", "0.3", "--floor", "0.5"], "--scope global"),
        (["prune", "--ratio", "0.3", "--criterion", "taylor", "--threshold", "0.5"], "would not be read"),
        (["finetune", "--steps", "0"], "count is below 1"),
        (["finetune", "--distillation", "-1"], "distillation"),
        (["finetune", "--learning-rate", "nan"], "learning rate"),
        (["finetune", "--mixed-precision", "int4"], "mixed precision"),
    ],
)
def test_an_option_that_makes_no_sense(refuse: Refuse, options: list[str], said: str) -> None:
    assert said in refuse(options[0], "model", "--out", "out", *options[1:])


def test_a_finetune_of_a_model_whose_teacher_is_not_known(refuse: Refuse, model: Path, toy_images: Path) -> None:
    said = refuse(*command("finetune", model=model, data=toy_images, more=("--distillation", "1")))
    assert "--distillation 0" in said


# --- the output --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_an_output_that_exists(refuse: Refuse, model: Path, toy_images: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out").mkdir()
    assert "--force" in refuse(*command(name, model=model, data=toy_images))
    (tmp_path / "out" / "mine").touch()
    assert "--force" in refuse(*command(name, model=model, data=toy_images))


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("out", ["file", "file/out", ".", "..", "x" * 300])
def test_an_output_that_cannot_be(
    refuse: Refuse, model: Path, toy_images: Path, tmp_path: Path, name: str, out: str
) -> None:
    (tmp_path / "file").write_text("mine")
    refuse(*command(name, model=model, data=toy_images, out=out, more=("--force",)))


@pytest.mark.parametrize("name", ["finetune", "train"])
def test_checkpoints_that_cannot_be(refuse: Refuse, model: Path, toy_images: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "out.checkpoints").write_text("mine")
    refuse(*command(name, model=model, data=toy_images))
    refuse(*command(name, model=model, data=toy_images, more=("--force",)))
    refuse(*command(name, model=model, data=toy_images, more=("--resume",)))


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory on a file system of 256 kB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    try:
        call = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mounted)]
        done = subprocess.run(call, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("every", ["1", "10"])
def test_a_full_disk(refuse: Refuse, model: Path, toy_images: Path, full_disk: Path, name: str, every: str) -> None:
    more = () if name == "prune" else ("--checkpoint-every", every)
    said = refuse(*command(name, model=model, data=toy_images, out=full_disk / "out", more=more))
    assert "no space left" in said
