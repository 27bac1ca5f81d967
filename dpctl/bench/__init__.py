"""Measure subjects against one another: one process each, turns interleaved, ratios paired.

A subject is one model on one backend. Its process is fresh: the memory pass comes first, then the turns, in which every
subject in the same round draws the same images, then the samples that the quality is judged by.
"""

import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpctl import environment, progress, registry
from dpctl.bench import drawing, quality, stability, subjects
from dpctl.bench.metrics._features import FeatureSpace
from dpctl.bench.process import QUIET, Worker
from dpctl.bench.result import SCHEMA_VERSION, BenchResult, Condition, Memory, Subject, Turn, write_result
from dpctl.errors import DpctlError
from dpctl.recipe import BenchRecipe, to_dict
from runtime import BACKENDS
from runtime.schedulers import check_scheduler

# Steps of the memory pass: the peak is reached in the first ones, or by a scheduler that keeps a few outputs.
MEMORY_STEPS = 4


class Run:
    """A subject while it is measured; the first failure ends it, and the others go on."""

    def __init__(self, entry: subjects.Entry, threads: int, stack: ExitStack) -> None:
        self.entry, self.failure = entry, entry.refused
        self.opening: dict[str, Any] = {}
        self.opened: dict[str, Any] = {}
        self.memory: list[Memory] = []
        self.turns: list[Turn] = []
        self.worker = None if entry.refused else stack.enter_context(Worker(entry.name, threads))

    def ask(self, what: str, **request: Any) -> dict[str, Any] | None:
        """Ask the worker; None once it has failed."""
        if self.worker is None or self.failure is not None:
            return None
        try:
            return self.worker.ask(what, **request)
        except DpctlError as problem:
            self.failure = f"{problem.failed} ({problem.got}); {problem.todo}"
            return None

    def open(self, recipe: BenchRecipe, threads: int) -> None:
        """Open the model in the fresh process and take the peak of its memory, from the smallest batch upwards."""
        asked = {"directory": str(self.entry.directory.absolute()), "backend": self.entry.backend}
        self.opening = asked | {"scheduler": recipe.scheduler, "threads": threads, "seed": recipe.seed}
        answer = self.ask("open", **self.opening)
        self.opened = answer or {}
        steps = min(MEMORY_STEPS, *recipe.num_inference_steps)
        for size in sorted(recipe.batch_sizes):
            peak = self.ask("memory", batch_size=size, num_inference_steps=steps)
            if peak is not None and self.opened["peak_is_reset"]:
                self.memory.append(Memory(batch_size=size, **peak))

    def turn(self, number: int, condition: Condition) -> None:
        """Take one turn: round 0 warms up."""
        asked = {"batch_size": condition.batch_size, "num_inference_steps": condition.num_inference_steps}
        answer = self.ask("turn", **asked)
        if answer is not None:
            steps, network = tuple(answer["step_latency_s"]), tuple(answer["network_latency_s"])
            self.turns.append(
                Turn(number, **asked, latency_s=answer["latency_s"], step_latency_s=steps, network_latency_s=network)
            )

    def subject(self) -> Subject:
        """Return what was measured."""
        return Subject(
            model=self.entry.model.name,
            backend=self.entry.backend,
            runs_from=self.entry.runs_from,
            file_bytes=self.entry.file_bytes,
            parity=self.entry.parity,
            open_latency_s=self.opened.get("open_latency_s"),
            base_memory_bytes=self.opened.get("base_memory_bytes"),
            open_peak_memory_bytes=self.opened.get("open_peak_memory_bytes"),
            memory=tuple(self.memory),
            turns=tuple(self.turns),
            failure=self.failure,
        )


def run_bench(
    recipe: BenchRecipe,
    out: Path,
    *,
    exported: Sequence[Path] = (),
    space: FeatureSpace | None = None,
    processes: drawing.Crew | None = None,
    bar: progress.Bar = progress.no_bar,
) -> BenchResult:
    """Measure the recipe's candidates against its baseline; write bench.json and samples/ into `out`.

    `exported` are exported directories that may serve an engine backend; a model without one is exported into the
    user's cache. `space` (default: the recipe's, else the embedded one) holds the features of FID and KID. `processes`
    draw the samples together (default: this one alone). A subject whose process dies is named in the result and the
    others are kept. Raises a DpctlError for unusable models or numbers, and where nothing of the baseline could be
    measured.
    """
    check(recipe)
    models = subjects.describe(recipe)
    subjects.require_one_shape(models)
    threads = recipe.threads or default_threads()
    space = space or quality.feature_space(recipe, subjects.shape(models[0]), out, bar)
    entries = subjects.prepare(recipe, models, exported, bar)
    processes = processes or drawing.Crew()
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        runs = [Run(entry, threads, stack) for entry in entries]
        around = measure(runs, recipe, threads, bar)
        if not any(run.turns for run in runs if run.entry.model is models[0]):
            raise nothing_measured(runs)
        samples = drawing.draw_samples(runs, models, recipe, out, bar, processes)
    with bar("judge", max(1, len(samples))) as advance:
        judged = quality.assess(samples, out, models[0].name, space, clip=recipe.clip, advance=advance)
    result = BenchResult(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=typed_command(),
        recipe=to_dict(recipe),
        threads=threads,
        environment=environment.describe() | around | {"samples_drawn_by": processes.drawn},
        features=space.description if space is not None and samples else None,
        models=models,
        subjects=tuple(run.subject() for run in runs),
        quality=judged,
    )
    result = stability.with_warnings(result)
    write_result(result, out)
    return result


def check(recipe: BenchRecipe) -> None:
    """Raise a DpctlError for unknown names and for numbers that cannot be measured with."""
    lists = {
        "backends": recipe.backends,
        "batch_sizes": recipe.batch_sizes,
        "num_inference_steps": recipe.num_inference_steps,
    }
    for name, values in lists.items():
        if not values or len(set(values)) != len(values):
            raise DpctlError(f"{name} must name one or more different values", f"{values}", "correct the list")
    for backend in recipe.backends:
        registry.check(BACKENDS, backend, "backend")
    check_scheduler(recipe.scheduler)
    numbers = (*recipe.batch_sizes, *recipe.num_inference_steps, recipe.rounds, recipe.threads or 1)
    if min(numbers) < 1 or recipe.samples < 0:
        raise DpctlError(
            "a number of the benchmark is too small",
            f"batch sizes {recipe.batch_sizes}, steps {recipe.num_inference_steps}, rounds {recipe.rounds}, "
            f"threads {recipe.threads}, samples {recipe.samples}",
            "give 1 or more (samples: 0 leaves the quality out)",
        )
    quality.check(recipe)


def measure(runs: Sequence[Run], recipe: BenchRecipe, threads: int, bar: progress.Bar) -> dict[str, Any]:
    """Open every subject, then let them take turns; return what the machine did meanwhile."""
    with bar("open", len(runs)) as advance:
        for run in runs:
            run.open(recipe, threads)
            advance(1, subject=run.entry.name)
    pids = [run.worker.pid for run in runs if run.worker is not None]
    load, before = stability.load_average(), stability.clock(pids)
    conditions = [Condition(size, n) for n in recipe.num_inference_steps for size in recipe.batch_sizes]
    with bar("measure", (recipe.rounds + 1) * len(conditions) * len(runs)) as advance:
        for number in range(recipe.rounds + 1):
            for condition in conditions:
                for run in order(runs, number):
                    run.turn(number, condition)
                    advance(1, round=f"{number}/{recipe.rounds}")
    return {
        "load_average_before": load,
        "load_average_after": stability.load_average(),
        "other_processes_busy_cores": stability.others_busy(before, stability.clock(pids)),
        "governor": stability.governor(),
        "workers": QUIET,
    }


def order(runs: Sequence[Run], number: int) -> list[Run]:
    """Return the order of a round: each begins with another subject, every second one goes backwards."""
    start = number % len(runs)
    turned = [*runs[start:], *runs[:start]]
    return turned[::-1] if number % 2 else turned


def nothing_measured(runs: Sequence[Run]) -> DpctlError:
    """Return the error for a baseline that never took a turn."""
    reasons = [f"{run.entry.name}: {run.failure}" for run in runs if run.failure]
    return DpctlError("the baseline could not be measured", "; ".join(reasons), "mend that, or choose another backend")


def default_threads() -> int:
    """Return torch's own number of threads: the cores, or what OMP_NUM_THREADS says."""
    import torch

    return torch.get_num_threads()


def typed_command() -> str:
    """Return the command line of this process as one would type it."""
    name = Path(sys.argv[0]).name
    return shlex.join(["dpctl" if name in ("dpctl", "__main__.py") else name, *sys.argv[1:]])
