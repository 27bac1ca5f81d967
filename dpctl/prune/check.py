"""What a prune recipe may say, checked before any model is loaded."""

from dpctl import registry
from dpctl.errors import DpctlError
from dpctl.recipe import FRACTIONS_OF, LAYOUTS, REDUCTIONS, SCOPES, WEIGHTINGS, PruneRecipe

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
    if recipe.layout == "stock" and (recipe.keep or recipe.only):
        raise DpctlError(
            "--layout stock has one width per level",
            f"keep {list(recipe.keep)}, only {list(recipe.only)}",
            "leave --keep and --only out, or use --layout free",
        )
    if recipe.layout == "stock" and recipe.norm_groups:
        raise DpctlError(
            "--layout stock has one number of norm groups for all norms",
            "--norm-groups, which takes groups out of single norms",
            "leave --norm-groups out, or use --layout free",
        )
    registry.check(CRITERIA, recipe.criterion, "criterion")


def _check_target(recipe: PruneRecipe) -> None:
    targets = {"ratio": recipe.ratio, "target_macs": recipe.target_macs, "target_params": recipe.target_params}
    given = {name: value for name, value in targets.items() if value is not None}
    if len(given) != 1:
        raise DpctlError(
            "pruning needs exactly one target",
            ", ".join(given) or "none",
            "give one of --ratio, --target-macs, --target-params",
        )
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
    if min(recipe.align, recipe.images, recipe.timesteps) < 1:
        raise DpctlError(
            "a count is below 1",
            f"align {recipe.align}, images {recipe.images}, timesteps {recipe.timesteps}",
            "give 1 or more",
        )
