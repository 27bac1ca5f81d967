"""A run that was stopped, killed or damaged goes on to the same model; one that does not belong here is refused."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dpctl.finetune import checkpoint, finetune, train
from dpctl.models import load_model
from dpctl.prune import prune
from dpctl.recipe import FinetuneRecipe, PruneRecipe, TrainRecipe

ROOT = Path(__file__).resolve().parents[2]


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- stop and resume ---------------------------------------------------------------------------------------------


def test_a_finetune_stopped_and_resumed_is_never_having_stopped(
    tmp_path: Path, family: Path, tuning: Callable[..., FinetuneRecipe], stopping: Any
) -> None:
    model, recipe = str(family / "pruned"), tuning(steps=5, checkpoint_every=2)
    whole = finetune(model, tmp_path / "whole", recipe)
    for steps in (3, 2):
        with stopping(steps) as bar:
            finetune(model, tmp_path / "cut", recipe, resume=True, bar=bar)
    assert listed(tmp_path) == ["cut.checkpoints", "whole"]
    cut = finetune(model, tmp_path / "cut", recipe, resume=True)
    assert listed(tmp_path) == ["cut", "whole"]
    assert cut.files == whole.files  # weights, losses, everything
    assert cut.digest == whole.digest


def start_training(recipe: TrainRecipe, out: Path) -> subprocess.Popen:
    options = [f"--{name.replace('_', '-')}={getattr(recipe, name)}" for name in ("config", "data", "steps")]
    options += [f"--batch-size={recipe.batch_size}", f"--checkpoint-every={recipe.checkpoint_every}"]
    command = [sys.executable, "-m", "dpctl", "train", f"--out={out}", *options]
    # As many threads as here: another number sums in another order.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(command, cwd=out.parent, env=environment, stdout=subprocess.DEVNULL)


def test_a_killed_process_resumed_is_never_having_been_killed(
    tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any
) -> None:
    # It is killed long before the end: by itself it would go on for minutes.
    recipe, folder = training(steps=100_000), tmp_path / "out.checkpoints"
    with start_training(recipe, tmp_path / "out") as process:
        while process.poll() is None and len(list(folder.glob("step-*"))) < 2:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert listed(tmp_path) == ["out.checkpoints"]

    # Some steps more, resumed, against a run in one piece up to there.
    found = checkpoint.newest(folder)
    assert found is not None
    for name in ("out", "whole"):
        more = 3 if name == "out" else found.step + 3
        with stopping(more) as bar:
            train(tmp_path / name, recipe, resume=name == "out", bar=bar)
    resumed, whole = (checkpoint.newest(tmp_path / f"{name}.checkpoints") for name in ("out", "whole"))
    assert resumed is not None
    assert whole is not None
    assert resumed.step == whole.step == found.step + 3
    assert resumed.losses == whole.losses
    assert resumed.tensors.keys() == whole.tensors.keys()
    assert all(torch.equal(resumed.tensors[name], tensor) for name, tensor in whole.tensors.items())


def test_a_damaged_newest_checkpoint_costs_only_its_steps(
    tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any
) -> None:
    recipe = training(steps=5)
    whole = train(tmp_path / "whole", recipe)
    with stopping(4) as bar:
        train(tmp_path / "cut", recipe, bar=bar)
    newest = max((tmp_path / "cut.checkpoints").iterdir())
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert train(tmp_path / "cut", recipe, resume=True).files == whole.files


def test_resume_without_checkpoints_begins_at_the_beginning(
    tmp_path: Path, training: Callable[..., TrainRecipe]
) -> None:
    assert train(tmp_path / "one", training(), resume=True).files == train(tmp_path / "two", training()).files


# --- what does not belong here ----------------------------------------------------------------------------------


def stop(out: Path, recipe: TrainRecipe, stopping: Any) -> Path:
    """Stop a run after two steps and return its checkpoints."""
    with stopping(2) as bar:
        train(out, recipe, bar=bar)
    return checkpoint.folder_for(out)


def test_checkpoints_of_another_recipe_are_refused_by_the_entry(
    tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any, refused: Any
) -> None:
    folder = stop(tmp_path / "out", training(), stopping)
    for changed, text in (({"seed": 3}, "seed was 0, now 3"), ({"learning_rate": 0.5}, "learning_rate was 0.001")):
        with refused("another recipe", got=text, todo="--force"):
            train(tmp_path / "out", training(**changed), resume=True)
    assert len(listed(folder)) == 2


def test_checkpoints_of_another_model_are_refused(
    tmp_path: Path, family: Path, own_family: Path, tuning: Callable[..., FinetuneRecipe], stopping: Any, refused: Any
) -> None:
    recipe = tuning(distillation=0.0)
    with stopping(2) as bar:
        finetune(str(family / "pruned"), tmp_path / "out", recipe, bar=bar)
    other = load_model(own_family / "teacher").unet
    with torch.no_grad():
        other.conv_in.bias.add_(1.0)
    other.save_pretrained(own_family / "teacher" / "unet")
    prune(str(own_family / "teacher"), own_family / "other", PruneRecipe("magnitude", target_macs=0.6))
    with refused("another model", todo="--force"):
        finetune(str(own_family / "other"), tmp_path / "out", recipe, resume=True)
    assert finetune(str(own_family / "other"), tmp_path / "out", recipe, force=True).kind == "finetuned"


def test_an_unfinished_run_is_neither_lost_nor_taken_up_unasked(
    tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any, refused: Any
) -> None:
    folder = stop(tmp_path / "out", training(), stopping)
    with refused("unfinished run", got=str(folder), todo="--resume"):
        train(tmp_path / "out", training())
    # A mistake beside --force does not cost it either.
    with refused("no such data"):
        train(tmp_path / "out", training(data="missing"), force=True)
    assert len(listed(folder)) == 2
    assert train(tmp_path / "out", training(), force=True).files == train(tmp_path / "two", training()).files
    assert listed(tmp_path) == ["out", "two"]


def test_begun_again_by_force_it_goes_on_from_its_own_checkpoints(
    tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any
) -> None:
    stop(tmp_path / "out", training(), stopping)
    with stopping(2) as bar:
        train(tmp_path / "out", training(seed=5), force=True, bar=bar)
    assert listed(tmp_path / "out.checkpoints") == ["step-00000001.safetensors", "step-00000002.safetensors"]
    with stopping(1) as bar:
        train(tmp_path / "out", training(seed=6), force=True, bar=bar)
    found = checkpoint.newest(tmp_path / "out.checkpoints")
    assert found is not None
    assert (found.step, found.recipe["seed"]) == (1, 6)
    assert (
        train(tmp_path / "out", training(seed=6), resume=True).files == train(tmp_path / "two", training(seed=6)).files
    )


def test_only_checkpoints_are_removed(tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any) -> None:
    folder = stop(tmp_path / "out", training(), stopping)
    (folder / "notes.txt").write_text("mine")
    train(tmp_path / "out", training(), resume=True)
    assert listed(folder) == ["notes.txt"]
