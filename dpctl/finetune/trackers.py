"""Curves of a training elsewhere: TensorBoard's files beside the output, or Weights & Biases, through accelerate."""

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker

from dpctl.errors import DpctlError
from dpctl.finetune.state import State
from dpctl.recipe import LoopRecipe

PROJECT = "dpctl"

Track = Callable[[State, Mapping[str, float]], None]


def check(name: str) -> None:
    """Raise a DpctlError where a tracker's package is missing."""
    if name != "none" and importlib.util.find_spec(name) is None:
        how = "install dpctl with the extra [tensorboard]" if name == "tensorboard" else f"install the package {name}"
        raise DpctlError("this tracker needs a package that is not installed", name, f"{how}, or leave --tracker out")


@contextmanager
def tracking(recipe: LoopRecipe, accelerator: Accelerator, folder: Path, step: int) -> Iterator[Track]:
    """Yield what takes in the figures of every step from `step` on; only the main process writes them.

    `folder` is that of the checkpoints: what TensorBoard reads lies beside it and stays.
    """
    if recipe.tracker == "none" or not accelerator.is_main_process:
        yield lambda state, values: None
        return
    tracker = _open(recipe.tracker, folder, step)

    def track(state: State, values: Mapping[str, float]) -> None:
        found = dict(values)
        if state.validated and state.validated[-1]["step"] == state.step:
            found["validation"] = state.validated[-1]["loss"]
        tracker.log(found, step=state.step)

    try:
        yield track
    finally:
        tracker.finish()


def _open(name: str, folder: Path, step: int) -> Any:
    run = folder.name.removesuffix(".checkpoints")
    if name == "tensorboard":
        # A run that was stopped may have told of steps after its last checkpoint: they come again.
        tracker: Any = TensorBoardTracker(f"{run}.tensorboard", folder.parent, purge_step=step + 1)
    else:
        tracker = WandBTracker(PROJECT, name=run, dir=str(folder.parent))
    try:
        tracker.start()
    except Exception as problem:  # a service and its client have errors of their own
        got = f"{name}: {(str(problem) or type(problem).__name__).splitlines()[0]}"
        raise DpctlError("the tracker cannot be opened", got, "correct its settings, or leave --tracker out") from None
    return tracker
