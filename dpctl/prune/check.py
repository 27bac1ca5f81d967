"""What a prune recipe may say, checked before any model is loaded."""

from typing import Any

from dpctl import registry
from dpctl.errors import DpctlError
from dpctl.recipe import FRACTIONS_OF, LAYOUTS, REDUCTIONS, SCOPES, TARGETS, WEIGHTINGS, PruneRecipe

CRITERIA = "dpctl.prune.criteria"


def check(recipe: PruneRecipe) -> None:
    """Raise a DpctlError unless a recipe names one target inside (0, 1) and known, sensible values."""
    _check_target(recipe)
    _check_numbers(recipe)
    for entry, known in (
        ("weighting", WEIGHTINGS),
        ("reduction", REDUCTIONS),
        ("layout", LAYOUTS),
        ("scope", SCOPES),
        ("fractions_of", FRACTIONS_OF),
    ):
        if getattr(recipe, entry) not in known:
            raise DpctlError(f"unknown {entry}", repr(getattr(recipe, entry)), f"choose one of: {', '.join(known)}")
    if any(not pattern.strip() for pattern in (*recipe.keep, *recipe.only)):
        got = f"keep {list(recipe.keep)}, only {list(recipe.only)}"
        raise DpctlError(
            "an empty pattern names no module", got, "give globs over module names, or leave the option out"
        )
    _check_read(recipe, registry.load(CRITERIA, recipe.criterion, "criterion"))


def _check_read(recipe: PruneRecipe, criterion: Any) -> None:
    """Raise a DpctlError for a value that was given and that nothing would read."""
    if recipe.layout == "stock" and (recipe.keep or recipe.only or recipe.floor or recipe.scope != "auto"):
        raise DpctlError(
            "--layout stock has one width per level",
            f"keep {list(recipe.keep)}, only {list(recipe.only)}, floor {recipe.floor:g}, scope {recipe.scope}",
            "leave --keep, --only, --floor and --scope out, or use --layout free",
        )
    if recipe.layout == "stock" and recipe.norm_groups:
        raise DpctlError(
            "--layout stock has one number of norm groups for all norms",
            "--norm-groups, which takes groups out of single norms",
            "leave --norm-groups out, or use --layout free",
        )
    by_itself = "global" if criterion.COMPARABLE and recipe.ratio is None else "local"
    scope = by_itself if recipe.scope == "auto" else recipe.scope
    if recipe.depth and (recipe.layout == "stock" or recipe.floor or scope != "global"):
        raise DpctlError(
            "--depth needs groups that may each lose all of their channels",
            f"layout {recipe.layout}, scope {scope}, floor {recipe.floor:g}",
            "use --layout free and --scope global without --floor, or leave --depth out",
        )
    if recipe.floor and scope != "global":
        raise DpctlError(
            "--floor belongs to --scope global",
            f"floor {recipe.floor:g}, scope {scope}",
            "add --scope global, or leave --floor out",
        )
    for entry in ("weighting", "threshold", "reduction"):
        value = getattr(recipe, entry)
        read = entry in criterion.READS
        if entry == "threshold" and recipe.weighting != "auto":
            read = recipe.weighting == "threshold"
        if value != getattr(PruneRecipe(), entry) and not read:
            raise DpctlError(
                f"--{entry} would not be read",
                f"{entry} {value}, criterion {recipe.criterion}, weighting {recipe.weighting}",
                f"leave --{entry} out, or use a criterion or weighting that follows it",
            )


def _check_target(recipe: PruneRecipe) -> None:
    given = {name: getattr(recipe, name) for name in TARGETS if getattr(recipe, name) is not None}
    names = [*given, *(["target_latency"] if recipe.latency is not None else [])]
    if len(names) != 1:
        raise DpctlError(
            "pruning needs exactly one target",
            ", ".join(names) or "none",
            "give one of --ratio, --target-macs, --target-params, --target-latency",
        )
    if recipe.latency is not None:
        return  # dpctl.latency checks what it has to meet
    name, value = next(iter(given.items()))
    if not 0.0 < value < 1.0:
        raise DpctlError(
            f"--{name.replace('_', '-')} is outside (0, 1)",
            f"{value:g}",
            "give a fraction of the unpruned model, e.g. 0.5",
        )


def _check_numbers(recipe: PruneRecipe) -> None:
    if not 0.0 <= recipe.threshold < 1.0:
        raise DpctlError(
            "--threshold is outside [0, 1)", f"{recipe.threshold:g}", "T is a fraction of the largest loss, e.g. 0.05"
        )
    if not 0.0 <= recipe.floor < 1.0:
        raise DpctlError("--floor is outside [0, 1)", f"{recipe.floor:g}", "give the fraction that each group keeps")
    counts = {name: getattr(recipe, name) for name in ("align", "images", "batch_size", "accumulation", "timesteps")}
    if min(counts.values()) < 1:
        got = ", ".join(f"{name} {value}" for name, value in counts.items())
        raise DpctlError("a count is below 1", got, "give 1 or more")
