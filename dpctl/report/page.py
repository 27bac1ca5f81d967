"""What a report says in words: the terminal, Markdown and HTML show the same."""

import shlex
from collections.abc import Sequence
from typing import Any

from dpctl import units
from dpctl.bench import front
from dpctl.bench.compare import Estimate
from dpctl.bench.result import INEXACT, BenchResult, Model, Quality, Row, difference
from dpctl.report import over_latency
from dpctl.report.tables import became_time, by_words, chosen_rows, interval, ratio

METHOD = (
    "Each subject (a model on a backend) runs in a fresh process of its own, with the same number of threads, and "
    "waits on a pipe without using the processor while it is another's turn. In each round every subject draws the "
    "same images from the same noise, one after the other, in an order that changes from round to round; before that "
    "each warms up until two turns take about the same time. A speed-up is the median over rounds of baseline time / "
    "subject time of the same round; brackets are bootstrap 95 % intervals of that median, and of the quality figures "
    "over samples. Peak memory is resident memory while drawing, beyond what the imported libraries take, in a pass "
    "before the turns. "
    "MACs count convolutions and linear layers of one forward pass at batch 1."
)
# So many candidates have room in a title and a paragraph.
FEW = 3
# FID's bias at this many samples no longer decides between two models of this size.
MANY_SAMPLES = 10_000


def title(result: BenchResult) -> str:
    """Return the page's title."""
    names = [model.name for model in result.models[1:]]
    others = ", ".join(names) if len(names) <= FEW else f"{len(names)} models"
    return f"{others} against {result.baseline.name}" if others else result.baseline.name


def judged(result: BenchResult, model: Model) -> Quality | None:
    """Return a model's own quality at the first number of steps; an approximation's where nothing else was measured."""
    first = result.recipe["num_inference_steps"][0]
    found = [q for q in result.quality if (q.model, q.num_inference_steps) == (model.name, first)]
    exact = [q for q in found if q.approximation is None]
    if exact or any(row.backend not in INEXACT for row in chosen_rows(result, model)):
        return exact[0] if exact else None
    return found[0] if found else None


def verdicts(result: BenchResult) -> list[str]:
    """Say in a sentence or two what was bought and what it cost: all candidates in one text, or of many a text each."""
    told = [_verdict(result, model) for model in result.models[1:]]
    return told if len(told) > FEW else [" ".join(told) or "Only the baseline was measured."]


def _verdict(result: BenchResult, model: Model) -> str:
    base = result.baseline
    rows = [row for row in chosen_rows(result, model) if row.pruning is not None]
    cost = f"{model.name} takes {units.percent(model.macs / base.macs)} of {base.name}'s MACs"
    if not rows:
        return f"{cost}; its speed was not compared."
    told = " and ".join(f"{_speed(row.pruning)} at batch {row.batch_size}" for row in rows if row.pruning is not None)
    worse, words = _quality_verdict(judged(result, model), judged(result, base))
    speed_of = f"its speed in {rows[0].backend}, relative to {base.name}, is {told}"
    against = _against_fewer_steps(result, model, rows[0])
    return f"{cost}; {speed_of}{words}. {_conclusion(rows, worse)}{against}"


def _against_fewer_steps(result: BenchResult, model: Model, row: Row) -> str:
    """Say how a candidate stands against the baseline with fewer steps, at a line's backend and batch size."""
    where = row.backend, row.batch_size
    ours, theirs = (over_latency.curve(result, each.name, *where) for each in (model, result.baseline))
    if not ours or len(theirs) < 2 or over_latency.distance(result) != "fid":
        return ""
    found = front.compare_curves(ours, theirs)
    return f" {front.verdict(found, model.name, result.baseline.name, row.backend)}"


def _speed(found: Estimate) -> str:
    return f"not significantly different [{found.low:.2f}, {found.high:.2f}]" if found.holds(1.0) else ratio(found)


def _conclusion(rows: list[Row], worse: bool | None) -> str:
    faster = [row.batch_size for row in rows if row.pruning is not None and row.pruning.low > 1]
    if not faster:
        return "It is not faster."
    where = "" if len(faster) == len(rows) else f" at batch {' and '.join(map(str, faster))} only"
    if worse is None:
        return f"It is faster{where}; its quality was not judged."
    return f"It is faster{where}, {'at a price in quality' if worse else 'and no worse by these samples'}."


def _quality_verdict(ours: Quality | None, theirs: Quality | None) -> tuple[bool | None, str]:
    """Return whether the candidate is significantly worse (None: not known) and the words for it."""
    if ours is None or theirs is None or not {"fid"} <= ours.figures.keys() & theirs.figures.keys():
        return None, ""
    one, other = ours.figures["fid"], theirs.figures["fid"]
    apart = difference(one, other)
    words = f"; FID {interval(one)} against {interval(other)} over {one.count} samples"
    if apart is None:
        return None, words
    same = ", no significant difference" if apart.holds(0.0) else ""
    return apart.low > 0, words + same


def headlines(result: BenchResult) -> list[tuple[str, str, str]]:
    """Return the figures to show large for the first candidate: (figure, what it is, its interval or comparison)."""
    if len(result.models) < 2:
        return []
    base, model = result.models[:2]
    found = [
        (f"{row.pruning.value:.2f}x", f"speed at batch {row.batch_size}, both in {row.backend}", _within(row.pruning))
        for row in chosen_rows(result, model)[:2]
        if row.pruning is not None
    ]
    parameters = f"{units.percent(model.params / base.params)} of the parameters"
    change = f"{units.count(base.macs)} to {units.count(model.macs)}"
    found.append((units.percent(model.macs / base.macs), f"of the MACs; {parameters}", change))
    found += [
        (units.percent(part), f"of the MACs saved became time, batch {row.batch_size}", f"in {row.backend}")
        for row, part in became_time(result, model)[:1]
    ]
    ours, theirs = judged(result, model), judged(result, base)
    if ours is not None and theirs is not None and "fid" in ours.figures and "fid" in theirs.figures:
        found.append((f"{ours.figures['fid'].value:.3g}", f"FID; {base.name} has {theirs.figures['fid'].value:.3g}",
                      f"95 % in [{ours.figures['fid'].low:.3g}, {ours.figures['fid'].high:.3g}]"))  # fmt: skip
    if ours is not None and "ssim" in ours.figures:
        ssim = ours.figures["ssim"]
        found.append(
            (f"{ssim.value:.2f}", f"SSIM to {base.name}, same noise", f"95 % in [{ssim.low:.2f}, {ssim.high:.2f}]")
        )
    return found


def _within(found: Estimate) -> str:
    return "no significant difference" if found.holds(1.0) else f"95 % in [{found.low:.2f}, {found.high:.2f}]"


def labels(result: BenchResult) -> list[str]:
    """Return what a reader must know to take the figures for what they are."""
    found = [f"{', '.join(names)}: {words}" for words, names in by_words((m.name, _training(m)) for m in result.models)]
    if result.quality:
        count = max(f.count for q in result.quality for f in q.figures.values()) if _figures(result) else 0
        few = "; with so few, FID is inflated, for all alike" if count < MANY_SAMPLES else ""
        found.append(f"quality rests on {count} samples per model{few}")
        backends = sorted({q.backend for q in result.quality} - INEXACT)
        found.append(f"samples were drawn on one backend per model ({', '.join(backends)}){_parity(result)}")
    found += [
        f"{name} does not compute the whole network at every step: it is judged by samples of its own"
        for name in sorted(INEXACT & {subject.backend for subject in result.subjects})
    ]
    notes = {(n, f.against.partition("; ")[2]) for q in result.quality for n, f in q.figures.items()}
    found += [f"{name}: {note}" for name, note in sorted(notes) if note]
    if result.features:
        found.append(
            f"FID and KID use these features: {result.features['about']}; they compare the models here, and what is "
            "published only where network, resizing, real images and sample count are the same"
        )
    return found


def _figures(result: BenchResult) -> bool:
    return any(found.figures for found in result.quality)


def _training(model: Model) -> str:
    """Say how long a model was trained and finetuned, as far as its lineage tells."""
    steps = {entry["kind"]: entry["recipe"] for entry in model.lineage if "steps" in entry.get("recipe", {})}
    trained, finetuned = steps.get("trained"), steps.get("finetuned")
    if finetuned is None:
        if model.kind == "pruned":
            return "pruned, and not finetuned"
        return f"trained for {trained['steps']} steps" if trained else ""
    share = f" ({units.percent(finetuned['steps'] / trained['steps'])} of the training)" if trained else ""
    if finetuned.get("from_scratch"):
        return f"its slim architecture trained from random weights for {finetuned['steps']} steps{share}"
    return f"a short finetune of {finetuned['steps']} steps{share}"


def _parity(result: BenchResult) -> str:
    worst = [s.parity["worst"]["relative_l2"] for s in result.subjects if s.parity and "worst" in s.parity]
    return f"; exports differ from torch by {max(worst):.1e} at most (relative L2)" if worst else ""


def environment(result: BenchResult) -> list[tuple[str, str]]:
    """Return what the figures were measured with, as pairs of text."""
    told = result.environment
    busy = told.get("other_processes_busy_cores")
    pairs = {
        "processor": told.get("processor"),
        "GPU": told.get("gpu"),
        "GPU clock": _clock([state for rounds in told.get("gpu_states", {}).values() for state in rounds]),
        "large matrix product, float32": _peak(result.peak_flops),
        "threads of each subject": result.threads,
        "load average before, after": f"{told.get('load_average_before')}, {told.get('load_average_after')}",
        "other processes' load": None if busy is None else f"{busy:.2f} cores",
        "frequency governor": told.get("governor") or "not known",
        "system": told.get("system"),
        "dpctl": told.get("dpctl"),
        "Python": told.get("python"),
        "libraries": ", ".join(f"{name} {version}" for name, version in told.get("libraries", {}).items()),
        "scheduler": result.recipe["scheduler"],
        "seed": result.recipe["seed"],
        "measured": result.created,
    }
    return [(name, str(value)) for name, value in pairs.items() if value is not None]


def _clock(states: list[dict[str, Any]]) -> str | None:
    """Say between what the GPU's clock moved, and what held it back; None without a GPU that says it."""
    clocks = [state["clock_hz"] for state in states if state["clock_hz"] is not None]
    if not clocks:
        return None
    reasons = sorted({reason for state in states for reason in state["held_back_by"]})
    return f"{_range(clocks)}Hz{', held back by ' + ', '.join(reasons) if reasons else ''}"


def _peak(readings: Sequence[float]) -> str | None:
    return f"{_range(readings)}FLOP/s" if readings else None


def _range(values: Sequence[float]) -> str:
    ends = dict.fromkeys(units.count(value) for value in (min(values), max(values)))
    return " to ".join(ends)


def repeat_command(result: BenchResult) -> str:
    """Return the command that measures the same again."""
    recipe = result.recipe

    def joined(name: str) -> str:
        return ",".join(str(value) for value in recipe[name])

    options = {
        "--backend": joined("backends"),
        "--batch-size": joined("batch_sizes"),
        "--num-inference-steps": joined("num_inference_steps"),
        **{f"--{name}": str(recipe[name]) for name in ("scheduler", "rounds", "samples", "seed")},
        "--threads": str(result.threads),
        "--precision": recipe.get("precision", "fp32"),
        "--baselines": ",".join(recipe.get("baselines", ())),
    }
    files = ("features", "real_images", "clip")
    options |= {f"--{name.replace('_', '-')}": recipe[name] for name in files if recipe.get(name) is not None}
    words = ["dpctl", "bench", recipe["baseline"], *recipe["candidates"], "--out", "report"]
    flags = ["--fewer-steps" if recipe.get("fewer_steps") else "--no-fewer-steps"]
    return shlex.join([*words, *(word for pair in options.items() for word in pair), *flags])
