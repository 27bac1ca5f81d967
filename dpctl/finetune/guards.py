"""When a training must not go on: asked to stop, a loss that is no number or runs away."""

import math
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch

from dpctl.errors import DpctlError
from dpctl.recipe import LoopRecipe

# The loss of one step varies with its images and timesteps: what is judged is a mean over as many of both.
IMAGES_JUDGED = 1024
STEPS_JUDGED = 20
# A mean as many times the lowest one so far has run away; above the second, no checkpoint is written any more.
DIVERGED = 5.0
SUSPECT = 2.0

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def listening() -> Iterator[Callable[[], int]]:
    """Yield what returns the signal that asked this process to stop, 0 without one; the second one stops it at once.

    A cluster sends SIGTERM before it takes a machine away, a terminal SIGINT: both leave time for a checkpoint.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():  # only the main one can hear
        yield lambda: 0
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def hear(number: int, frame: FrameType | None) -> None:
        if asked and callable(old := before[signal.Signals(number)]):
            old(number, frame)
        asked.append(number)

    for number in SIGNALS:
        signal.signal(number, hear)
    try:
        yield lambda: asked[0] if asked else 0
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def memory_explained(recipe: LoopRecipe, processes: int) -> Iterator[None]:
    """Turn the exhaustion of memory into a DpctlError that says what takes less of it."""
    try:
        yield
    except RuntimeError as problem:
        if not is_exhaustion(problem):
            raise
        images = -(-recipe.batch_size // (processes * recipe.accumulation))
        got = f"{images} images at a time: {str(problem).splitlines()[0]}"
        todo = ", then ".join(less_memory(recipe, processes, images // 2))
        raise DpctlError("memory does not suffice for a training step", got, f"try {todo}") from None


def is_exhaustion(problem: Exception) -> bool:
    """Tell whether an error says that there is no more memory, of a GPU or of the machine."""
    return isinstance(problem, torch.OutOfMemoryError) or "allocate memory" in str(problem)


def less_memory(recipe: LoopRecipe, processes: int, fits: int) -> list[str]:
    """Return the options that save memory, those first that change nothing else; `fits` images do at a time."""
    ours = -(-recipe.batch_size // processes)
    parts = -(-ours // max(1, fits))
    # Parts are as equal as can be: the largest is rounded up.
    found = [f"--accumulation {parts}, which changes nothing else"] if recipe.accumulation < parts <= ours else []
    rest = {
        "--gradient-checkpointing": recipe.gradient_checkpointing,
        "--ema-on-cpu": recipe.ema_on_cpu,
        "--optimizer adamw-8bit": recipe.optimizer != "adamw",
    }
    return found + [option for option, chosen in rest.items() if not chosen]


def require_finite(loss: float, norm: float, scaled: bool, step: int, recipe: LoopRecipe, folder: Path) -> None:
    """Raise a DpctlError unless loss and gradient are numbers; in fp16 the scaler skips a gradient that overflows."""
    if not math.isfinite(loss) or not (math.isfinite(norm) or scaled):
        raise _stopped("the loss or its gradient is not finite", f"step {step + 1} of {recipe.steps}", recipe, folder)


def require_converging(losses: Sequence[float], recipe: LoopRecipe, folder: Path) -> None:
    """Raise a DpctlError where the mean of the last losses is far above the lowest mean so far."""
    if (times := _above_lowest(losses, recipe)) > DIVERGED:
        got = f"step {len(losses)} of {recipe.steps}: {times:.3g} times the lowest mean loss so far"
        raise _stopped("the loss runs away", got, recipe, folder)


def is_sound(losses: Sequence[float], recipe: LoopRecipe) -> bool:
    """Tell whether the weights after these losses are worth a checkpoint."""
    return _above_lowest(losses, recipe) <= SUSPECT


def _above_lowest(losses: Sequence[float], recipe: LoopRecipe) -> float:
    """Return the mean of the last losses over the lowest mean of as many earlier ones; 1 where there are too few."""
    window = max(STEPS_JUDGED, math.ceil(IMAGES_JUDGED / recipe.batch_size))
    means = [sum(losses[end - window : end]) / window for end in range(len(losses), window - 1, -window)]
    return means[0] / min(means) if means and min(means) > 0 else 1.0


def _stopped(failed: str, where: str, recipe: LoopRecipe, folder: Path) -> DpctlError:
    found = sorted(folder.glob("step-*.safetensors"))
    last = f"the last good checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
    got = f"{where}, learning rate {recipe.learning_rate:g}, mixed precision {recipe.mixed_precision}"
    todo = "lower --learning-rate, raise the warm-up or use --mixed-precision no"
    return DpctlError(failed, got, f"{todo}; {last}")
