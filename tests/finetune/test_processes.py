"""Several processes, or one in several parts, make the training of one."""

import dataclasses
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file

from dpctl.errors import DpctlError
from dpctl.finetune import checkpoint, finetune, train
from dpctl.finetune.processes import open_accelerator
from dpctl.recipe import FinetuneRecipe, LoopRecipe, TrainRecipe

ROOT = Path(__file__).parents[2]


def launch(*arguments: object, processes: int = 2, run: Sequence[object] = ("-m", "dpctl")) -> list[str]:
    """Return the command that really starts several processes on a CPU (`accelerate launch --cpu` starts one)."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [*torchrun, "--no-python", sys.executable, *map(str, run), *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def options(recipe: LoopRecipe, *names: str) -> list[str]:
    return [f"--{name.replace('_', '-')}={getattr(recipe, name)}" for name in names]


def losses(directory: Path) -> list[float]:
    found: list[float] = json.loads((directory / "losses.json").read_text())
    return found


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")


def close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("accumulation", [2, 3])
def test_a_batch_in_parts_is_the_batch(
    tmp_path: Path, family: Path, tuning: Callable[..., FinetuneRecipe], accumulation: int
) -> None:
    for name, parts in (("whole", 1), ("parts", accumulation)):
        recipe = tuning(steps=4, batch_size=8, accumulation=parts, validation=8, validate_every=2)
        finetune(str(family / "pruned"), tmp_path / name, recipe)
    assert losses(tmp_path / "parts") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    close(weights(tmp_path / "parts"), weights(tmp_path / "whole"))


class Divided(NamedTuple):
    """A finetuning that two processes made: what was asked for, where it lies, and what they said."""

    recipe: FinetuneRecipe
    asked: list[str]
    out: Path
    said: str
    told: str


@pytest.fixture(scope="module")
def divided(family: Path, toy_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Divided:
    recipe = FinetuneRecipe(data=str(toy_images), steps=5, batch_size=6, warmup_steps=1, checkpoint_every=1,
                            validation=8, validate_every=2, timestep_sampling="antithetic")  # fmt: skip
    asked = options(recipe, "data", "steps", "batch_size", "learning_rate", "warmup_steps", "ema_decay", "validation",
                    "validate_every", "timestep_sampling", "checkpoint_every")  # fmt: skip
    out = tmp_path_factory.mktemp("divided") / "two"
    command = launch("finetune", family / "pruned", "--out", out, *asked, "--json")
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Divided(recipe, asked, out, done.stdout, done.stderr)


def test_two_processes_train_as_one(tmp_path: Path, family: Path, divided: Divided) -> None:
    finetune(str(family / "pruned"), tmp_path / "one", divided.recipe)
    assert json.loads(divided.said)["kind"] == "finetuned"  # one document, from one process
    assert losses(divided.out) == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    close(weights(divided.out), weights(tmp_path / "one"))
    ours, theirs = (json.loads((out / "dpctl.json").read_text())["stats"] for out in (tmp_path / "one", divided.out))
    assert [each["step"] for each in theirs["validated"]] == [2, 4, 5]
    for one, two in zip(ours["validated"], theirs["validated"], strict=True):
        assert two["buckets"] == pytest.approx(one["buckets"], rel=1e-3)
    assert ours["processes"] == 1
    assert theirs["processes"] == 2


def test_what_it_will_take_is_told_once(divided: Divided) -> None:
    told = divided.told.splitlines()
    assert [sum(line.startswith(f"{what}: about ") for line in told) for what in ("memory", "time")] == [1, 1]


# Runs the command, and notes below the folder that is its first argument which process drew for a sheet.
NOTING = """
import os, sys
from pathlib import Path
from dpctl import cli
from dpctl.finetune.sheets import Sheets

notes, row = Path(sys.argv.pop(1)), Sheets._row

def noted(self, unet, step):
    with (notes / os.environ["RANK"]).open("a") as stream:
        stream.write(f"{step} {'teacher' if unet is self.teacher else 'network'}\\n")
    return row(self, unet, step)

Sheets._row = noted
cli.main()
"""


def test_sheets_are_drawn_by_one_process_and_change_nothing(tmp_path: Path, family: Path, divided: Divided) -> None:
    out, notes = tmp_path / "out", tmp_path / "notes"
    notes.mkdir()
    (tmp_path / "noting.py").write_text(NOTING)
    asked = (*divided.asked, "--sample-every", 4)
    command = launch(notes, "finetune", family / "pruned", "--out", out, *asked, run=(tmp_path / "noting.py",))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in notes.iterdir()] == ["0"]
    assert (notes / "0").read_text().splitlines() == ["4 teacher", "4 network", "5 network"]
    assert (out / "progress.png").is_file()
    assert losses(out) == losses(divided.out)
    for name, tensor in weights(out).items():
        assert torch.equal(tensor, weights(divided.out)[name]), name


def test_what_one_process_began_two_go_on_with(
    tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any
) -> None:
    recipe = training(steps=6, batch_size=6, checkpoint_every=1)
    train(tmp_path / "whole", recipe)
    with stopping(3) as bar:
        train(tmp_path / "out", recipe, bar=bar)
    asked = options(recipe, "config", "data", "steps", "batch_size", "checkpoint_every")
    command = launch("train", "--out", tmp_path / "out", *asked, "--resume")
    subprocess.run(command, env=environment(), capture_output=True, check=True)
    assert losses(tmp_path / "out")[:3] == losses(tmp_path / "whole")[:3]
    assert losses(tmp_path / "out") == pytest.approx(losses(tmp_path / "whole"), rel=1e-4)
    close(weights(tmp_path / "out"), weights(tmp_path / "whole"))


@pytest.mark.slow
def test_a_mistake_is_told_once_and_ends_all(tmp_path: Path, training: Callable[..., TrainRecipe]) -> None:
    asked = options(training(), "config", "steps", "batch_size")
    done = subprocess.run(
        launch("train", "--out", tmp_path / "out", *asked, "--data", tmp_path / "missing"),
        env=environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.count("error: no such data") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [["run"], ["prune", "reference", "--ratio", "0.5"], ["export", "reference"]])
def test_what_is_not_divided_refuses_to_be_launched(
    tmp_path: Path, dpctl: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    done = dpctl(*command, "--out", tmp_path / "out")
    assert done.code == 1
    assert "2 processes" in done.err
    assert list(tmp_path.iterdir()) == []


def test_a_batch_too_small_for_its_parts_is_refused() -> None:
    with pytest.raises(DpctlError, match="smaller than its parts"):
        open_accelerator(LoopRecipe(batch_size=3, accumulation=4))


def test_fp16_without_a_gpu_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(DpctlError, match="fp16 needs a GPU"):
        open_accelerator(LoopRecipe(mixed_precision="fp16"))


# --- asked to stop -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 0), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_asked_to_stop_it_leaves_a_checkpoint_and_the_command_to_go_on(
    tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any, number: int, code: int
) -> None:
    # By itself it would go on for minutes, and its next checkpoint would be a long time off.
    recipe, folder = training(steps=100_000, checkpoint_every=40), tmp_path / "out.checkpoints"
    asked = options(recipe, "config", "data", "steps", "batch_size", "checkpoint_every")
    command = [sys.executable, "-m", "dpctl", "train", "--out", str(tmp_path / "out"), *asked]
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as process:
        while process.poll() is None and not list(folder.glob("step-*.safetensors")):
            time.sleep(0.01)
        process.send_signal(number)
        assert process.stderr is not None
        told = process.stderr.read().splitlines()
    assert process.returncode == code
    found = checkpoint.newest(folder)
    assert found is not None
    assert f"stopped after step {found.step} of 100000; go on with" in told[-2]
    assert shlex.split(told[-1]) == ["dpctl", *command[3:], "--resume"]
    assert not (tmp_path / "out").exists()

    with stopping(found.step) as bar:
        train(tmp_path / "whole", dataclasses.replace(recipe, checkpoint_every=found.step), bar=bar)
    whole = checkpoint.newest(tmp_path / "whole.checkpoints")
    assert whole is not None
    assert found.losses == whole.losses
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_two_processes_of_which_one_is_asked_stop_together(
    tmp_path: Path, training: Callable[..., TrainRecipe]
) -> None:
    recipe, folder = training(steps=100_000, checkpoint_every=20), tmp_path / "out.checkpoints"
    asked = options(recipe, "config", "data", "steps", "batch_size", "checkpoint_every")
    command = launch("train", "--out", tmp_path / "out", *asked)
    with subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True) as launcher:
        while launcher.poll() is None and not list(folder.glob("step-*.safetensors")):
            time.sleep(0.01)
        children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
        assert launcher.stderr is not None
        told = launcher.stderr.read()
    assert launcher.returncode == 0, told
    found = checkpoint.newest(folder)
    assert found is not None
    assert told.count(f"stopped after step {found.step} of 100000") == 1
    assert "accelerate launch -m dpctl train" in told
