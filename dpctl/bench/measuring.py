"""Take the measurements: every subject in a process of its own, memory first, then turns, interleaved."""

import dataclasses
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from dpctl import progress, registry
from dpctl.bench import stability, subjects
from dpctl.bench.front import equal_latency_steps
from dpctl.bench.process import QUIET, Worker
from dpctl.bench.result import Condition, FewerSteps, Memory, Subject, Turn
from dpctl.errors import DpctlError
from dpctl.recipe import BenchRecipe
from runtime import BACKENDS
from runtime.layers import LayerTime, layer_times

# Turns of the warm-up: until two in a row take about the same time, but not for ever.
FEWEST_WARM_UPS, MOST_WARM_UPS, STEADY = 2, 6, 0.1
# Steps of the memory pass: the peak is reached in the first ones, or by a scheduler that keeps a few outputs.
MEMORY_STEPS = 4
# One layer may take several times as long while the machine is at something else: several rounds, and medians.
PROFILED_ROUNDS, PROFILED_PASSES = 5, 3


class Run:
    """A subject while it is measured; the first failure ends it, and the others go on."""

    def __init__(self, entry: subjects.Entry, threads: int, stack: ExitStack) -> None:
        self.entry, self.failure = entry, entry.refused
        self.opening: dict[str, Any] = {}
        self.opened: dict[str, Any] = {}
        self.first: float | None = None
        self.memory: list[Memory] = []
        self.turns: list[Turn] = []
        self.layers: tuple[LayerTime, ...] = ()
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

    def open(self, recipe: BenchRecipe, threads: int, prompts: Sequence[str] = ()) -> None:
        """Open the model in the fresh process, draw the first pictures, and take the peak of its memory.

        The memory of the smallest batch comes first: what a process has taken once it keeps.
        """
        asked = {"directory": str(self.entry.directory.absolute()), "backend": self.entry.backend}
        drawn = {"scheduler": recipe.scheduler, "prompts": list(prompts), "guidance_scale": recipe.guidance_scale}
        # What was exported has its precision.
        exported = registry.load(BACKENDS, self.entry.backend, "backend").RUNS_EXPORTED
        drawn["precision"] = None if exported else recipe.precision
        self.opening = asked | drawn | {"threads": threads, "seed": recipe.seed}
        self.opened = self.ask("open", **self.opening) or {}
        sizes, few = sorted(recipe.batch_sizes), min(recipe.num_inference_steps)
        first = self.ask("first", batch_size=sizes[0], num_inference_steps=few)
        self.first = None if first is None else self.opened["open_latency_s"] + first["latency_s"]
        for size in sizes:
            peak = self.ask("memory", batch_size=size, num_inference_steps=min(MEMORY_STEPS, few))
            if peak is not None and self.opened["peak_is_reset"]:
                self.memory.append(Memory(batch_size=size, **peak))

    def profile(self, batch_size: int) -> Sequence[LayerTime]:
        """Return the layers' times; none where the profiler refuses, which is no failure of the subject."""
        if self.worker is None or self.failure is not None:
            return ()
        try:
            answer = self.worker.ask("profile", batch_size=batch_size, runs=PROFILED_PASSES)
        except DpctlError:
            return ()
        return [LayerTime(**layer) for layer in answer["layers"] or ()]

    def turn(self, number: int, condition: Condition) -> None:
        """Take one turn: round 0 warms up."""
        asked: dict[str, Any] = dataclasses.asdict(condition)
        answer = self.ask("turn", **asked)
        if answer is not None:
            sequences = {name: tuple(answer[name]) for name in ("step_latency_s", "network_latency_s")}
            self.turns.append(Turn(round=number, **asked | answer | sequences))

    def warm_up(self, condition: Condition) -> None:
        """Take turns until two in a row take about the same time."""
        for count in range(1, MOST_WARM_UPS + 1):
            self.turn(0, condition)
            last = [turn.latency_s for turn in self.turns[-2:]]
            if self.failure is not None or (count >= FEWEST_WARM_UPS and max(last) <= (1 + STEADY) * min(last)):
                return

    def warm(self, condition: Condition) -> float | None:
        """Return the latency of the last turn under a condition so far."""
        return next((turn.latency_s for turn in reversed(self.turns) if turn.condition == condition), None)

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
            precision=self.opened.get("precision", "fp32"),
            first_image_latency_s=self.first,
            build_latency_s=self.entry.build_latency_s,
            layers=self.layers,
        )


class Measurement:
    """All subjects, what the machine did meanwhile, and whether somebody has interrupted it.

    `runs` are in the table's order, the baseline's first. `machine` is a process without a model, which says what the
    processor can do at best.
    """

    def __init__(
        self, runs: Sequence[Run], machine: Worker, recipe: BenchRecipe, threads: int, prompts: Sequence[str] = ()
    ) -> None:
        self.runs, self.recipe, self.threads, self.prompts = runs, recipe, threads, prompts
        self.around: dict[str, Any] = {}
        self.fewer: list[FewerSteps] = []
        self.peak_flops: list[float] = []
        self.interrupted = False
        self._machine = machine

    def take(self, bar: progress.Bar) -> None:
        """Open every subject, then let them take turns; what was measured before Ctrl-C is kept."""
        try:
            with bar("open", len(self.runs)) as advance:
                for run in self.runs:
                    run.open(self.recipe, self.threads, self.prompts)
                    advance(1, subject=run.entry.name)
            pids = [self._machine.pid, *(run.worker.pid for run in self.runs if run.worker is not None)]
            self.around = {"load_average_before": stability.load_average(), "workers": QUIET}
            before = stability.clock(pids)
            try:
                self._turns(bar)
                self._profiles(bar)
            finally:
                self.around |= {
                    "load_average_after": stability.load_average(),
                    "other_processes_busy_cores": stability.others_busy(before, stability.clock(pids)),
                    "governor": stability.governor(),
                }
        except KeyboardInterrupt:
            self.interrupted = True

    def _turns(self, bar: progress.Bar) -> None:
        steps, sizes = self.recipe.num_inference_steps, self.recipe.batch_sizes
        conditions = [Condition(size, n) for n in steps for size in sizes]
        with bar("warm up", len(conditions) * len(self.runs)) as advance:
            for condition in conditions:
                for run in self.runs:
                    run.warm_up(condition)
                    advance(1, subject=run.entry.name)
        self.fewer = fewer_steps(self.runs, self.recipe)
        asked = {id(run): list(conditions) for run in self.runs}
        for each in self.fewer:
            run = next(r for r in self.runs if r.entry.baseline and r.entry.backend == each.backend)
            more = [Condition(size, each.fewer) for size in sizes]
            asked[id(run)] += [condition for condition in more if condition not in asked[id(run)]]
        with bar("measure", self.recipe.rounds * sum(map(len, asked.values()))) as advance:
            for number in range(1, self.recipe.rounds + 1):
                self.peak_flops.append(self._machine.ask("light", threads=self.threads)["flops"])
                self._round(number, asked, advance)

    def _profiles(self, bar: progress.Bar) -> None:
        """Take the layers' times of every model on the backends that all share, in turns as well."""
        runs = [run for run in self.runs if run.entry.backend in self.recipe.backends]
        taken: dict[int, list[Sequence[LayerTime]]] = {id(run): [] for run in runs}
        with bar("profile", len(runs) * PROFILED_ROUNDS) as advance:
            for number in range(PROFILED_ROUNDS):
                for run in order(runs, number):
                    taken[id(run)].append(run.profile(min(self.recipe.batch_sizes)))
                    advance(1, subject=run.entry.name)
        for run in runs:
            # A pass that a profiler did not tell of is none, and not one in which nothing ran.
            run.layers = layer_times(filter(None, taken[id(run)]))

    def _round(self, number: int, asked: dict[int, list[Condition]], advance: progress.Advance) -> None:
        """Let every subject take its turns of a round, condition by condition."""
        every = dict.fromkeys(condition for conditions in asked.values() for condition in conditions)
        for condition in every:
            for run in order(self.runs, number):
                if condition in asked[id(run)]:
                    run.turn(number, condition)
                    advance(1, round=f"{number}/{self.recipe.rounds}")
        states = {run.entry.name: run.ask("state") for run in self.runs if run.opened.get("device", "cpu") != "cpu"}
        for name, state in states.items():
            if state is not None and state["gpu"] is not None:
                self.around.setdefault("gpu_states", {}).setdefault(name, []).append(state["gpu"])


def fewer_steps(runs: Sequence[Run], recipe: BenchRecipe) -> list[FewerSteps]:
    """Return how many steps the baseline can take in the time of each candidate on the same backend, by the warm-up."""
    found = []
    bases = {run.entry.backend: run for run in runs if run.entry.baseline and run.failure is None}
    for run in runs if recipe.fewer_steps else ():
        base = bases.get(run.entry.backend)
        if run.entry.baseline or base is None or run.failure is not None:
            continue
        for steps in recipe.num_inference_steps:
            shares = [
                ours / theirs
                for size in recipe.batch_sizes
                if (ours := run.warm(Condition(size, steps))) and (theirs := base.warm(Condition(size, steps)))
            ]
            # All in units of the baseline's latency: it is given no more time than the candidate takes.
            fewer = equal_latency_steps(1 / steps, sorted(shares)[len(shares) // 2], 0.0, steps) if shares else steps
            if fewer < steps:
                found.append(FewerSteps(run.entry.model.name, run.entry.backend, steps, fewer))
    return found


def order(runs: Sequence[Run], number: int) -> list[Run]:
    """Return the order of a round: each begins with another subject, every second one goes backwards."""
    start = number % len(runs)
    turned = [*runs[start:], *runs[:start]]
    return turned[::-1] if number % 2 else turned
