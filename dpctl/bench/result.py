"""What a benchmark measured: raw values and warm-ups; statistics are derived from them, here and nowhere else.

Names carry SI units (`latency_s`, `peak_memory_bytes`). `bench.json` is `BenchResult` one to one, with the derived
`summary` beside it for readers without this code; reading it back derives the summary again.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from dpctl.bench.compare import Estimate, Percentiles, interval, paired_ratio, percentiles
from dpctl.bench.layers import Comparison, compare
from dpctl.bench.light import fraction
from dpctl.bench.metrics import Figure
from runtime.layers import LayerTime

SCHEMA_VERSION = 4
EAGER = "eager"
# Backends that do not compute the whole network at every call, and those that run the model's own weights exactly.
INEXACT = frozenset({"deepcache"})
OWN_WEIGHTS = frozenset({EAGER, "compiled"})
# What `Turn.parts_s` splits a latency into.
TEXT_ENCODER, DENOISER, SCHEDULER, VAE, OTHER = PARTS = ("text encoder", "denoiser", "scheduler", "vae", "other")


@dataclass(frozen=True)
class Condition:
    """What one turn draws: so many images at once, in so many denoising steps."""

    batch_size: int
    num_inference_steps: int


@dataclass(frozen=True)
class Turn:
    """One batch of images drawn by one subject. Round 0 warms up and is in no statistic.

    `latency_s` is the whole batch from noise to pictures; `network_latency_s` is the network's part of each call.
    `parts_s` splits the latency over text encoder, denoiser, scheduler, VAE and the rest; `energy_j` is what the GPU
    took meanwhile. Guidance doubles the network's batch.
    """

    round: int
    batch_size: int
    num_inference_steps: int
    latency_s: float
    step_latency_s: tuple[float, ...]
    network_latency_s: tuple[float, ...]
    parts_s: dict[str, float] = field(default_factory=dict)
    network_batch_size: int | None = None
    energy_j: float | None = None

    @property
    def condition(self) -> Condition:
        """What this turn drew."""
        return Condition(self.batch_size, self.num_inference_steps)


@dataclass(frozen=True)
class Memory:
    """Peak memory while drawing one batch, beyond what the imported libraries take: resident, and the device's."""

    batch_size: int
    peak_memory_bytes: int
    peak_device_memory_bytes: int | None = None


@dataclass(frozen=True)
class Model:
    """One model as it is on disk; MACs are of one forward pass at batch 1, attention's products beside them.

    `widths` has (before, after) of every group, and `sensitivity` the scan, as far as the manifest tells.
    `module_macs` are the MACs by module path, `latency` what pruning asked of it and what its candidates took.
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
    module_macs: dict[str, int] = field(default_factory=dict)
    latency: dict[str, Any] | None = None


@dataclass(frozen=True)
class Subject:
    """One model on one backend, with everything that was measured of it; `failure` says why it stopped early.

    `first_image_latency_s` is from the request to open the model to its first picture (the smallest batch), what the
    backend builds on the way included; `build_latency_s` is what was built before, an engine. `layers` are one forward
    pass of the smallest batch by module, as the backend's own profiler tells it.
    """

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
    precision: str = "fp32"
    first_image_latency_s: float | None = None
    build_latency_s: float | None = None
    layers: tuple[LayerTime, ...] = ()

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

    @property
    def approximation(self) -> str | None:
        """The backend that only approximates the model; None for the model's own samples, whatever drew them."""
        return self.backend if self.backend in INEXACT else None


@dataclass(frozen=True)
class FewerSteps:
    """The baseline with so few steps that it takes about the time of a candidate at `num_inference_steps`."""

    candidate: str
    backend: str
    num_inference_steps: int
    fewer: int


@dataclass(frozen=True)
class Row:
    """One line of the table: a subject under one condition, all derived.

    `latency_s` is of one batch. `pruning` is the speed-up over the baseline on the same backend, `total` that over the
    baseline on eager; for the baseline itself `total` is therefore the backend's part. Both are medians
    of paired ratios. `instead_of` is the number of steps in whose place the baseline takes fewer: its ratios are over
    the baseline at that number. `parts` are the shares of the latency; `ceiling` is how many times faster the whole
    image could be if the network took no time. `light` is the network's FLOP/s over those of a large matrix product, at
    its best reading.
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
    instead_of: int | None
    peak_device_memory_bytes: int | None
    parts: dict[str, float]
    ceiling: float | None
    light: float | None
    energy_j_per_image: float | None


@dataclass(frozen=True)
class BenchResult:
    """Everything of one benchmark run; `models[0]` is the baseline.

    `peak_flops` are the FLOP/s of a large matrix product in float32 with the subjects' threads, one reading a round.
    """

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
    fewer_steps: tuple[FewerSteps, ...] = ()
    peak_flops: tuple[float, ...] = ()
    interrupted: bool = False

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

    def speed_up(
        self, subject: Subject, over: Subject | None, condition: Condition, their_steps: int | None = None
    ) -> Estimate | None:
        """Return how many times faster `subject` is than `over`: the median of the ratios of rounds that both took.

        `over` takes `their_steps` (default: as many).
        """
        their_steps = their_steps or condition.num_inference_steps
        if over is None or (over is subject and their_steps == condition.num_inference_steps):
            return None
        ours, theirs = subject.measured(condition), over.measured(Condition(condition.batch_size, their_steps))
        rounds = sorted(ours.keys() & theirs.keys())
        if not rounds:
            return None
        return paired_ratio([theirs[r].latency_s for r in rounds], [ours[r].latency_s for r in rounds])

    def layers(self, model: str, backend: str) -> Comparison | None:
        """Return a model's layers beside the baseline's on the same backend, where both have been profiled."""
        ours, theirs = self.subject(model, backend), self.subject(self.baseline.name, backend)
        if ours is None or theirs is None or ours is theirs or not (ours.layers and theirs.layers):
            return None
        return compare(theirs.layers, ours.layers, self.baseline.module_macs, self.model(model).module_macs)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The table's lines: by number of steps and batch size, subjects in the order they were asked for.

        Each block ends with the baseline at fewer steps.
        """
        return tuple(
            self._row(subject, Condition(condition.batch_size, taken), instead_of)
            for condition in self.conditions
            for subject, taken, instead_of in self._lines(condition)
            if subject.measured(Condition(condition.batch_size, taken))
        )

    def _lines(self, condition: Condition) -> Iterator[tuple[Subject, int, int | None]]:
        """Yield who is in a condition's block, with the steps that are taken and those in whose place they are."""
        asked = condition.num_inference_steps
        yield from ((subject, asked, None) for subject in self.subjects)
        fewer = {(f.backend, f.fewer) for f in self.fewer_steps if f.num_inference_steps == asked}
        for backend, steps in sorted(fewer):
            subject = self.subject(self.baseline.name, backend)
            if subject is not None and steps not in self.recipe["num_inference_steps"]:
                yield subject, steps, asked

    def _row(self, subject: Subject, condition: Condition, instead_of: int | None) -> Row:
        turns = list(subject.measured(condition).values())
        latency = percentiles([turn.latency_s for turn in turns])
        whole = sum(turn.latency_s for turn in turns)
        memory = {m.batch_size: m for m in subject.memory}.get(condition.batch_size)
        same, eager = (self.subject(self.baseline.name, backend) for backend in (subject.backend, EAGER))
        share = sum(sum(turn.network_latency_s) for turn in turns) / whole
        return Row(
            model=subject.model,
            backend=subject.backend,
            batch_size=condition.batch_size,
            num_inference_steps=condition.num_inference_steps,
            latency_s=latency,
            step_latency_s=percentiles([step for turn in turns for step in turn.step_latency_s]),
            images_per_second=condition.batch_size / latency.p50,
            network_share=share,
            peak_memory_bytes=None if memory is None else memory.peak_memory_bytes,
            pruning=self.speed_up(subject, same, condition, instead_of),
            total=self.speed_up(subject, eager, condition, instead_of),
            instead_of=instead_of,
            peak_device_memory_bytes=None if memory is None else memory.peak_device_memory_bytes,
            parts={name: sum(turn.parts_s.get(name, 0.0) for turn in turns) / whole for name in turns[0].parts_s},
            ceiling=1 / (1 - share) if share < 1 else None,
            light=self._light(subject, turns),
            energy_j_per_image=_median([turn.energy_j for turn in turns], condition.batch_size),
        )

    def _light(self, subject: Subject, turns: Sequence[Turn]) -> float | None:
        """Return the network's FLOP/s over the machine's; None where they are unlike (other precisions) or unknown."""
        rows = turns[0].network_batch_size
        if not self.peak_flops or rows is None or subject.precision != "fp32" or subject.backend in INEXACT:
            return None
        model = self.model(subject.model)
        call = percentiles([latency for turn in turns for latency in turn.network_latency_s]).p50
        return fraction(model.macs, model.attention_macs, rows, call, max(self.peak_flops))

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values: the fields, and the derived summary."""
        summary = [dataclasses.asdict(row) for row in self.rows]
        return json.loads(json.dumps(dataclasses.asdict(self) | {"summary": summary}, allow_nan=False))


def _median(values: Sequence[float | None], images: int) -> float | None:
    """Return the median per image; None unless all of them are known."""
    known = [value for value in values if value is not None]
    return percentiles(known).p50 / images if known and len(known) == len(values) else None


def difference(one: Figure, other: Figure) -> Estimate | None:
    """Return `one` - `other` of the same metric with its paired interval; None where the samples do not pair up."""
    if one.count != other.count or len(one.replicates) != len(other.replicates):
        return None
    low, high = interval([a - b for a, b in zip(one.replicates, other.replicates, strict=True)])
    return Estimate(one.value - other.value, low, high, one.count)
