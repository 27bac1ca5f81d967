"""Structural pruning of a diffusion UNet: score, plan, cut, write the artifact."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpctl import artifact, cost, progress, registry
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError
from dpctl.models import Model, load_model, save_model, unet_directory
from dpctl.prune.check import CRITERIA, check
from dpctl.prune.plan import PruningPlan
from dpctl.prune.target import goal_of, plan_for, trace
from dpctl.prune.unpruned import earlier_cuts, unpruned_config, unpruned_costs, unpruned_widths
from dpctl.recipe import PruneRecipe, to_dict

KEPT = "kept.safetensors"
UNSCORED = "use --criterion magnitude or random"
UNFITTED = "the cut of this model cannot be compensated", "use --no-compensate"


@dataclass(frozen=True)
class Pruned:
    """A slim network with everything its artifact says of it."""

    unet: Any
    plan: PruningPlan
    kept: dict[str, Any]
    stats: dict[str, Any]


def prune(
    model: str, out: Path, recipe: PruneRecipe, *, force: bool = False, bar: progress.Bar = progress.no_bar
) -> Manifest:
    """Prune a model by a recipe and write the slim one as a model directory.

    Raises a DpctlError for an unusable recipe, model, data or output; nothing is written then.
    """
    check(recipe)
    _require_planned(recipe)
    artifact.refuse_existing(out, force=force)
    source = load_model(model)
    pruned = prune_unet(source, recipe, bar=bar)
    if not pruned.kept:
        got = f"ratio {recipe.ratio}, align {recipe.align}: no group loses a whole step"
        raise DpctlError("nothing would be pruned", got, "ask for a larger --ratio, or lower --align")
    return write(out, source, pruned, recipe, force=force, **scanned(source, recipe, bar))


def preview(model: str, recipe: PruneRecipe) -> dict[str, Any]:
    """Return the recipe as plain values and, under a criterion that needs no data, the plan: what `prune` would give.

    Writes nothing. Raises what `prune` raises.
    """
    check(recipe)
    document = to_dict(recipe)
    if recipe.latency is not None:
        return document  # a plan would take candidates that are timed
    if registry.load(CRITERIA, recipe.criterion, "criterion").NEEDS_DATA:
        return document  # a plan would take the scores, which take a while
    return document | {"plan": prune_unet(load_model(model), recipe, weights=False).stats}


def _require_planned(recipe: PruneRecipe) -> None:
    if recipe.latency is not None:
        todo = "call dpctl.chain.prune, which exports and times candidates"
        raise DpctlError("a latency is met by what runs, not by a plan alone", f"latency {recipe.latency.target}", todo)


def scan(model: str, data: str, *, bar: progress.Bar = progress.no_bar) -> dict[str, Any]:
    """Return how the denoising loss of a model reacts to cuts in one group at a time; see `dpctl.prune.sensitivity`."""
    return _scan(load_model(model), PruneRecipe(data=data), bar)


def scanned(source: Model, recipe: PruneRecipe, bar: progress.Bar) -> dict[str, Any]:
    """Return what a manifest says of a scan, where the recipe asks for one."""
    return {"sensitivity": _scan(source, recipe, bar)} if recipe.sensitivity else {}


def _scan(source: Model, recipe: PruneRecipe, bar: progress.Bar) -> dict[str, Any]:
    from dpctl.diffusion import trained_schedule
    from dpctl.prune import sensitivity
    from dpctl.prune.probe import open_images

    failed = "the sensitivity of this model cannot be scanned"
    images = open_images(source, recipe, sensitivity.IMAGES, failed, "leave --sensitivity out", bar)
    scheduler = trained_schedule(source.scheduler)
    found = sensitivity.scan(source.unet, scheduler, images, align=recipe.align, seed=recipe.seed, bar=bar)
    return {"model": source.digest} | found


@dataclass(frozen=True)
class Scored:
    """A model whose channels have been scored once: any number of cuts can be planned from it.

    `groups`, `network` and `levels` are as `target.trace` has them, `scores` by group. `images` are None under a
    criterion that needs none.
    """

    source: Model
    recipe: PruneRecipe
    groups: Any
    network: Any
    levels: Any
    scores: dict[str, list[float]]
    scheduler: Any
    images: Any
    most: int
    comparable: bool
    refits: bool

    def plan(self, recipe: PruneRecipe) -> tuple[PruningPlan, dict[str, Any] | None]:
        """Return the plan for a target, and in the layout `stock` the result's config."""
        return plan_for(self.source, self.network, self.scores, recipe, self.comparable, self.levels)


def prune_unet(
    source: Model, recipe: PruneRecipe, *, weights: bool = True, bar: progress.Bar = progress.no_bar
) -> Pruned:
    """Score the channels of `source`, plan what stays and cut; `source` is not changed.

    Without `weights` nothing is cut: the slim network is on the meta device, and everything told of it is true.
    """
    scored = score(source, recipe, bar=bar)
    plan, stock = scored.plan(recipe)
    return cut(scored, plan, stock, recipe, weights=weights, refit=scored.refits, bar=bar)


def score(source: Model, recipe: PruneRecipe, *, bar: progress.Bar = progress.no_bar) -> Scored:
    """Score the channels of `source` by the recipe's criterion. Raises a DpctlError for what it cannot score."""
    from dpctl.diffusion import trained_schedule
    from dpctl.prune import removal
    from dpctl.prune.attached import require_plain
    from dpctl.prune.compensate import BATCHES, compensates
    from dpctl.prune.importance import Scoring
    from dpctl.prune.probe import open_images, open_probe, require_fed

    require_plain(source.unet)
    criterion = registry.load(CRITERIA, recipe.criterion, "criterion")
    groups, network, levels = trace(source, recipe)
    images, scheduler = None, trained_schedule(source.scheduler)
    most = max(recipe.images, BATCHES * recipe.batch_size)
    if criterion.NEEDS_DATA:
        unscored = f"the criterion {recipe.criterion} cannot score this model", UNSCORED
        images = open_images(source, recipe, most, *unscored, bar)
    refits = compensates(recipe, criterion.NEEDS_DATA, source)
    if refits:
        require_fed(source, *UNFITTED)
    scoring = Scoring(source.unet, groups.prunable, scheduler, images, recipe, bar)
    scores = {name: values.tolist() for name, values in criterion.score(scoring).items()}
    if recipe.depth and criterion.COMPARABLE and images is not None:
        probe = open_probe(
            source.unet,
            scheduler,
            images,
            count=removal.IMAGES,
            timesteps=removal.TIMESTEPS,
            seed=recipe.seed,
            stream="branches",
        )
        network = removal.with_removals(network, source.unet, groups, scores, probe, recipe.align, bar)
    return Scored(
        source, recipe, groups, network, levels, scores, scheduler, images, most, criterion.COMPARABLE, refits
    )


def cut(
    scored: Scored,
    plan: PruningPlan,
    stock: dict[str, Any] | None,
    recipe: PruneRecipe,
    *,
    weights: bool = True,
    refit: bool = False,
    bar: progress.Bar = progress.no_bar,
) -> Pruned:
    """Cut a scored model by a plan; `refit` compensates, see `dpctl.prune.compensate`.

    `recipe` is what led to the plan, and `weights` as in `prune_unet`.
    """
    from dpctl.prune.compensate import make_up
    from dpctl.prune.probe import open_images
    from dpctl.prune.surgery import kept_indices, outline, regrouped, slim

    unet = scored.source.unet
    kept = kept_indices(unet, scored.groups, plan)
    small = (slim if weights else outline)(unet, kept, stock, scored.groups.whole)
    stats = _stats(scored.source, small, scored.network, plan, recipe) | {
        "left_alone": scored.groups.left_alone,
        "in_parts": scored.groups.in_parts,
        "regrouped_norms": regrouped(unet, small, kept),
    }
    if weights and kept and refit:
        images = scored.images or open_images(scored.source, recipe, scored.most, *UNFITTED, bar)
        stats["compensation"] = make_up(unet, small, kept, scored.scheduler, images, recipe, bar)
    return Pruned(small, plan, kept, stats)


def write(
    out: Path, source: Model, pruned: Pruned, recipe: PruneRecipe, *, force: bool = False, **more: Any
) -> Manifest:
    """Write a slim network as a model directory; `more` stands in the manifest's stats, too."""
    with artifact.writing(out, force=force) as directory:
        save_model(directory, model=source, unet=pruned.unet)
        _save_kept(directory, source, pruned)
        return artifact.write_manifest(
            directory,
            kind="pruned",
            recipe=to_dict(recipe),
            stats=pruned.stats | {"bytes": cost.file_bytes(directory)} | more,
            **artifact.descent(source.manifest, source.digest, source.source),
        )


def would_cut(model: str, recipe: PruneRecipe) -> bool:
    """Tell whether `prune` would remove anything, in seconds: every channel counts alike, nothing is scored.

    Raises what `prune` raises for a recipe and a target that no scores could meet.
    """
    from dpctl.prune.layout import tied

    check(recipe)
    source = load_model(model)
    comparable = registry.load(CRITERIA, recipe.criterion, "criterion").COMPARABLE
    _, network, levels = trace(source, recipe)
    alike = network.alike()
    priced = network if levels is None else tied(network, alike, levels)[0]
    goal = goal_of(priced, recipe, unpruned_costs(source))
    if goal is not None and priced.cost(goal[0], priced.full()) <= goal[1]:
        return False
    return plan_for(source, network, alike, recipe, comparable, levels)[0].widths() != network.full()


def _stats(source: Model, small: Any, network: Any, plan: PruningPlan, recipe: PruneRecipe) -> dict[str, Any]:
    after = cost.stats(small)
    measured = (after["params"], after["macs"])
    if measured != (network.cost("params", plan.widths()), network.cost("macs", plan.widths())):
        raise RuntimeError("the plan's price is not the slim network's: the cost model and the surgery disagree")
    unpruned, before = unpruned_costs(source), unpruned_widths(source, network)
    config = unpruned_config(source)
    if config is None and recipe.layout == "stock" and network.cost("macs", network.full()) == unpruned["macs"]:
        config = {"_class_name": type(source.unet).__name__}
        config |= {name: value for name, value in source.unet.config.items() if not name.startswith("_")}
    return after | {
        "unpruned": unpruned,
        **({"unpruned_config": config} if config else {}),
        "requested": {k: v for k in ("ratio", "target_macs", "target_params") if (v := getattr(recipe, k)) is not None},
        "achieved": {measure: after[measure] / unpruned[measure] for measure in ("macs", "params")},
        "widths": earlier_cuts(source) | {name: [before[name], kept] for name, kept in plan.widths().items()},
    }


def _save_kept(directory: Path, source: Model, pruned: Pruned) -> None:
    from safetensors.torch import load_file, save_file

    from dpctl.prune.surgery import compose

    earlier = unet_directory(source.directory) / KEPT
    if getattr(source.unet.config, "channels", None) and not earlier.is_file():
        return  # saved by stock diffusers, which drops the file: what was kept of the base model is not known
    kept = compose(load_file(earlier) if earlier.is_file() else None, pruned.kept)
    save_file({key: index.contiguous() for key, index in kept.items()}, directory / "unet" / KEPT)
