"""How quiet the machine was, and what to do where it was not."""

import dataclasses
import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpctl import units
from dpctl.bench.compare import percentiles, relative_spread
from dpctl.bench.result import BenchResult, Condition, Subject

# A bootstrap interval of fewer rounds is narrower than the truth.
FEWEST_ROUNDS = 6
BUSY_CORES, SPREAD, DRIFT = 0.5, 0.15, 1.25


@dataclass(frozen=True)
class Clock:
    """Wall time, and the processor seconds that the whole machine and our own processes had used by then."""

    wall_s: float
    machine_s: float
    ours_s: float


def clock(workers: Iterable[int] = ()) -> Clock | None:
    """Read the clocks; `workers` are the numbers of our other processes. None where the system has no /proc."""
    tick = os.sysconf("SC_CLK_TCK")
    try:
        user, nice, system, _, _, irq, softirq, steal = (
            int(n) for n in Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:9]
        )
        ours = sum(_process_ticks(pid) for pid in (os.getpid(), *workers))
    except (OSError, ValueError):
        return None
    return Clock(time.monotonic(), (user + nice + system + irq + softirq + steal) / tick, ours / tick)


def _process_ticks(pid: int) -> int:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:  # it has died: what it used is not known
        return 0
    return int(fields[11]) + int(fields[12])


def others_busy(before: Clock | None, after: Clock | None) -> float | None:
    """Return how many cores all other processes kept busy between two readings."""
    if before is None or after is None or after.wall_s <= before.wall_s:
        return None
    used = (after.machine_s - before.machine_s) - (after.ours_s - before.ours_s)
    return max(0.0, used / (after.wall_s - before.wall_s))


def governor() -> str | None:
    """Return the processor's frequency governor, where the system tells."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="ascii").strip()
    except OSError:
        return None


def load_average() -> float | None:
    """Return the load average of the last minute, where the system has one."""
    try:
        return round(os.getloadavg()[0], 2)
    except OSError:
        return None


def with_warnings(result: BenchResult) -> BenchResult:
    """Return the result with its warnings in it."""
    return dataclasses.replace(result, warnings=warnings(result))


def warnings(result: BenchResult) -> tuple[str, ...]:
    """Return what makes this result doubtful, each with what to do; empty for a quiet run."""
    found = [*_machine(result.environment), *_held_back(result.environment.get("gpu_states", {}))]
    if result.interrupted:
        found.append("interrupted: what was measured until then is here, the rest is missing; measure again")
    rounds = result.recipe["rounds"]
    if rounds < FEWEST_ROUNDS:
        found.append(f"only {rounds} rounds: the intervals are too narrow; measure with --rounds 20 or more")
    for condition in result.conditions:
        for subject in result.subjects:
            found += _subject(result, subject, condition)
    found += _unlike_precisions(result)
    if any(subject.turns and not subject.memory for subject in result.subjects):
        found.append("no peak memory: this system does not let a process reset it (/proc/self/clear_refs); use another")
    found += [f"{subject.name} is incomplete: {subject.failure}" for subject in result.subjects if subject.failure]
    return tuple(found)


def _machine(environment: dict[str, Any]) -> Iterable[str]:
    busy = environment.get("other_processes_busy_cores")
    if busy is not None and busy > BUSY_CORES:
        yield (
            f"other processes kept {busy:.1f} cores busy during the measurement: absolute latencies are too high and "
            "ratios less certain; stop them and measure again"
        )
    if environment.get("governor") in ("powersave", "conservative"):
        yield f"the frequency governor is {environment['governor']}: set it to performance and measure again"


def _unlike_precisions(result: BenchResult) -> Iterable[str]:
    """Name the candidates that run in another precision than the baseline on the same backend."""
    for subject in result.subjects:
        base = result.subject(result.baseline.name, subject.backend)
        if base is not None and base.turns and subject.turns and base.precision != subject.precision:
            yield (
                f"{subject.name} is in {subject.precision}, {base.name} in {base.precision}: what is faster by its "
                f"precision is not faster by pruning; measure with --precision {subject.precision}"
            )


def _held_back(states: dict[str, list[dict[str, Any]]]) -> Iterable[str]:
    """Say which subjects ran while something held the GPU's clocks back; one state stands for a round."""
    for name, rounds in states.items():
        reasons = sorted({reason for state in rounds for reason in state["held_back_by"]})
        if reasons:
            yield f"the GPU was held back while {name} ran ({', '.join(reasons)}): cool it, or lock its clocks"


def _subject(result: BenchResult, subject: Subject, condition: Condition) -> Iterable[str]:
    turns = subject.measured(condition)
    if len(turns) < 4:
        return
    where = f"{subject.name}, batch {condition.batch_size}, {condition.num_inference_steps} steps"
    latencies = [turn.latency_s for _, turn in sorted(turns.items())]
    half = len(latencies) // 2
    early, late = percentiles(latencies[:half]).p50, percentiles(latencies[half:]).p50
    base = result.subject(result.baseline.name, subject.backend)
    if base is None or base is subject:
        if max(early / late, late / early) > DRIFT:
            yield (
                f"{where}: the second half of the rounds took {units.ratio(late / early)} the time of the first; "
                "ratios are paired and stand, absolute latencies drift: let the machine cool down and come to rest"
            )
        return
    theirs = base.measured(condition)
    ratios = [theirs[r].latency_s / turn.latency_s for r, turn in turns.items() if r in theirs]
    if len(ratios) >= FEWEST_ROUNDS and relative_spread(ratios) > SPREAD:
        yield (
            f"{where}: the ratio to the baseline varies by {units.percent(relative_spread(ratios))} between rounds "
            "(quartiles over median): measure with more --rounds, on a quieter machine"
        )
