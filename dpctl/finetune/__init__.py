"""Train a UNet from nothing, or finetune a pruned one with its unpruned teacher: the same loop."""

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dpctl import artifact, cost, environment, progress, registry
from dpctl.artifact import Manifest
from dpctl.data import TrainingSet, open_pixels, open_training_set
from dpctl.errors import DpctlError
from dpctl.finetune import checkpoint
from dpctl.finetune.checkpoint import Checkpoint
from dpctl.models import (
    LOSSES,
    PROGRESS,
    Model,
    build_unet,
    load_model,
    read_config,
    resolve,
    save_model,
    unet_directory,
    write_pipeline,
)
from dpctl.recipe import (
    CROPS,
    MIXED_PRECISIONS,
    OPTIMIZERS,
    TEACHER,
    TIMESTEP_SAMPLINGS,
    TRACKERS,
    FinetuneRecipe,
    LoopRecipe,
    TrainRecipe,
    to_dict,
)

CHOICES = {
    "optimizer": OPTIMIZERS,
    "mixed_precision": MIXED_PRECISIONS,
    "timestep_sampling": TIMESTEP_SAMPLINGS,
    "crop": CROPS,
    "tracker": TRACKERS,
}


def train(
    out: Path, recipe: TrainRecipe, *, resume: bool = False, force: bool = False, bar: progress.Bar = progress.no_bar
) -> Manifest | None:
    """Train a UNet from random weights (DDPM, linear betas, 1,000 timesteps) and write it with its EMA weights.

    Of several processes that a launcher started the first one writes and returns the manifest, the others None. Raises
    a DpctlError for an unusable config, data or output, and for checkpoints that would be overwritten; StoppedError
    after a signal, once there is a checkpoint to go on from.
    """
    import diffusers

    from dpctl.finetune.loss import Objective

    check(recipe)
    _check_packages(recipe)
    start = _start(out, recipe, resume=resume, force=force)
    unet = build_random(_config(recipe.config), recipe.seed)
    scheduler = diffusers.DDPMScheduler()
    objective = Objective(scheduler, min_snr_gamma=recipe.min_snr_gamma)
    state = _loop(unet, objective, open_pixels(unet, recipe), recipe, out, start, None, bar)
    if state.ema is None:
        return None
    with artifact.writing(out, force=force) as directory:
        write_pipeline(directory, unet=unet, scheduler=scheduler)
        manifest = _finish(directory, out, unet, state, kind="trained", recipe=to_dict(recipe))
    checkpoint.clear(checkpoint.folder_for(out))
    return manifest


def finetune(
    model: str,
    out: Path,
    recipe: FinetuneRecipe,
    *,
    resume: bool = False,
    force: bool = False,
    bar: progress.Bar = progress.no_bar,
) -> Manifest | None:
    """Finetune a model and write it with its EMA weights.

    The teacher is the unpruned ancestor that the model's manifest names, unless the recipe names another or all weights
    of distillation are 0. Returns and raises as `train` does; a DpctlError also for a teacher that is missing or does
    not match.
    """
    from dpctl.finetune import painting
    from dpctl.finetune.loss import open_objective

    check(recipe)
    _check_packages(recipe)
    start = _start(out, recipe, resume=resume, force=force)
    source = load_model(model)
    prompts = painting.check(source, recipe)
    if start is not None:
        checkpoint.require_same_parent(start, source.digest, checkpoint.folder_for(out))
    teacher = _teacher(source, recipe)
    unet = build_random(dict(source.unet.config), recipe.seed) if recipe.from_scratch else source.unet
    objective = open_objective(source, unet, teacher if _is_taught(recipe) else None, recipe)
    examples = _examples(source, teacher, recipe, bar)
    paint = painting.open_paint(source, recipe, prompts, examples)
    state = _loop(unet, objective, examples, recipe, out, start, source.digest, bar, paint)
    if state.ema is None:
        return None
    with artifact.writing(out, force=force) as directory:
        save_model(directory, model=source, unet=unet)
        _copy_kept(source, directory)
        inherited = _inherited(source)
        if objective.features is not None and objective.features.by_map:
            inherited["features_by_map"] = list(objective.features.by_map)
        entries = artifact.descent(source.manifest, source.digest, source.source)
        manifest = _finish(directory, out, unet, state, inherited, kind="finetuned", recipe=to_dict(recipe), **entries)
    checkpoint.clear(checkpoint.folder_for(out))
    return manifest


def _loop(
    unet: Any,
    objective: Any,
    examples: TrainingSet,
    recipe: LoopRecipe,
    out: Path,
    start: Checkpoint | None,
    parent: str | None,
    bar: progress.Bar,
    paint: Any = None,
) -> Any:
    from dpctl.finetune.loop import train as train_loop
    from dpctl.finetune.processes import open_accelerator

    accelerator = open_accelerator(recipe)
    folder = checkpoint.folder_for(out)
    if recipe.validation >= len(examples):
        got = f"{recipe.validation} of {len(examples)} images"
        raise DpctlError("nothing is left to train on", got, "lower --validation, or bring more images")
    if start is None and accelerator.is_main_process:
        checkpoint.clear(folder)  # only now: a mistake in the options does not cost the checkpoints of an earlier run
    name = "finetune" if isinstance(recipe, FinetuneRecipe) else "train"
    shown = bar if accelerator.is_main_process else progress.no_bar
    with shown(name, recipe.steps, done=start.step if start else 0) as advance:
        return train_loop(
            unet,
            objective,
            examples,
            recipe,
            accelerator=accelerator,
            folder=folder,
            start=start,
            parent=parent,
            advance=advance,
            say=None if bar is progress.no_bar else progress.say,
            paint=paint,
        )


def check(recipe: LoopRecipe) -> None:
    """Raise a DpctlError for numbers outside their ranges and an unknown precision."""
    counts = ("steps", "batch_size", "accumulation", "checkpoint_every", "validate_every", "keep")
    if low := [f"{name.replace('_', ' ')} {getattr(recipe, name)}" for name in counts if getattr(recipe, name) < 1]:
        raise DpctlError("a count is below 1", ", ".join(low), "give 1 or more")
    for name, inside, todo in _ranges(recipe):
        if not inside:  # NaN is inside no range
            raise DpctlError(f"the {name.replace('_', ' ')} is out of range", f"{getattr(recipe, name):g}", todo)
    for name, known in CHOICES.items():
        registry.choose(known, getattr(recipe, name), name.replace("_", " "))
    if recipe.patience and not recipe.validation:
        got = f"patience {recipe.patience}, validation 0"
        raise DpctlError("an early stop needs images to judge by", got, "hold some out, e.g. --validation 256")
    if isinstance(recipe, FinetuneRecipe) and recipe.prompts is not None and not _has_drawings(recipe):
        todo = (
            "leave --prompts out, or let the teacher draw them with --data teacher, or the sheets with --sample-every N"
        )
        raise DpctlError("prompts are what the teacher draws, or sample sheets", f"--data {recipe.data}", todo)
    if isinstance(recipe, FinetuneRecipe) and recipe.denoising == 0.0 and not _is_taught(recipe):
        raise DpctlError(
            "the loss has no term", "all weights are 0", "give one of the loss's weights a positive number"
        )


def _check_packages(recipe: LoopRecipe) -> None:
    from dpctl.finetune import optimizers, trackers

    optimizers.check(recipe.optimizer)
    trackers.check(recipe.tracker)


def _ranges(recipe: LoopRecipe) -> Iterator[tuple[str, bool, str]]:
    """Yield (entry, whether it is inside its range, what to do) of every number of a recipe."""
    yield "learning_rate", 0.0 < recipe.learning_rate < math.inf, "give a positive number, e.g. 4e-4"
    yield "ema_decay", 0.0 <= recipe.ema_decay < 1.0, "give a number in [0, 1), e.g. 0.99"
    yield "weight_decay", 0.0 <= recipe.weight_decay < math.inf, "give 0 or a positive number, e.g. 0.01"
    yield "gradient_clip", recipe.gradient_clip > 0.0, "give a positive number, e.g. 1"
    for name in ("warmup_steps", "validation", "patience", "max_broken", "sample_every"):
        yield name, getattr(recipe, name) >= 0, "give 0 or more"
    yield "condition_dropout", 0.0 <= recipe.condition_dropout < 1.0, "give a number in [0, 1), e.g. 0.1"
    gamma = recipe.min_snr_gamma
    yield "min_snr_gamma", gamma is None or 0.0 < gamma < math.inf, "give a positive number, e.g. 5, or leave it out"
    yield "seed", 0 <= recipe.seed < 2**63, "give a whole number from 0 to 2^63 - 1"
    if isinstance(recipe, FinetuneRecipe):
        for name in ("denoising", "distillation", "feature_distillation"):
            yield name, 0.0 <= getattr(recipe, name) < math.inf, "give 0 (without it) or a positive weight"
        for name in ("drawn", "drawn_steps"):
            yield name, getattr(recipe, name) >= 1, "give 1 or more"


def _start(out: Path, recipe: LoopRecipe, *, resume: bool, force: bool) -> Checkpoint | None:
    """Return the checkpoint to go on from; refuse to lose an output or checkpoints unasked."""
    artifact.refuse_existing(out, force=force)
    folder = checkpoint.folder_for(out)
    if resume:
        found = checkpoint.newest(folder)
        if found is not None:
            checkpoint.require_same_recipe(found.recipe, recipe, folder)
        return found
    if folder.exists() and not force:
        raise DpctlError("an unfinished run is there", str(folder), "go on with --resume, or start again with --force")
    return None


def _examples(source: Model, teacher: Model | None, recipe: FinetuneRecipe, bar: progress.Bar) -> TrainingSet:
    """Open what a model is finetuned on; the teacher draws it first where the recipe says so."""
    from dpctl.finetune.drawn import draw

    cache = environment.cache("data")
    if recipe.data == TEACHER and teacher is not None:
        recipe = dataclasses.replace(recipe, data=str(draw(teacher, recipe, cache, bar)))
    return open_training_set(source, recipe, cache=cache, bar=bar)


def _config(name: str) -> dict[str, Any]:
    """Return a UNet's config from `reference`, a model directory or a config.json."""
    path = Path(name)
    if name != "reference" and path.is_file():
        path = path.parent if path.name == "config.json" else path
        if path.is_file():
            raise DpctlError("not a UNet config", name, "give a diffusers config.json, or a model directory")
        return read_config(path)
    return read_config(resolve(name))


def build_random(config: dict[str, Any], seed: int) -> Any:
    """Build a UNet with random weights; a DpctlError says why a config gives none that runs."""
    import torch

    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            unet = build_unet(config)
        cost.positions(unet)  # a forward pass
    except DpctlError:
        raise
    except Exception as problem:  # a config can be wrong in every way that a network can fail
        reason = next(iter(str(problem).strip().splitlines()), type(problem).__name__)
        raise DpctlError("the config gives no network that runs", reason, "correct the config.json") from None
    return unet


def _has_drawings(recipe: FinetuneRecipe) -> bool:
    return recipe.data == TEACHER or recipe.sample_every > 0


def _is_taught(recipe: FinetuneRecipe) -> bool:
    return bool(recipe.distillation or recipe.feature_distillation)


def _teacher(source: Model, recipe: FinetuneRecipe) -> Model | None:
    """Return the teacher, checked against what the manifest says the model was pruned from."""
    if not _is_taught(recipe) and recipe.data != TEACHER:
        return None
    todo = "name the unpruned model with --teacher, or switch distillation off with --distillation 0"
    if recipe.teacher != "parent":
        teacher = load_model(recipe.teacher)
        for name in ("in_channels", "out_channels", "num_class_embeds"):
            theirs, ours = getattr(teacher.unet.config, name), getattr(source.unet.config, name)
            if theirs != ours:
                got = f"{name} {theirs}, the model has {ours}"
                raise DpctlError("the teacher does not match the model", got, "name the model it was pruned from")
        return teacher
    entries = source.manifest.lineage if source.manifest is not None else []
    ancestor = next((e for e in reversed(entries) if e["kind"] in ("trained", "foreign")), None)
    if ancestor is None:
        raise DpctlError(
            "the model's teacher is not known", f"{source.source} has no unpruned ancestor in its manifest", todo
        )
    try:
        teacher = load_model(ancestor["source"])
    except DpctlError as problem:
        raise DpctlError(
            "the model's teacher cannot be loaded", f"{ancestor['source']}: {problem.failed}", todo
        ) from None
    if teacher.digest != ancestor["digest"]:
        raise DpctlError("the teacher has changed since the pruning", f"{ancestor['source']} has another digest", todo)
    return teacher


def _copy_kept(source: Model, directory: Path) -> None:
    kept = unet_directory(source.directory) / "kept.safetensors"
    if kept.is_file():
        shutil.copy2(kept, directory / "unet" / kept.name)


def _inherited(source: Model) -> dict[str, Any]:
    """Return the figures of the pruning that stay true of the finetuned network."""
    stats = source.manifest.stats if source.manifest is not None else {}
    cut = (
        "unpruned",
        "unpruned_config",
        "requested",
        "achieved",
        "widths",
        "left_alone",
        "in_parts",
        "regrouped_norms",
    )
    told = (*cut, "compensation", "sensitivity", "latency")
    return {name: stats[name] for name in told if name in stats}


def _finish(
    directory: Path, out: Path, unet: Any, state: Any, inherited: dict[str, Any] | None = None, **entries: Any
) -> Manifest:
    from dpctl.finetune import sheets

    if (strip := sheets.strip(checkpoint.folder_for(out), unet.config)) is not None:
        strip.save(directory / PROGRESS)
    losses: list[float] = state.losses
    (directory / LOSSES).write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n", encoding="utf-8")
    last = losses[-50:]
    stats = cost.stats(unet) | {
        "bytes": cost.file_bytes(directory),
        "steps": len(losses),
        "loss": sum(last) / len(last),
        "processes": state.processes,
    }
    if state.validated:
        stats["validated"] = state.validated
    return artifact.write_manifest(directory, stats=stats | (inherited or {}), **entries)
