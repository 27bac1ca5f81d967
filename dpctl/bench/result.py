"""What a benchmark measured: raw values and warm-ups; statistics are derived from them, here and nowhere else.

Names carry SI units (`latency_s`, `peak_memory_bytes`). `bench.json` is `BenchResult` one to one, with the derived
`summary` beside it for readers without this code; reading it back derives the summary again.
"""

import dataclasses
import json
import types
import typing
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from dpctl.bench.compare import Estimate, Percentiles, interval, paired_ratio, percentiles
from dpctl.bench.metrics import Figure
from dpctl.errors import DpctlError

SCHEMA_VERSION = 2
FILE = "bench.json"
EAGER = "eager"
_NEW_IN_2: dict[str, Any] = {"widths": {}, "sensitivity": None}


@dataclass(frozen=True)
class Condition:
    """What one turn draws: so many images at once, in so many denoising steps."""

    batch_size: int
    num_inference_steps: int


@dataclass(frozen=True)
class Turn:
    """One batch of images drawn by one subject. Round 0 warms up and is in no statistic.

    `latency_s` is the whole batch from noise to pictures; `network_latency_s` is the network's part of each step.
    """

    round: int
    batch_size: int
    num_inference_steps: int
    latency_s: float
    step_latency_s: tuple[float, ...]
    network_latency_s: tuple[float, ...]

    @property
    def condition(self) -> Condition:
        """What this turn drew."""
        return Condition(self.batch_size, self.num_inference_steps)


@dataclass(frozen=True)
class Memory:
    """Peak resident memory while drawing one batch, beyond what the imported libraries take."""

    batch_size: int
    peak_memory_bytes: int


@dataclass(frozen=True)
class Model:
    """One model as it is on disk; MACs are of one forward pass at batch 1, attention's products beside them.

    `widths` has (before, after) of every group, and `sensitivity` the scan, as far as the manifest tells.
    """

    name: str
    source: str
    digest: str
    kind: str
    params: int
    macs: int
    attention_macs: int
    file_bytes: int
    lineage: tuple[dict[str, Any], ...]
    widths: dict[str, tuple[int, ...]] = field(default_factory=dict)
    sensitivity: dict[str, Any] | None = None


@dataclass(frozen=True)
class Subject:
    """One model on one backend, with everything that was measured of it; `failure` says why it stopped early."""

    model: str
    backend: str
    runs_from: str
    file_bytes: int
    parity: dict[str, Any] | None
    open_latency_s: float | None
    base_memory_bytes: int | None
    open_peak_memory_bytes: int | None
    memory: tuple[Memory, ...]
    turns: tuple[Turn, ...]
    failure: str | None = None

    @property
    def name(self) -> str:
        """Model and backend, as tables name a subject."""
        return f"{self.model} / {self.backend}"

    def measured(self, condition: Condition) -> dict[int, Turn]:
        """Return round -> turn of one condition, warm-ups left out."""
        return {turn.round: turn for turn in self.turns if turn.condition == condition and turn.round > 0}


@dataclass(frozen=True)
class Quality:
    """The metrics of one model's samples; `left_out` says for each missing metric why."""

    model: str
    backend: str
    num_inference_steps: int
    samples: str
    figures: dict[str, Figure]
    left_out: dict[str, str]


@dataclass(frozen=True)
class Row:
    """One line of the table: a subject under one condition, all derived.

    `latency_s` is of one batch. `pruning` is the speed-up over the baseline on the same backend, `total` that over the
    baseline on eager; for the baseline itself `total` is therefore the backend's part. Both are medians
    of paired ratios.
    """

    model: str
    backend: str
    batch_size: int
    num_inference_steps: int
    latency_s: Percentiles
    step_latency_s: Percentiles
    images_per_second: float
    network_share: float
    peak_memory_bytes: int | None
    pruning: Estimate | None
    total: Estimate | None


@dataclass(frozen=True)
class BenchResult:
    """Everything of one benchmark run; `models[0]` is the baseline."""

    schema_version: int
    created: str
    command: str
    recipe: dict[str, Any]
    threads: int
    environment: dict[str, Any]
    features: dict[str, Any] | None
    models: tuple[Model, ...]
    subjects: tuple[Subject, ...]
    quality: tuple[Quality, ...]
    warnings: tuple[str, ...] = ()

    @property
    def baseline(self) -> Model:
        """The model that all are compared with."""
        return self.models[0]

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """Every batch size at every number of steps, in the recipe's order."""
        steps, sizes = self.recipe["num_inference_steps"], self.recipe["batch_sizes"]
        return tuple(Condition(size, n) for n in steps for size in sizes)

    def digests(self) -> list[str]:
        """Return the digests of the models, the baseline's first."""
        return [model.digest for model in self.models]

    def model(self, name: str) -> Model:
        """Return the model called `name`."""
        return next(model for model in self.models if model.name == name)

    def subject(self, model: str, backend: str) -> Subject | None:
        """Return a subject, or None where that model was not run on that backend."""
        return next((s for s in self.subjects if (s.model, s.backend) == (model, backend)), None)

    def speed_up(self, subject: Subject, over: Subject | None, condition: Condition) -> Estimate | None:
        """Return how many times faster `subject` is than `over`: the median of the ratios of rounds that both took."""
        if over is None or over is subject:
            return None
        ours, theirs = subject.measured(condition), over.measured(condition)
        rounds = sorted(ours.keys() & theirs.keys())
        if not rounds:
            return None
        return paired_ratio([theirs[r].latency_s for r in rounds], [ours[r].latency_s for r in rounds])

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table's lines: by number of steps and batch size, subjects in the order they were asked for."""
        return tuple(
            self._row(subject, condition)
            for condition in self.conditions
            for subject in self.subjects
            if subject.measured(condition)
        )

    def _row(self, subject: Subject, condition: Condition) -> Row:
        turns = list(subject.measured(condition).values())
        latency = percentiles([turn.latency_s for turn in turns])
        whole = sum(turn.latency_s for turn in turns)
        memory = {m.batch_size: m.peak_memory_bytes for m in subject.memory}
        same, eager = (self.subject(self.baseline.name, backend) for backend in (subject.backend, EAGER))
        return Row(
            model=subject.model,
            backend=subject.backend,
            batch_size=condition.batch_size,
            num_inference_steps=condition.num_inference_steps,
            latency_s=latency,
            step_latency_s=percentiles([step for turn in turns for step in turn.step_latency_s]),
            images_per_second=condition.batch_size / latency.p50,
            network_share=sum(sum(turn.network_latency_s) for turn in turns) / whole,
            peak_memory_bytes=memory.get(condition.batch_size),
            pruning=self.speed_up(subject, same, condition),
            total=self.speed_up(subject, eager, condition),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the fields, and the derived summary."""
        summary = [dataclasses.asdict(row) for row in self.rows]
        return json.loads(json.dumps(dataclasses.asdict(self) | {"summary": summary}, allow_nan=False))


def difference(one: Figure, other: Figure) -> Estimate | None:
    """Return `one` - `other` of the same metric with its paired interval; None where the samples do not pair up."""
    if one.count != other.count or len(one.replicates) != len(other.replicates):
        return None
    low, high = interval([a - b for a, b in zip(one.replicates, other.replicates, strict=True)])
    return Estimate(one.value - other.value, low, high, one.count)


def write_result(result: BenchResult, out: Path) -> None:
    """Write bench.json into `out`: whole or not at all."""
    temporary = out / f".{FILE}.writing"
    temporary.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    temporary.replace(out / FILE)


def read_result(path: Path) -> BenchResult:
    """Read a bench.json, strictly; a DpctlError says what is wrong with it."""
    todo = "give a bench.json that this version of dpctl wrote, or measure again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise DpctlError("the benchmark file cannot be read", f"{path}: {problem}", todo) from None
    version = values.get("schema_version") if isinstance(values, dict) else type(values).__name__
    if version not in (1, SCHEMA_VERSION):
        raise DpctlError("unknown benchmark format", f"{path}: schema_version {version!r}", todo)
    values.pop("summary", None)
    try:
        if version == 1:
            values |= {"schema_version": SCHEMA_VERSION, "models": [_NEW_IN_2 | model for model in values["models"]]}
        return _build(BenchResult, values, "result")
    except (KeyError, TypeError, ValueError) as problem:
        raise DpctlError("the benchmark file is damaged", f"{path}: {problem}", todo) from None


def _build(hint: Any, value: Any, where: str) -> Any:
    """Make a value of the type `hint` from plain JSON; ValueError says where it does not fit."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is types.UnionType:
        return None if value is None else _build(options[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        unlike = sorted(hints.keys() ^ value.keys())
        if unlike:
            raise ValueError(f"{where}: entries missing or unknown: {', '.join(unlike)}")
        return hint(**{name: _build(hints[name], inner, f"{where}.{name}") for name, inner in value.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        return tuple(_build(options[0], inner, f"{where}[{i}]") for i, inner in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _build(options[1], inner, f"{where}.{name}") for name, inner in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{where}: {value!r} is no {hint}")
