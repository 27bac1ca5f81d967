"""The recipe's stages in order, skipping what is done: prune, finetune, export, bench.

A stage is done when its output's manifest (or bench file) names the same recipe and the digest of the same input. There
is no state beside the artifacts, so a killed run goes on where it was, and a changed recipe redoes what it changes.

A deep cut may be made in rounds of pruning and distillation, one pair of artifacts each; the unpruned model is the
teacher of all.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpctl import artifact, progress
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError
from dpctl.inspect import Report
from dpctl.models import load_model, resolve
from dpctl.recipe import TARGETS, BenchRecipe, ChainRecipe, FinetuneRecipe, PruneRecipe, differing, to_dict


@dataclass(frozen=True)
class Round:
    """What one round cuts and trains by."""

    prune: PruneRecipe
    finetune: FinetuneRecipe


def run(recipe: ChainRecipe, out: Path, *, bar: progress.Bar = progress.no_bar) -> Any:
    """Run the chain below `out` and return the bench's result; raises what the stages raise."""
    check(recipe)
    finetuned, scratch = out / "finetuned", out / "scratch"
    cut = cut_in_rounds(recipe, out, bar=bar)
    tuned = finetune_stage(out / "pruned", finetuned, recipe.finetune, cut.digest, bar)
    candidates = [str(finetuned)]
    if recipe.scratch:
        finetune_stage(out / "pruned", scratch, _from_scratch(recipe), cut.digest, bar)
        candidates.append(str(scratch))
    _export(recipe, finetuned, out / "exported", tuned.digest, bar)
    # The baseline is exported as the candidate was: fair in precision, and the chain's own export serves.
    precision = recipe.export.precision
    measured = dataclasses.replace(
        recipe.bench, baseline=recipe.model, candidates=tuple(candidates), precision=precision
    )
    return bench_stage(measured, out / "bench", [out / "exported"], bar)


def check(recipe: ChainRecipe) -> None:
    """Raise a DpctlError for what any stage would refuse of its recipe: a mistake in the last costs no first one."""
    from dpctl import bench, finetune, latency, prune
    from export.to_onnx import check as check_export

    if recipe.rounds < 1:
        raise DpctlError("the rounds are below 1", str(recipe.rounds), "give 1 for one cut, or more")
    if recipe.bench.precision not in (BenchRecipe().precision, recipe.export.precision):
        got = f"export {recipe.export.precision}, bench {recipe.bench.precision}"
        raise DpctlError("the chain measures what it exports", got, "leave precision out under [bench]")
    prune.check(recipe.prune)
    if recipe.prune.latency is not None:
        latency.check(recipe.prune)
        if recipe.rounds > 1:
            todo = "give target_macs, target_params or ratio, or one round"
            raise DpctlError("a latency target is met in one cut", f"{recipe.rounds} rounds", todo)
    finetune.check(recipe.finetune)
    finetune.check(recipe.between)
    for each in rounds(recipe):
        prune.check(each.prune)
        finetune.check(each.finetune)
    if recipe.rounds > 1 and recipe.between.data != recipe.finetune.data:
        got = f"between: data {recipe.between.data!r}, finetune: data {recipe.finetune.data!r}"
        raise DpctlError("the rounds would train on other data than the last finetune", got, "give both the same data")
    check_export(recipe.export)
    bench.check(recipe.bench)


def preview(recipe: ChainRecipe) -> dict[str, Any]:
    """Return the recipe as plain values and, where it has several rounds, the recipes of each; raises as `check`."""
    check(recipe)
    if recipe.rounds == 1:
        return to_dict(recipe)
    return to_dict(recipe) | {"schedule": [to_dict(each) for each in rounds(recipe)]}


def rounds(recipe: ChainRecipe) -> list[Round]:
    """Return the recipes of every round; the last is by the chain's own target and finetune.

    Every round takes the same part of what is there, so that what is left falls geometrically to the target.
    """
    if recipe.rounds == 1:
        return [Round(recipe.prune, recipe.finetune)]
    # Of what an earlier round left, a floor and a ratio rounded to whole steps would compound.
    last = dataclasses.replace(recipe.prune, fractions_of="unpruned")
    between = recipe.between
    earlier = [
        # A seed of its own: no round trains on the noise of another.
        Round(_on_the_way(last, number / recipe.rounds), dataclasses.replace(between, seed=between.seed + number))
        for number in range(1, recipe.rounds)
    ]
    return [*earlier, Round(last, recipe.finetune)]


def _on_the_way(recipe: PruneRecipe, part: float) -> PruneRecipe:
    """Return the recipe with the target that is met after this part of the way."""
    if recipe.ratio is not None:
        return dataclasses.replace(recipe, ratio=1.0 - (1.0 - recipe.ratio) ** part)
    name, left = _target(recipe)
    return dataclasses.replace(recipe, **{name: left**part})


def _target(recipe: PruneRecipe) -> tuple[str, float]:
    return next((name, value) for name in TARGETS if (value := getattr(recipe, name)) is not None)


def _from_scratch(recipe: ChainRecipe) -> FinetuneRecipe:
    steps = recipe.finetune.steps + (recipe.rounds - 1) * recipe.between.steps
    return dataclasses.replace(recipe.finetune, from_scratch=True, steps=steps)


def cut_in_rounds(recipe: ChainRecipe, out: Path, *, bar: progress.Bar = progress.no_bar) -> Manifest:
    """Write out/pruned and, of every round before the last, out/rounds/N/pruned and finetuned; return the first's.

    A round that would remove nothing is left out. Widths are a staircase: where a round lands on the last target
    already, the last cut is made in its place, from what the round before it left.
    """
    from dpctl import prune as pruning

    *earlier, last = rounds(recipe)
    model, digest = recipe.model, source_digest(recipe.model)
    if earlier:
        pruning.would_cut(model, last.prune)  # raises where the target is out of reach, before any round
    for number, each in enumerate(earlier, 1):
        told, folder = f"round {number} of {recipe.rounds}", out / "rounds" / str(number)
        if not pruning.would_cut(model, each.prune):
            progress.say(f"{told}: nothing to cut, left out")
            continue
        progress.say("{}: {} {:.4g}".format(told, *_target(each.prune)))
        cut = prune_stage(model, folder / "pruned", each.prune, digest, bar)
        if not pruning.would_cut(str(folder / "pruned"), last.prune):
            progress.say(f"{told}: it meets the last target already, the last cut takes its place")
            break
        tuned = finetune_stage(folder / "pruned", folder / "finetuned", each.finetune, cut.digest, bar)
        model, digest = str(folder / "finetuned"), tuned.digest
    return prune_stage(model, out / "pruned", last.prune, digest, bar)


def prune_stage(model: str, out: Path, recipe: PruneRecipe, digest: str, bar: progress.Bar) -> Manifest:
    """Prune a model of this digest, unless that is done, by the same latency file where it is by one."""
    return _stage(out, recipe, digest, lambda: prune(model, out, recipe, force=True, bar=bar), _by_the_same(recipe))


def is_cut(out: Path, recipe: PruneRecipe, digest: str) -> bool:
    """Tell whether `prune_stage` would skip its work."""
    return _done(out, recipe, digest, _by_the_same(recipe)) is not None


def _by_the_same(recipe: PruneRecipe) -> Callable[[Manifest], bool]:
    """Return what tells whether a cut was planned by the latency file that the recipe names, as it is now."""
    from dpctl import latency

    return lambda found: recipe.latency is None or latency.planned_by(found) == latency.profile_digest(recipe.latency)


def prune(
    model: str, out: Path, recipe: PruneRecipe, *, force: bool = False, bar: progress.Bar = progress.no_bar
) -> Manifest:
    """Prune a model by a recipe, also to a latency, and write the slim one; raises what either raises."""
    from dpctl import latency
    from dpctl import prune as pruning

    carried_out = pruning.prune if recipe.latency is None else latency.prune_to_latency
    return carried_out(model, out, recipe, force=force, bar=bar)


def preview_cut(model: str, recipe: PruneRecipe) -> dict[str, Any]:
    """Return what `prune` would do, as `dpctl.prune.preview`; raises what `prune` would refuse."""
    from dpctl import latency
    from dpctl import prune as pruning

    if recipe.latency is not None:
        latency.check(recipe)
    return pruning.preview(model, recipe)


def source_digest(model: str) -> str:
    """Return the digest of a model directory's files without loading it."""
    directory = resolve(model)
    manifest = artifact.read_manifest(directory)
    return manifest.digest if manifest is not None else artifact.digest(artifact.hash_files(directory))


def finetune_stage(pruned: Path, out: Path, recipe: FinetuneRecipe, digest: str, bar: progress.Bar) -> Manifest:
    """Finetune a pruned model of this digest, unless that is done."""
    from dpctl import finetune as finetuning

    def work() -> Manifest:
        resume = _can_go_on(out, recipe, digest)
        made = finetuning.finetune(str(pruned), out, recipe, resume=resume, force=True, bar=bar)
        assert made is not None  # a chain is one process
        return made

    return _stage(out, recipe, digest, work)


def _can_go_on(out: Path, recipe: FinetuneRecipe, parent: str) -> bool:
    """Tell whether the checkpoints beside `out` are of this recipe and model, so that the run goes on from them."""
    from dpctl.finetune import checkpoint

    found = checkpoint.newest(checkpoint.folder_for(out))
    return found is not None and found.parent == parent and differing(found.recipe, recipe) is None


def _export(recipe: ChainRecipe, model: Path, out: Path, digest: str, bar: progress.Bar) -> Manifest:
    from export.engines import chosen
    from export.to_onnx import export_model

    # What is written down is what was built, not that this machine should choose.
    wanted = chosen(recipe.export)

    def work() -> Manifest:
        return export_model(load_model(model), out, wanted, force=True, bar=bar)

    return _stage(out, wanted, digest, work)


def _stage(
    out: Path,
    recipe: Any,
    parent: str,
    work: Callable[[], Manifest],
    same: Callable[[Manifest], bool] = lambda _: True,
) -> Manifest:
    """Return the manifest of `out` if it is what this stage would make, else do the work.

    `same` compares what the recipe only names.
    """
    if (found := _done(out, recipe, parent, same)) is not None:
        progress.say(f"{out.name}: done before, skipped")
        return found
    progress.say(f"{out.name}: running")
    return work()


def _done(out: Path, recipe: Any, parent: str, same: Callable[[Manifest], bool]) -> Manifest | None:
    found = artifact.read_manifest(out) if out.is_dir() else None
    made = found is not None and differing(found.recipe, recipe) is None and found.parent == parent
    return found if found is not None and made and same(found) and _intact(out, found) else None


def _intact(out: Path, manifest: Manifest) -> bool:
    return artifact.hash_files(out) == manifest.files


def bench(
    recipe: BenchRecipe,
    out: Path,
    *,
    exported: Sequence[Path] = (),
    force: bool = False,
    processes: Any = None,
    bar: progress.Bar = progress.no_bar,
) -> Any:
    """Measure, write bench.json, samples/, report.md and report.html into `out`, and return the result.

    `exported` are directories that may serve an engine backend instead of a new export; `processes` (a
    `dpctl.bench.drawing.Crew`) draw the samples together.
    """
    from dpctl import report
    from dpctl.bench import run_bench

    with artifact.writing(out, force=force) as directory:
        result = run_bench(recipe, directory, exported=exported, processes=processes, bar=bar)
        report.write_report(result, directory)
    return result


def bench_launched(recipe: BenchRecipe, out: Path, *, force: bool, bar: progress.Bar) -> Any:
    """As `bench`, by all processes that a launcher has started; None in those that only help to draw the samples."""
    from dpctl.bench.drawing import crew

    with crew() as processes:
        if processes.rank > 0:
            return processes.follow()
        return bench(recipe, out, force=force, processes=processes, bar=bar)


def bench_stage(recipe: BenchRecipe, out: Path, exported: Sequence[Path], bar: progress.Bar) -> Any:
    """Measure, unless that is done; `exported` as in `bench`."""
    found = _measured(recipe, out)
    if found is not None:
        progress.say(f"{out.name}: done before, skipped")
        return found
    progress.say(f"{out.name}: running")
    return bench(recipe, out, exported=exported, force=True, bar=bar)


def _measured(recipe: BenchRecipe, out: Path) -> Any:
    """Return the result in `out` if it is of this recipe and of these models, else None."""
    from dpctl.bench.document import read_result

    if not all((out / name).is_file() for name in ("bench.json", "report.md", "report.html")):
        return None
    try:
        found = read_result(out / "bench.json")
    except DpctlError:
        return None
    digests = [source_digest(name) for name in (recipe.baseline, *recipe.candidates)]
    same = differing(found.recipe, recipe) is None and found.digests() == digests
    return found if same and not found.interrupted else None


def bench_report(result: Any, out: Path) -> Report:
    """Return what the bench prints: its table and where the report is."""
    from dpctl import report

    return Report(result.to_dict(), [report.table(result), f"report: {out / 'report.html'}"])
