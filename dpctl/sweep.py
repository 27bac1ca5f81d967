"""`dpctl sweep`: criteria, targets and lengths of finetuning against one another, in one report.

Every cell of the grid is the stages of `dpctl run` below a directory of its own, skipped where they are done; cells
that differ in the length of the finetune alone share their cut. One bench measures all of them beside the unpruned
model, which is drawn with fewer steps too: the page's front of quality over latency is the answer.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpctl import chain, progress
from dpctl.errors import DpctlError, MetAlready, OutOfReach
from dpctl.latency.goal import read_goal
from dpctl.recipe import TARGETS, FinetuneRecipe, LatencyRecipe, PruneRecipe, SweepRecipe, to_dict


@dataclass(frozen=True)
class Cut:
    """One criterion at one target; `name` is the directory below the sweep's."""

    name: str
    recipe: PruneRecipe


def cuts(recipe: SweepRecipe) -> tuple[Cut, ...]:
    """Return the cuts of a sweep: every criterion at every target."""
    return tuple(
        Cut(f"{criterion}/{name}", dataclasses.replace(recipe.prune, criterion=criterion, **aim))
        for criterion, (name, aim) in itertools.product(recipe.criteria, _aims(recipe))
    )


def _aims(recipe: SweepRecipe) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name of every target and what it changes in the recipe of a cut."""
    blank: dict[str, Any] = {"ratio": None, "target_macs": None, "target_params": None, "latency": None}
    for share in recipe.target_macs:
        yield f"macs-{share:g}", blank | {"target_macs": share}
    for target in recipe.target_latency:
        where = recipe.prune.latency or LatencyRecipe()
        name = target.replace(" ", "")
        yield f"latency-{name}", blank | {"latency": dataclasses.replace(where, target=target)}


def check(recipe: SweepRecipe) -> None:
    """Raise a DpctlError for an empty grid, a cell that is there twice, and what any stage of a cell would refuse."""
    grid = {
        "criteria": recipe.criteria,
        "targets": (*recipe.target_macs, *recipe.target_latency),
        "steps": recipe.steps,
    }
    for name, values in grid.items():
        if not values or len(set(values)) != len(values):
            got = ", ".join(map(str, values)) or "none"
            raise DpctlError(f"a sweep needs one or more different {name}", got, "correct the list")
    if any(steps < 0 for steps in recipe.steps):
        got = ", ".join(map(str, recipe.steps))
        raise DpctlError("a finetune has a negative number of steps", got, "give 0 (none) or more")
    _require_read(recipe)
    _require_different(recipe)
    for cut, steps in itertools.product(cuts(recipe), recipe.steps):
        chain.check(as_chain(recipe, cut, max(1, steps)))


def _require_read(recipe: SweepRecipe) -> None:
    """Raise a DpctlError for an entry of a stage's recipe that the grid takes the place of."""
    wanted = recipe.prune.latency or LatencyRecipe()
    taken = (
        ("[prune]", recipe.prune, PruneRecipe(), "criterion", "criteria"),
        *(("[prune]", recipe.prune, PruneRecipe(), name, "target_macs or target_latency") for name in TARGETS),
        ("[prune.latency]", wanted, LatencyRecipe(), "target", "target_latency"),
        ("[finetune]", recipe.finetune, FinetuneRecipe(), "steps", "steps"),
    )
    for table, stage, plain, name, grid in taken:
        if getattr(stage, name) != getattr(plain, name):
            got = f"{table} {name} = {getattr(stage, name)}"
            raise DpctlError("the grid says what every cell does", got, f"leave it out, and give the sweep's {grid}")
    if recipe.prune.latency is not None and not recipe.target_latency:
        raise DpctlError("nothing would read [prune.latency]", "no target_latency", "give some, or leave the table out")


def _require_different(recipe: SweepRecipe) -> None:
    """Raise a DpctlError for two targets that are the same in other words, or of one name."""
    goals = [read_goal(target) for target in recipe.target_latency]
    if len(set(goals)) != len(goals):
        got = ", ".join(recipe.target_latency)
        raise DpctlError("a sweep needs different targets", got, "leave out what is the same in other words")
    names = [name for name, _ in _aims(recipe)]
    if len(set(names)) != len(names):
        raise DpctlError("a sweep needs different targets", ", ".join(names), "give targets of six digits at most")


def as_chain(recipe: SweepRecipe, cut: Cut, steps: int) -> chain.ChainRecipe:
    """Return the recipe that would do one cell by itself."""
    return chain.ChainRecipe(
        model=recipe.model,
        prune=cut.recipe,
        finetune=dataclasses.replace(recipe.finetune, steps=steps),
        export=recipe.export,
        bench=recipe.bench,
    )


def preview(recipe: SweepRecipe) -> dict[str, Any]:
    """Return the recipe as plain values, and the cells; raises as `check`."""
    check(recipe)
    cells = [f"{cut.name}/{_name(steps)}" for cut in cuts(recipe) for steps in recipe.steps]
    return to_dict(recipe) | {"cells": cells}


def sweep(recipe: SweepRecipe, out: Path, *, bar: progress.Bar = progress.no_bar) -> Any:
    """Make every cell of the grid below `out`, measure them all, and return the bench's result.

    A run that was stopped goes on where it was. A target that a cut cannot meet leaves its cells out, which is told
    then and at the end. Raises what the stages raise, and that where no cell is left.
    """
    check(recipe)
    digest = chain.source_digest(recipe.model)
    _rehearse(recipe, out, digest)
    made: list[str] = []
    unmet: dict[str, DpctlError] = {}
    for cut in cuts(recipe):
        folder = out / cut.name
        try:
            pruned = chain.prune_stage(recipe.model, folder / "pruned", cut.recipe, digest, bar)
        except (MetAlready, OutOfReach) as problem:
            unmet[cut.name] = problem
            _tell_unmet(unmet, cut.name)
            continue
        for steps in recipe.steps:
            if steps == 0:
                made.append(str(folder / "pruned"))
                continue
            tuned = dataclasses.replace(recipe.finetune, steps=steps)
            chain.finetune_stage(folder / "pruned", folder / _name(steps), tuned, pruned.digest, bar)
            made.append(str(folder / _name(steps)))
    if not made:
        raise next(iter(unmet.values()))
    measured = dataclasses.replace(
        recipe.bench, baseline=recipe.model, candidates=tuple(made), precision=recipe.export.precision
    )
    result = chain.bench_stage(measured, out / "bench", [], bar)
    for name in unmet:
        _tell_unmet(unmet, name)
    return result


def _rehearse(recipe: SweepRecipe, out: Path, digest: str) -> None:
    """Raise what the cuts to a latency that are not made yet would be refused for at once."""
    from dpctl import latency

    for cut in cuts(recipe):
        if cut.recipe.latency is not None and not chain.is_cut(out / cut.name / "pruned", cut.recipe, digest):
            return latency.rehearse(recipe.model, cut.recipe)  # the others differ in criterion and target alone
    return None


def _tell_unmet(unmet: dict[str, DpctlError], name: str) -> None:
    progress.say(f"{name} is left out: {unmet[name].failed} ({unmet[name].got})")


def _name(steps: int) -> str:
    return f"finetuned-{steps}" if steps else "pruned"
