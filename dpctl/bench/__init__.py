"""Measure subjects against one another: one process each, turns interleaved, ratios paired.

A subject is one model on one backend. Its process is fresh: the memory pass comes first, then the turns, in which every
subject in the same round draws the same images, then the samples that the quality is judged by.
"""

import hashlib
import shlex
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dpctl import environment, progress, registry
from dpctl.bench import drawing, painter, quality, stability, subjects
from dpctl.bench.document import write_result
from dpctl.bench.measuring import Measurement, Run
from dpctl.bench.metrics._features import FeatureSpace
from dpctl.bench.process import Worker
from dpctl.bench.result import SCHEMA_VERSION, BenchResult, Model
from dpctl.data import read_prompts
from dpctl.errors import DpctlError
from dpctl.models import resolve
from dpctl.recipe import BenchRecipe, ExportRecipe, to_dict
from runtime import BACKENDS
from runtime.schedulers import check_scheduler


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
    prompts = read_prompts(Path(recipe.prompts)) if recipe.prompts is not None else ()
    for model in models:
        painter.check_prompts(resolve(model.source), prompts, recipe.guidance_scale)
    subjects.require_one_shape(models)
    threads = recipe.threads or default_threads()
    space = space or quality.feature_space(recipe, subjects.shape(models[0]), out, bar)
    entries = subjects.prepare(recipe, models, exported, bar)
    processes = processes or drawing.Crew()
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        machine = stack.enter_context(Worker("the machine", threads))
        runs = [Run(entry, threads, stack) for entry in entries]
        measurement = Measurement(runs, machine, recipe, threads, prompts)
        measurement.take(bar)
        if not any(run.turns for run in runs if run.entry.baseline):
            if measurement.interrupted:
                raise KeyboardInterrupt
            raise nothing_measured(runs)
        samples = draw(measurement, models, out, bar, processes)
    with bar("judge", max(1, len(samples))) as advance:
        texts = tuple(prompts[index % len(prompts)] for index in range(recipe.samples)) if prompts else None
        asked: dict[str, Any] = {"prompts": texts, "clip": recipe.clip}
        judged = quality.assess(samples, out, models[0].name, space, **asked, advance=advance)
    result = BenchResult(
        schema_version=SCHEMA_VERSION,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        command=typed_command(),
        recipe=to_dict(recipe),
        threads=threads,
        environment=surroundings(measurement, processes),
        features=space.description if space is not None and samples else None,
        models=models,
        subjects=tuple(run.subject() for run in runs),
        quality=judged,
        fewer_steps=tuple(measurement.fewer),
        peak_flops=tuple(measurement.peak_flops),
        interrupted=measurement.interrupted,
    )
    result = stability.with_warnings(result)
    write_result(result, out)
    return result


def draw(
    measurement: Measurement, models: Sequence[Model], out: Path, bar: progress.Bar, processes: drawing.Crew
) -> list[quality.Samples]:
    """Draw the samples for the quality; none after Ctrl-C, which may also come meanwhile."""
    if measurement.interrupted:
        return []
    try:
        return drawing.draw_samples(
            measurement.runs, models, measurement.recipe, out, bar, processes, measurement.fewer
        )
    except KeyboardInterrupt:
        measurement.interrupted = True
        return []


def surroundings(measurement: Measurement, processes: drawing.Crew) -> dict[str, Any]:
    """Return the machine and what it did meanwhile, who drew the samples, and a digest of what the prompts say."""
    found = environment.describe() | measurement.around | {"samples_drawn_by": processes.drawn}
    if measurement.prompts:
        found["prompts_digest"] = hashlib.sha256("\n".join(measurement.prompts).encode()).hexdigest()
    return found


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
    for backend in (*recipe.backends, *recipe.baselines):
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
    check_precision(recipe)
    quality.check(recipe)


def check_precision(recipe: BenchRecipe) -> None:
    """Raise a DpctlError for a precision that no backend knows."""
    from export.to_onnx import check as check_export

    check_export(ExportRecipe(precision=recipe.precision))


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
