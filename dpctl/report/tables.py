"""A report's tables, as plain text: the terminal, Markdown and HTML show the same cells."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Protocol

from dpctl import asked, units
from dpctl.bench.compare import Estimate, Percentiles
from dpctl.bench.metrics import Figure
from dpctl.bench.result import (
    DENOISER,
    INEXACT,
    OTHER,
    OWN_WEIGHTS,
    VAE,
    BenchResult,
    Model,
    Quality,
    Row,
    Subject,
)  # fmt: skip

# Columns of text stand left, figures right.
TEXT = frozenset({"model", "backend", "kind", "metric", "left out", "vs baseline, same backend", "vs baseline, eager"})


@dataclass(frozen=True)
class Table:
    """A table of text; `marks` are the rows that show the baseline."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marks: frozenset[int] = frozenset()

    def without(self, *headings: str) -> "Table":
        """Return the table without some of its columns."""
        kept = [i for i, heading in enumerate(self.headings) if heading not in headings]
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return Table(self.title, tuple(self.headings[i] for i in kept), rows, self.note, self.marks)


class LayerTimes(Protocol):
    """A layer before and after pruning, as `dpctl.bench.layers` tells it; `followed` is None where nobody can say."""

    @property
    def name(self) -> str: ...
    @property
    def macs_before(self) -> int: ...
    @property
    def macs_after(self) -> int: ...
    @property
    def latency_before_s(self) -> float: ...
    @property
    def latency_after_s(self) -> float: ...
    @property
    def followed(self) -> float | None: ...


def tables(result: BenchResult, layers: Mapping[str, Iterable[LayerTimes]] | None = None) -> list[Table]:
    """Return the tables that have lines; `layers` has by subject those to be told one by one."""
    found = [speed(result).without("peak memory"), quality(result), time(result), memory(result), models(result)]
    found += [
        latency_targets(result),
        saving(result),
        *(layer_table(name, rows) for name, rows in (layers or {}).items()),
    ]
    return [table for table in found if table.rows]


def brief(result: BenchResult) -> list[Table]:
    """Return the tables for a terminal: the main columns."""
    found = [speed(result).without("a step, p50 / p90"), models(result), quality(result)]
    return [table for table in found if table.rows]


def speed(result: BenchResult) -> Table:
    """Return the table of latency, throughput, memory and speed-ups: one line per subject and condition."""
    rows = tuple(
        (
            *_place(row),
            *(_percentiles(row.latency_s), _percentiles(row.step_latency_s)),
            f"{row.images_per_second:.3g}",
            "" if row.peak_memory_bytes is None else units.bytes_(row.peak_memory_bytes),
            *(ratio(row.pruning), ratio(row.total)),
        )
        for row in result.rows
    )
    headings = ("a batch, p50 / p90", "a step, p50 / p90", "images/s", "peak memory")
    return Table(
        "Speed",
        (*PLACE, *headings, "vs baseline, same backend", "vs baseline, eager"),
        rows,
        f"Medians of paired ratios over {result.recipe['rounds']} rounds, 95 % intervals, {result.threads} thread(s). "
        f"The last column holds the backend's part and the pruning's together."
        f"{_precisions(result)}{_fewer(result)}{_saved(result)}",
        _marks(result, result.rows),
    )


PLACE = ("model", "backend", "batch", "steps")


def _precisions(result: BenchResult) -> str:
    """Say what the networks are in; nothing where all are in float32."""
    found: dict[str, list[str]] = {}
    for subject in result.subjects:
        if subject.turns:
            found.setdefault(subject.precision, []).append(subject.name)
    if len(found) == 1:
        (only,) = found
        return "" if only == "fp32" else f" All networks are in {only}."
    return "".join(f" In {precision}: {', '.join(names)}." for precision, names in found.items())


def _fewer(result: BenchResult) -> str:
    if not result.fewer_steps:
        return ""
    fewer, asked = result.fewer_steps[0].fewer, result.fewer_steps[0].num_inference_steps
    return (
        f" {steps(fewer, asked)} steps: the baseline with {fewer}, in about the time of a candidate with {asked}; "
        f"it is compared with the baseline with {asked}."
    )


def _place(row: Row) -> tuple[str, str, str, str]:
    return row.model, row.backend, str(row.batch_size), steps(row.num_inference_steps, row.instead_of)


def steps(taken: int, instead_of: int | None) -> str:
    """Write a number of steps, and the one in whose place the baseline takes it."""
    return str(taken) if instead_of is None else f"{taken} for {instead_of}"


def _marks(result: BenchResult, rows: Iterable[Row | Quality | Subject]) -> frozenset[int]:
    return frozenset(i for i, row in enumerate(rows) if row.model == result.baseline.name)


def _percentiles(found: Percentiles) -> str:
    p99 = "" if found.p99 is None else f" (p99 {units.seconds(found.p99)})"
    return f"{units.seconds(found.p50)} / {units.seconds(found.p90)}{p99}"


def ratio(found: Estimate | None) -> str:
    """Write a speed-up with its interval; where the interval holds 1, in words."""
    if found is None:
        return "-"
    within = f"[{found.low:.2f}, {found.high:.2f}]"
    return f"no significant difference {within}" if found.holds(1.0) else f"{units.ratio(found.value)} {within}"


def models(result: BenchResult) -> Table:
    """Return the table of sizes: one line per model."""
    base = result.baseline
    rows = tuple(
        (
            *(model.name, model.kind),
            _share(model.params, base.params, units.count),
            _share(model.macs, base.macs, units.count),
            units.count(model.attention_macs),
            _share(model.file_bytes, base.file_bytes, units.bytes_),
        )
        for model in result.models
    )
    headings = ("model", "kind", "parameters", "MACs", "attention products", "on disk")
    return Table("Size", headings, rows, marks=frozenset({0}))


def _share(value: int, whole: int, text: Callable[[float], str]) -> str:
    return text(value) if value == whole or not whole else f"{text(value)} ({units.percent(value / whole)})"


def quality(result: BenchResult) -> Table:
    """Return the table of quality: one line per set of samples."""
    names = sorted({name for found in result.quality for name in found.figures})
    rows = tuple(
        (
            *(found.model, found.backend, steps(found.num_inference_steps, instead_of(result, found))),
            *(interval(found.figures[n]) if n in found.figures else "-" for n in names),
        )
        for found in result.quality
    )
    arrows = {"lower": "lower is better", "higher": "higher is closer"}
    better = {n: f.better for found in result.quality for n, f in found.figures.items()}
    note = "; ".join(f"{n.upper()}: {arrows[better[n]]}" for n in names if n in better)
    every = list(dict.fromkeys(q.model for q in result.quality))
    reasons = []
    for name in sorted({name for q in result.quality for name in q.left_out}):
        # Nothing is compared with itself.
        lacking = [q for q in result.quality if q.model != result.baseline.name or name not in better]
        for why, models in by_words((q.model, q.left_out.get(name, "")) for q in lacking):
            of = "" if models == every else f" of {', '.join(models)}"
            reasons.append(f"{name.upper()}{of}: {why}")
    headings = ("model", "backend", "steps", *(n.upper() for n in names))
    return Table("Quality", headings, rows, ". ".join(filter(None, [note, *reasons])), _marks(result, result.quality))


def by_words(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Return what is said with the names that it is said of, in the order of the first; nothing said is left out."""
    found: dict[str, list[str]] = {}
    for name, words in pairs:
        if words and name not in found.setdefault(words, []):
            found[words].append(name)
    return list(found.items())


def instead_of(result: BenchResult, found: Quality) -> int | None:
    """Return the number of steps in whose place the baseline's samples have fewer; None for all others."""
    if found.model != result.baseline.name or found.num_inference_steps in result.recipe["num_inference_steps"]:
        return None
    asked = (f.num_inference_steps for f in result.fewer_steps if f.fewer == found.num_inference_steps)
    return next(asked, None)


def interval(found: Figure) -> str:
    """Write a quality figure with its interval."""
    return f"{found.value:.3g} [{found.low:.3g}, {found.high:.3g}]"


def time(result: BenchResult) -> Table:
    """Return the table of what an image's time and energy went into: one line per subject and condition."""
    names = list(dict.fromkeys(name for row in result.rows for name in shares(row)))
    energy = any(row.energy_j_per_image is not None for row in result.rows)
    rows = tuple(
        (
            *_place(row),
            *(units.percent(shares(row)[name]) if name in shares(row) else "-" for name in names),
            "-" if row.ceiling is None else units.ratio(row.ceiling),
            "-" if row.light is None else units.percent(row.light),
            *([_energy(row.energy_j_per_image)] if energy else []),
        )
        for row in result.rows
    )
    headings = (*PLACE, *map(part, names), "ceiling", "speed of light", *(["energy an image"] if energy else []))
    return Table("Where the time goes", headings, rows, f"{_CEILING}{_light(result)}", _marks(result, result.rows))


_CEILING = "Ceiling: how many times faster an image would be if the network took no time at all."


def part(name: str) -> str:
    """Return the name of a part of the time as people write it."""
    return {VAE: "VAE"}.get(name, name)


def shares(row: Row) -> dict[str, float]:
    """Return the shares of the latency by part; the network's and the rest's where no more is known."""
    return row.parts or {DENOISER: row.network_share, OTHER: 1 - row.network_share}


def _light(result: BenchResult) -> str:
    if not result.peak_flops:
        return ""
    peak = units.count(max(result.peak_flops))
    return (
        " Speed of light: the network's FLOP/s over those of a large matrix product in float32, with the same threads "
        f"in the same rounds: {peak} FLOP/s at its best reading."
    )


def _energy(joules: float | None) -> str:
    return "-" if joules is None else f"{joules:.3g} J"


def memory(result: BenchResult) -> Table:
    """Return the table of what a subject takes before and while it draws: one line per subject."""
    sizes = sorted({m.batch_size for subject in result.subjects for m in subject.memory})
    device = any(m.peak_device_memory_bytes is not None for s in result.subjects for m in s.memory)
    built = any(subject.build_latency_s is not None for subject in result.subjects)
    rows = []
    for subject in result.subjects:
        peaks = {m.batch_size: m for m in subject.memory}
        host = [_bytes(peaks[n].peak_memory_bytes if n in peaks else None) for n in sizes]
        there = [_bytes(peaks[n].peak_device_memory_bytes if n in peaks else None) for n in sizes] if device else []
        starts = [subject.first_image_latency_s, *([subject.build_latency_s] if built else [])]
        told = ["-" if value is None else units.seconds(value) for value in starts]
        opened = _bytes(subject.open_peak_memory_bytes)
        rows.append((subject.model, subject.backend, subject.precision, opened, *host, *there, *told))
    headings = ("model", "backend", "precision", "peak, opening", *(f"peak, batch {n}" for n in sizes))
    headings += tuple(f"on the device, batch {n}" for n in sizes) if device else ()
    headings += ("first image", *(["built before in"] if built else []))
    note = (
        "Peak memory beyond what the imported libraries take. The first image's time is from the request to open the "
        "model to its first picture, what the backend builds on the way included."
    )
    return Table("Memory and start", headings, tuple(rows), note, _marks(result, result.subjects))


def _bytes(value: int | None) -> str:
    return "-" if value is None else units.bytes_(value)


def latency_targets(result: BenchResult) -> Table:
    """Return the table of what pruning was asked of a latency, and of the candidates for it."""
    found = {model.name: model.latency for model in result.models if model.latency is not None}
    rows = tuple(
        (name, macs, predicted or "-", measured or asked.UNMEASURED, "chosen" if chosen else "")
        for name, told in found.items()
        for macs, predicted, measured, chosen in asked.candidates(told)
    )
    headings = ("model", "MACs", "predicted", "measured", "")
    goals = "; ".join(f"{name}: {asked.goal(told)}" for name, told in found.items())
    note = f"Shares of the unpruned model's latency, when it was pruned. Asked: {goals}."
    return Table("Latency asked of pruning", headings, rows, note)


def saving(result: BenchResult) -> Table:
    """Return the table of MACs against milliseconds: what part of the MACs that were saved became time."""
    first = result.recipe["num_inference_steps"][0]
    rows = tuple(
        (
            *(row.model, row.backend, str(row.batch_size), units.percent(saved)),
            f"{units.percent(1 - 1 / found.value)} [{_percent(1 - 1 / found.low)}, {_percent(1 - 1 / found.high)}]",
            "nothing" if found.holds(1.0) else units.percent((1 - 1 / found.value) / saved),
        )
        for row, found, saved in _savings(result)
        if row.num_inference_steps == first
    )
    headings = ("model", "backend", "batch", "MACs saved", "time saved", "of the MACs saved, became time")
    note = f"At {first} steps, over the baseline on the same backend: the whole image, not the network alone."
    return Table("MACs against milliseconds", headings, rows, note)


def _savings(result: BenchResult) -> Iterable[tuple[Row, Estimate, float]]:
    """Yield the candidates' lines with their speed-ups and the share of MACs that they save."""
    for row in result.rows:
        saved = 1 - result.model(row.model).macs / result.baseline.macs
        if row.model != result.baseline.name and row.pruning is not None and saved > 0 and row.backend not in INEXACT:
            yield row, row.pruning, saved


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.1f}"


def became_time(result: BenchResult, model: Model) -> list[tuple[Row, float]]:
    """Return the lines that speak for a model, with the part of its MAC saving that became time, where any did."""
    chosen = chosen_rows(result, model)
    return [(r, (1 - 1 / found.value) / saved) for r, found, saved in _savings(result) if r in chosen and found.low > 1]


def _saved(result: BenchResult) -> str:
    told = [
        f"{units.percent(fraction)} at batch {row.batch_size} ({model.name})"
        for model in result.models[1:]
        for row, fraction in became_time(result, model)
    ]
    return f" Of the MACs saved, this part became time saved: {', '.join(told)}." if told else ""


def chosen_rows(result: BenchResult, model: Model) -> list[Row]:
    """Return the lines that speak for a model: one per batch size, at the first number of steps, best on an engine."""
    backends = {row.backend for row in result.rows if row.model == model.name}
    chosen = min(backends, key=lambda name: (name in INEXACT, name in OWN_WEIGHTS, name), default=None)
    first = result.recipe["num_inference_steps"][0]
    asked = (model.name, chosen, first, None)
    return [r for r in result.rows if (r.model, r.backend, r.num_inference_steps, r.instead_of) == asked]


def layer_table(subject: str, layers: Iterable[LayerTimes]) -> Table:
    """Return the table of single layers of a candidate beside the baseline's."""
    rows = tuple(
        (
            layer.name,
            f"{units.count(layer.macs_before)} to {units.count(layer.macs_after)}",
            f"{units.seconds(layer.latency_before_s)} to {units.seconds(layer.latency_after_s)}",
            "-" if layer.followed is None else units.percent(layer.followed),
        )
        for layer in layers
    )
    return Table(f"Layers of {subject}", ("layer", "MACs", "time", "of the MACs saved, became time"), rows)


def lineage(result: BenchResult) -> Table:
    """Return what led to each model, oldest first."""
    rows = []
    for model in result.models:
        for entry in model.lineage or ({"kind": model.kind, "digest": model.digest, "recipe": {}},):
            recipe = ", ".join(f"{key} {value}" for key, value in entry["recipe"].items())
            rows.append((model.name, entry["kind"], entry["digest"][:12], recipe))
    return Table("Lineage", ("model", "kind", "digest", "recipe"), tuple(rows))
