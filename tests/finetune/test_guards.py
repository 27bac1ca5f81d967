"""When a training ends before its time: a loss that runs away, no memory, no disk; and what is left then."""

import errno
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dpctl.data import TrainingSet
from dpctl.errors import DpctlError
from dpctl.finetune import checkpoint, guards, loop, train
from dpctl.finetune.loss import Objective
from dpctl.finetune.processes import open_accelerator
from dpctl.recipe import LoopRecipe, TrainRecipe

RECIPE = LoopRecipe(steps=1000, batch_size=64)
WINDOW = guards.STEPS_JUDGED


@pytest.mark.parametrize(
    ("losses", "runs_away"),
    [
        ([1.0] * WINDOW, False),
        ([1.0] * (WINDOW - 1) + [1e9], False),  # too few to judge
        ([1.0] * WINDOW + [4.9] * WINDOW, False),
        ([1.0] * WINDOW + [5.1] * WINDOW, True),
        ([9.0] * WINDOW + [1.0] * WINDOW + [3.0] * WINDOW, False),
        ([9.0] * WINDOW + [1.0] * WINDOW + [9.0] * WINDOW, True),
        ([0.0] * 2 * WINDOW, False),
    ],
)
def test_a_loss_far_above_its_lowest_mean_has_run_away(tmp_path: Path, losses: list[float], runs_away: bool) -> None:
    @contextmanager
    def expected() -> Iterator[None]:
        if not runs_away:
            yield
            return
        with pytest.raises(DpctlError, match="runs away") as caught:
            yield
        assert f"step {len(losses)} of 1000" in caught.value.got
        assert "there is no checkpoint yet" in caught.value.todo

    with expected():
        guards.require_converging(losses, RECIPE, tmp_path)


def test_small_batches_are_judged_over_more_steps() -> None:
    losses = [1.0] * WINDOW + [9.0] * WINDOW
    assert not guards.is_sound(losses, RECIPE)
    assert guards.is_sound(losses, LoopRecipe(batch_size=1))


def test_a_run_that_runs_away_keeps_the_last_good_checkpoint(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    class Worse(Objective):
        def total(self, terms: Mapping[str, torch.Tensor]) -> torch.Tensor:
            object.__setattr__(self, "calls", getattr(self, "calls", 0) + 1)
            factor = 1.0 if self.calls <= 60 else 100.0  # type: ignore[attr-defined]
            return factor * super().total(terms)

    recipe = LoopRecipe(steps=200, batch_size=64, checkpoint_every=25, learning_rate=1e-5)
    with pytest.raises(DpctlError, match="runs away") as caught:
        loop.train(make_tiny(), Worse(scheduler), images, recipe, accelerator=open_accelerator(recipe), folder=tmp_path)
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.step == 50  # the one at step 75 was not worth it
    assert "step-00000050" in caught.value.todo


@pytest.mark.parametrize(
    "problem",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: x"),
    ],
)
def test_too_little_memory_says_what_takes_less(problem: Exception) -> None:
    recipe = LoopRecipe(batch_size=64, accumulation=2)
    with pytest.raises(DpctlError, match="memory") as caught, guards.memory_explained(recipe, 4):
        raise problem
    assert "8 images at a time" in caught.value.got
    assert "--accumulation 4" in caught.value.todo
    with pytest.raises(DpctlError) as caught, guards.memory_explained(LoopRecipe(batch_size=4, accumulation=4), 1):
        raise problem
    assert "--accumulation" not in caught.value.todo  # a part has one image already
    assert "--gradient-checkpointing" in caught.value.todo


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shape"), guards.memory_explained(RECIPE, 1):
        raise RuntimeError("shape mismatch")


def test_a_disk_that_fills_up_leaves_the_checkpoint_before(
    tmp_path: Path, training: Callable[..., TrainRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []

    def full(tensors: Any, path: Path, **more: Any) -> None:
        written.append(path)
        save_file(tensors, path, **more)
        if len(written) == 3:
            Path(path).write_bytes(Path(path).read_bytes()[:100])  # as far as it came
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    recipe = training(steps=8, checkpoint_every=1)
    with pytest.raises(DpctlError, match="space") as caught:
        train(tmp_path / "out", recipe)
    assert str(tmp_path) in caught.value.got
    found = checkpoint.newest(tmp_path / "out.checkpoints")
    assert found is not None
    assert found.step == 2
    assert not list(tmp_path.rglob("*.writing"))
    monkeypatch.undo()
    assert train(tmp_path / "out", recipe, resume=True).files == train(tmp_path / "whole", recipe).files  # type: ignore[union-attr]


def test_only_as_many_checkpoints_stay_as_asked(
    tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any
) -> None:
    for keep in (1, 3):
        with stopping(5) as bar:
            train(tmp_path / str(keep), training(steps=9, checkpoint_every=1, keep=keep), bar=bar)
        assert len(list((tmp_path / f"{keep}.checkpoints").iterdir())) == keep


def test_how_a_batch_is_divided_and_kept_may_change_on_the_way(
    tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any
) -> None:
    whole = train(tmp_path / "whole", training(steps=4, ema_on_cpu=True, gradient_checkpointing=True))
    with stopping(2) as bar:
        train(tmp_path / "out", training(steps=4), bar=bar)
    resumed = train(
        tmp_path / "out", training(steps=4, keep=1, checkpoint_every=2, gradient_checkpointing=True), resume=True
    )
    assert whole is not None
    assert resumed is not None
    assert resumed.files == whole.files  # bit for bit: neither changes a sum
