"""The recipe's stages in order, skipping what is done: prune, finetune, export, bench.

A stage is done when its output's manifest (or bench file) names the same recipe and the digest of the same input. There
is no state beside the artifacts, so a killed run goes on where it was, and a changed recipe redoes what it changes.
"""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from dpctl import artifact, progress
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError
from dpctl.inspect import Report
from dpctl.models import load_model, resolve
from dpctl.recipe import BenchRecipe, ChainRecipe, FinetuneRecipe, to_dict


def run(recipe: ChainRecipe, out: Path, *, bar: progress.Bar = progress.no_bar) -> Any:
    """Run the chain below `out` and return the bench's result; raises what the stages raise."""
    from dpctl import finetune as finetuning
    from dpctl import prune as pruning

    check(recipe)
    digest = source_digest(recipe.model)
    pruned, finetuned, scratch = out / "pruned", out / "finetuned", out / "scratch"
    cut = _stage(
        pruned,
        to_dict(recipe.prune),
        digest,
        lambda: pruning.prune(recipe.model, pruned, recipe.prune, force=True, bar=bar),
    )
    tuned = _finetune(finetuning, pruned, finetuned, recipe.finetune, cut.digest, bar)
    candidates = [str(finetuned)]
    if recipe.scratch:
        _finetune(finetuning, pruned, scratch, dataclasses.replace(recipe.finetune, from_scratch=True), cut.digest, bar)
        candidates.append(str(scratch))
    _export(recipe, finetuned, out / "exported", tuned.digest, bar)
    measured = dataclasses.replace(recipe.bench, baseline=recipe.model, candidates=tuple(candidates))
    return _bench_stage(measured, out / "bench", [out / "exported"], bar)


def check(recipe: ChainRecipe) -> None:
    """Raise a DpctlError for what any stage would refuse of its recipe: a mistake in the last costs no first one."""
    from dpctl import bench, finetune, prune
    from export.to_onnx import check as check_export

    prune.check(recipe.prune)
    finetune.check(recipe.finetune)
    check_export(recipe.export)
    bench.check(recipe.bench)


def source_digest(model: str) -> str:
    """Return the digest of a model directory's files without loading it."""
    directory = resolve(model)
    manifest = artifact.read_manifest(directory)
    return manifest.digest if manifest is not None else artifact.digest(artifact.hash_files(directory))


def _finetune(
    finetuning: Any, pruned: Path, out: Path, recipe: FinetuneRecipe, digest: str, bar: progress.Bar
) -> Manifest:
    def work() -> Manifest:
        resume = _can_go_on(finetuning, out, recipe, digest)
        return finetuning.finetune(str(pruned), out, recipe, resume=resume, force=True, bar=bar)

    return _stage(out, to_dict(recipe), digest, work)


def _can_go_on(finetuning: Any, out: Path, recipe: FinetuneRecipe, parent: str) -> bool:
    """Tell whether the checkpoints beside `out` are of this recipe and model, so that the run goes on from them."""
    found = finetuning.checkpoint.newest(finetuning.checkpoint.folder_for(out))
    return found is not None and (found.recipe, found.parent) == (to_dict(recipe), parent)


def _export(recipe: ChainRecipe, model: Path, out: Path, digest: str, bar: progress.Bar) -> Manifest:
    from export.to_onnx import export_model

    def work() -> Manifest:
        return export_model(
            load_model(model), out, precision=recipe.export.precision, batch=recipe.export.batch, force=True, bar=bar
        )

    return _stage(out, to_dict(recipe.export), digest, work)


def _stage(out: Path, recipe: dict[str, Any], parent: str, work: Callable[[], Manifest]) -> Manifest:
    """Return the manifest of `out` if it is what this stage would make, else do the work."""
    found = artifact.read_manifest(out) if out.is_dir() else None
    if found is not None and found.recipe == recipe and found.parent == parent and _intact(out, found):
        _say(f"{out.name}: done before, skipped")
        return found
    _say(f"{out.name}: running")
    return work()


def _intact(out: Path, manifest: Manifest) -> bool:
    return artifact.hash_files(out) == manifest.files


def bench(
    recipe: BenchRecipe,
    out: Path,
    *,
    exported: Sequence[Path] = (),
    force: bool = False,
    bar: progress.Bar = progress.no_bar,
) -> Any:
    """Measure, write bench.json, samples/, report.md and report.html into `out`, and return the result.

    `exported` are directories that may serve an engine backend instead of a new export.
    """
    from dpctl import report
    from dpctl.bench import run_bench

    with artifact.writing(out, force=force) as directory:
        result = run_bench(recipe, directory, exported=exported, bar=bar)
        report.write_report(result, directory)
    return result


def _bench_stage(recipe: BenchRecipe, out: Path, exported: Sequence[Path], bar: progress.Bar) -> Any:
    found = _measured(recipe, out)
    if found is not None:
        _say(f"{out.name}: done before, skipped")
        return found
    _say(f"{out.name}: running")
    return bench(recipe, out, exported=exported, force=True, bar=bar)


def _measured(recipe: BenchRecipe, out: Path) -> Any:
    """Return the result in `out` if it is of this recipe and of these models, else None."""
    from dpctl.bench.result import read_result

    if not all((out / name).is_file() for name in ("bench.json", "report.md", "report.html")):
        return None
    try:
        found = read_result(out / "bench.json")
    except DpctlError:
        return None
    digests = [source_digest(name) for name in (recipe.baseline, *recipe.candidates)]
    return found if found.recipe == to_dict(recipe) and found.digests() == digests else None


def bench_report(result: Any, out: Path) -> Report:
    """Return what the bench prints: its table and where the report is."""
    from dpctl import report

    return Report(result.to_dict(), [report.table(result), f"report: {out / 'report.html'}"])


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")
