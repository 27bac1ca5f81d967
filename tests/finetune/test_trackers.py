"""What a tracker is told is what the training says; a missing one is an error before anything is read."""

import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from dpctl.finetune import finetune, loop, trackers
from dpctl.recipe import FinetuneRecipe

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed"
)


def logged(directory: Path) -> dict[str, list[tuple[int, float]]]:
    """Return (step, value) of every curve as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(directory)).Reload()
    return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}


class Noted:
    """Stands in for accelerate's tracker: the test is of what it is told."""

    def __init__(self, *given: Any, **more: Any) -> None:
        self.given, self.more = given, more
        self.told: list[tuple[int, dict[str, float]]] = []
        self.finished = 0

    def start(self) -> None:
        pass

    def log(self, values: dict[str, float], step: int) -> None:
        self.told.append((step, values))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Noted]:
    """Every tracker that is opened in the test."""
    found: list[Noted] = []

    def open_(*given: Any, **more: Any) -> Noted:
        found.append(Noted(*given, **more))
        return found[-1]

    monkeypatch.setattr(trackers, "TensorBoardTracker", open_)
    monkeypatch.setattr(trackers, "check", lambda name: None)
    return found


def test_every_step_is_told_once_and_in_order_over_a_resume(
    family: Path,
    tuning: Callable[..., FinetuneRecipe],
    tmp_path: Path,
    stopping: Callable[[int], AbstractContextManager[Any]],
    opened: list[Noted],
) -> None:
    recipe = tuning(tracker="tensorboard", validation=4, validate_every=2, checkpoint_every=1)
    with stopping(2) as bar:
        finetune(str(family / "pruned"), tmp_path / "out", recipe, bar=bar)
    finetune(str(family / "pruned"), tmp_path / "out", recipe, resume=True)

    first, second = opened
    assert first.given == ("out.tensorboard", tmp_path)
    assert (first.finished, second.finished) == (1, 1)
    assert [step for step, _ in first.told] == [1, 2]
    begun = second.told[0][0]
    assert second.more == {"purge_step": begun}
    assert [step for step, _ in second.told] == list(range(begun, 4))
    for step, values in first.told + second.told:
        usual = {"loss", "denoising", "distillation", "grad_norm", "learning_rate"}
        assert values.keys() == usual | ({"validation"} if step in (2, 3) else set())
        assert values["learning_rate"] == loop.learning_rate(step - 1, recipe)


def test_none_opens_none(
    family: Path, tuning: Callable[..., FinetuneRecipe], tmp_path: Path, opened: list[Noted]
) -> None:
    finetune(str(family / "pruned"), tmp_path / "out", tuning())
    assert opened == []


@pytest.mark.parametrize(("name", "how"), [("tensorboard", "[tensorboard]"), ("wandb", "the package wandb")])
def test_a_missing_package_is_told_before_the_model_is_read(
    name: str,
    how: str,
    tuning: Callable[..., FinetuneRecipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refused: Callable[..., AbstractContextManager[None]],
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with refused("needs a package", got=name, todo=how):
        finetune("no such model", tmp_path / "out", tuning(tracker=name))


def test_a_tracker_that_does_not_open_is_an_error_of_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, refused: Callable[..., AbstractContextManager[None]]
) -> None:
    class Closed(Noted):
        def start(self) -> None:
            raise RuntimeError("no API key\nlog in first")

    monkeypatch.setattr(trackers, "WandBTracker", Closed)
    with refused("cannot be opened", got="wandb: no API key"):
        trackers._open("wandb", tmp_path / "out.checkpoints", 0)


@needs_tensorboard
def test_tensorboard_shows_each_step_once_after_a_resume(
    family: Path,
    tuning: Callable[..., FinetuneRecipe],
    tmp_path: Path,
    stopping: Callable[[int], AbstractContextManager[Any]],
) -> None:
    recipe = tuning(tracker="tensorboard", steps=5, checkpoint_every=2)
    with stopping(4) as bar:
        finetune(str(family / "pruned"), tmp_path / "out", recipe, bar=bar)
    finetune(str(family / "pruned"), tmp_path / "out", recipe, resume=True)
    curves = logged(tmp_path / "out.tensorboard")
    assert curves.keys() == {"loss", "denoising", "distillation", "grad_norm", "learning_rate"}
    assert [step for step, _ in curves["loss"]] == [1, 2, 3, 4, 5]
