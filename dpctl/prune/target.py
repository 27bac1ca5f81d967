"""Recipe + scores -> PruningPlan: which costs a target means, and which widths meet it in either layout."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dpctl.errors import OutOfReach
from dpctl.models import Model
from dpctl.prune.plan import Network, PruningPlan, as_option, check_finite, select, uniform, widths_for_target
from dpctl.prune.unpruned import named_as_before, refer, unpruned_costs
from dpctl.pruned_unet import Removed
from dpctl.recipe import PruneRecipe


def trace(source: Model, recipe: PruneRecipe) -> tuple[Any, Any, Any]:
    """Return the groups that may be cut, what planning knows of them and, in the layout `stock`, the levels."""
    from dpctl.prune.groups import find_groups, restrict
    from dpctl.prune.layout import find_levels
    from dpctl.prune.network import describe

    # The stock class has no other head width.
    whole_heads = recipe.heads or recipe.layout == "stock"
    found = find_groups(source.unet, heads=whole_heads, norm_groups=recipe.norm_groups, depth=recipe.depth)
    removed = [name for name, module in source.unet.named_modules() if isinstance(module, Removed)]
    groups = restrict(named_as_before(found, source), recipe.keep, recipe.only, removed)
    levels = find_levels(source.unet, groups) if recipe.layout == "stock" else None
    network = describe(source.unet, groups)
    return groups, refer(network, source) if recipe.fractions_of == "unpruned" else network, levels


def plan_for(
    source: Model, network: Any, scores: dict[str, list[float]], recipe: PruneRecipe, comparable: bool, levels: Any
) -> tuple[PruningPlan, dict[str, Any] | None]:
    """Return the plan and, in the layout `stock`, the config of the result."""
    unpruned = unpruned_costs(source)
    check_finite(network, scores)
    if levels is None:
        return select(network, scores, _widths(network, scores, recipe, unpruned, comparable)), None
    from dpctl.prune.layout import tied

    small, shared = tied(network, scores, levels)
    # A ratio allows what its own plan costs; which widths the class can have is another matter.
    measure = "params" if recipe.target_params is not None else "macs"
    budget = _budget(recipe, unpruned, measure) or small.cost(
        measure, _widths(small, shared, recipe, unpruned, comparable)
    )
    return plan_levels(
        source,
        network,
        scores,
        levels,
        recipe.align,
        lambda widths: network.cost(measure, widths),
        budget,
        lambda floor, whole: (
            f"{measure} {budget:.0f} of {whole:.0f}; the floor",
            f"{floor:.0f} ({as_option(measure, floor, whole, unpruned[measure])})",
        ),
    )


def plan_levels(
    source: Model,
    network: Network,
    scores: Mapping[str, Sequence[float]],
    levels: Any,
    align: int,
    price: Callable[[dict[str, int]], float],
    budget: float,
    told: Callable[[float, float], tuple[str, str]],
) -> tuple[PruningPlan, dict[str, Any]]:
    """Return the plan of the layout `stock` that keeps the most importance within a budget, and its config.

    `price` is what widths of the groups cost. Raises a DpctlError where nothing fits: `told` says the floor and the
    whole network's cost, in words around the alignment.
    """
    from dpctl.prune.layout import BelowFloor, search, tied

    small, shared = tied(network, scores, levels)
    try:
        chosen = search(
            small,
            shared,
            lambda found: price(levels.group_widths(found)),
            budget,
            align,
            lambda found: levels.expresses(source.unet, found),
        )
    except BelowFloor as problem:
        before, after = told(problem.floor, problem.whole)
        raise OutOfReach(
            "the target cannot be reached in the layout stock",
            f"{before} with align {problem.align} is {after}",
            "ask for the floor or more, lower --align, or use --layout free",
            problem.floor,
        ) from None
    return select(network, scores, levels.group_widths(chosen)), levels.stock_config(chosen)


def _widths(
    network: Any,
    scores: dict[str, list[float]],
    recipe: PruneRecipe,
    unpruned: dict[str, int],
    comparable: bool,
) -> dict[str, int]:
    goal = goal_of(network, recipe, unpruned)
    if goal is None:
        return uniform(network, recipe.ratio or 0.0, recipe.align)
    measure, budget = goal
    whole = sum(span.whole for span in network.spans) if measure == "channels" else unpruned[measure]
    automatic = "global" if comparable else "local"
    scope = automatic if recipe.scope == "auto" else recipe.scope
    return widths_for_target(
        network,
        scores,
        measure,
        budget,
        recipe.align,
        scope=scope,
        comparable=comparable,
        floor=recipe.floor,
        unpruned=whole,
    )


def goal_of(network: Network, recipe: PruneRecipe, unpruned: dict[str, int]) -> tuple[str, float] | None:
    """Return what is to be met, as a measure and its budget; None where every group loses the same ratio."""
    if recipe.ratio is not None:
        whole = sum(span.whole for span in network.spans)
        return ("channels", (1.0 - recipe.ratio) * whole) if recipe.scope == "global" else None
    measure = "macs" if recipe.target_macs is not None else "params"
    return measure, _budget(recipe, unpruned, measure)


def _budget(recipe: PruneRecipe, unpruned: dict[str, int], measure: str) -> float:
    """Return what a MACs or parameter target allows; nothing where the target is a ratio."""
    return float(getattr(recipe, f"target_{measure}") or 0.0) * unpruned[measure]
