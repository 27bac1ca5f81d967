"""Networks timed against the unpruned one, turn by turn, each in a process of its own: the bench's paired method."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Self

from dpctl.bench.compare import Estimate, paired_ratio
from dpctl.bench.process import Worker
from dpctl.errors import DpctlError
from dpctl.models import decoder_of
from dpctl.pipelines import pipeline_class, takes_text
from dpctl.recipe import LatencyRecipe
from runtime.layers import LayerTime

# Rounds: at least and at most.
FEWEST, MOST = 9, 60
# What a turn takes at least: a single call of a small network is a few milliseconds, of which the clock says little.
CALLS, TURN_S = 3, 0.1


@dataclass(frozen=True)
class Precision:
    """How narrow the interval of a ratio is to be, over the ratio, and how wide it may be after all rounds."""

    enough: float = 0.02
    too_wide: float = 0.08


@dataclass(frozen=True)
class Timed:
    """A network's latency over the unpruned one's, with the interval over rounds, and the medians of both."""

    ratio: Estimate
    latency_s: float
    baseline_s: float

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values."""
        return {
            "ratio": self.ratio.value,
            "low": self.ratio.low,
            "high": self.ratio.high,
            "rounds": self.ratio.count,
            "latency_s": self.latency_s,
            "baseline_latency_s": self.baseline_s,
        }


@dataclass
class Clock:
    """Times exported directories against the unpruned model's, which stays open in its process between them."""

    baseline: Path
    recipe: LatencyRecipe
    rows: int
    threads: int
    precision: Precision = Precision()
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        with ExitStack() as opened:  # a process that does not open what it should ends here
            worker = opened.enter_context(Worker("the unpruned network", self.threads))
            self._base = self._open(self.baseline, worker)
            self._base()
            self._stack = opened.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def baseline_s(self) -> float:
        """Return what the unpruned model takes, by a few turns."""
        return median(self._base() for _ in range(FEWEST))

    def time(self, directory: Path) -> Timed:
        """Return a network's latency beside the unpruned one's.

        Raises a DpctlError for one that cannot run, and where the machine is too noisy to tell.
        """
        with Worker(directory.name, self.threads) as worker:
            return self._timed(self._open(directory, worker))

    def profile(self, directory: Path, passes: int) -> tuple[Timed, list[LayerTime]]:
        """Return the same with the time of every layer by the backend's profiler, the median of some passes."""
        with Worker(directory.name, self.threads) as worker:
            timed = self._timed(self._open(directory, worker))
            told = worker.ask("layers", rows=self.rows, runs=passes)["layers"]
        return timed, [LayerTime(**layer) for layer in told]

    def _timed(self, ours: Callable[[], float]) -> Timed:
        ours()  # warms up, as the baseline has
        mine: list[float] = []
        theirs: list[float] = []
        while len(mine) < MOST:
            turns = [(theirs, self._base), (mine, ours)]
            for taken, turn in turns[:: 1 if len(mine) % 2 else -1]:
                taken.append(turn())
            found = paired_ratio(mine, theirs)
            if len(mine) >= FEWEST and found.high - found.low <= self.precision.enough * found.value:
                break
        _require_told(found, self.precision.too_wide)
        return Timed(found, median(mine), median(theirs))

    def _open(self, directory: Path, worker: Worker) -> Callable[[], float]:
        """Open a directory in a process and return what takes a turn there, in seconds."""
        asked: dict[str, Any] = {"directory": str(directory.absolute()), "backend": self.recipe.backend}
        asked["threads"] = self.threads
        if self.recipe.of == "unet":
            worker.ask("open_network", **asked)
            calls = {"rows": self.rows, "least": CALLS, "least_s": TURN_S}
            return lambda: float(median(worker.ask("calls", **calls)["latency_s"]))
        # What a text says costs no time: any will do where one is wanted.
        prompts = ["a picture"] if decoder_of(directory) and takes_text(pipeline_class(directory)) else []
        worker.ask("open", **asked, scheduler=self.recipe.scheduler, prompts=prompts)
        turn = {"batch_size": self.recipe.batch_size, "num_inference_steps": self.recipe.num_inference_steps}
        return lambda: float(worker.ask("turn", **turn)["latency_s"])


def _require_told(found: Estimate, most: float) -> None:
    width = (found.high - found.low) / found.value
    if width > most or not math.isfinite(width):
        got = f"a ratio of {found.value:.3f} [{found.low:.3f}, {found.high:.3f}] after {found.count} rounds"
        todo = "stop what else runs here, or give fewer --threads"
        raise DpctlError("this machine is too noisy to measure a latency", got, todo)
