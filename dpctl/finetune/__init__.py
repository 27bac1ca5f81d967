"""Train a UNet from nothing, or finetune a pruned one with its unpruned teacher: the same loop."""

import json
import shutil
from pathlib import Path
from typing import Any

from dpctl import artifact, cost, progress
from dpctl.artifact import Manifest
from dpctl.data import Images, open_data
from dpctl.errors import DpctlError
from dpctl.finetune import checkpoint
from dpctl.finetune.checkpoint import Checkpoint
from dpctl.models import Model, build_unet, load_model, read_config, resolve, save_model, write_pipeline
from dpctl.recipe import FinetuneRecipe, LoopRecipe, TrainRecipe, to_dict

LOSSES = "losses.json"


def train(
    out: Path, recipe: TrainRecipe, *, resume: bool = False, force: bool = False, bar: progress.Bar = progress.no_bar
) -> Manifest:
    """Train a UNet from random weights (DDPM, linear betas, 1,000 timesteps) and write it with its EMA weights.

    Raises a DpctlError for an unusable config, data or output, and for checkpoints that would be overwritten.
    """
    import diffusers

    _check(recipe)
    start = _start(out, recipe, resume=resume, force=force)
    unet = _random_unet(_config(recipe.config), recipe.seed)
    scheduler = diffusers.DDPMScheduler()
    losses = _loop(unet, scheduler, None, 0.0, _images(unet, recipe), recipe, out, start, bar)
    with artifact.writing(out, force=force) as directory:
        write_pipeline(directory, unet=unet, scheduler=scheduler)
        manifest = _finish(directory, unet, losses, kind="trained", recipe=to_dict(recipe))
    shutil.rmtree(checkpoint.folder_for(out), ignore_errors=True)
    return manifest


def finetune(
    model: str,
    out: Path,
    recipe: FinetuneRecipe,
    *,
    resume: bool = False,
    force: bool = False,
    bar: progress.Bar = progress.no_bar,
) -> Manifest:
    """Finetune a model and write it with its EMA weights.

    The teacher is the unpruned ancestor that the model's manifest names, unless the recipe names another or sets
    `distillation` to 0. Raises a DpctlError as `train` does, and for a teacher that is missing or does not match.
    """
    _check(recipe)
    start = _start(out, recipe, resume=resume, force=force)
    source = load_model(model)
    teacher = _teacher(source, recipe)
    unet = _random_unet(dict(source.unet.config), recipe.seed) if recipe.from_scratch else source.unet
    losses = _loop(unet, source.scheduler, teacher, recipe.distillation, _images(unet, recipe), recipe, out, start, bar)
    with artifact.writing(out, force=force) as directory:
        save_model(directory, model=source, unet=unet)
        _copy_kept(source, directory)
        inherited = _inherited(source)
        entries = artifact.descent(source.manifest, source.digest, source.source)
        manifest = _finish(directory, unet, losses, inherited, kind="finetuned", recipe=to_dict(recipe), **entries)
    shutil.rmtree(checkpoint.folder_for(out), ignore_errors=True)
    return manifest


def _loop(
    unet: Any,
    scheduler: Any,
    teacher: Model | None,
    distillation: float,
    images: Images,
    recipe: LoopRecipe,
    out: Path,
    start: Checkpoint | None,
    bar: progress.Bar,
) -> list[float]:
    from dpctl.finetune.loop import train as train_loop
    from dpctl.finetune.loss import Objective

    objective = Objective(scheduler, teacher.unet if teacher else None, distillation)
    name = "finetune" if isinstance(recipe, FinetuneRecipe) else "train"
    with bar(name, recipe.steps, done=start.step if start else 0) as advance:
        return train_loop(
            unet, objective, images, recipe, folder=checkpoint.folder_for(out), start=start, advance=advance
        )


def _check(recipe: LoopRecipe) -> None:
    from dpctl.finetune.loop import PRECISIONS

    if min(recipe.steps, recipe.batch_size, recipe.checkpoint_every) < 1:
        got = f"steps {recipe.steps}, batch size {recipe.batch_size}, checkpoint every {recipe.checkpoint_every}"
        raise DpctlError("a count is below 1", got, "give 1 or more")
    if recipe.learning_rate <= 0:
        raise DpctlError("the learning rate is not positive", f"{recipe.learning_rate:g}", "give e.g. 4e-4")
    if not 0.0 <= recipe.ema_decay < 1.0:
        raise DpctlError("the EMA decay is outside [0, 1)", f"{recipe.ema_decay:g}", "give e.g. 0.99")
    if recipe.mixed_precision not in PRECISIONS:
        raise DpctlError(
            "unknown mixed precision", repr(recipe.mixed_precision), f"choose one of: {', '.join(PRECISIONS)}"
        )


def _start(out: Path, recipe: LoopRecipe, *, resume: bool, force: bool) -> Checkpoint | None:
    """Return the checkpoint to go on from; refuse to lose an output or checkpoints unasked."""
    artifact.refuse_existing(out, force=force)
    folder = checkpoint.folder_for(out)
    if resume:
        found = checkpoint.newest(folder)
        if found is not None:
            checkpoint.require_same_recipe(found.recipe, to_dict(recipe), folder)
        return found
    if folder.exists() and not force:
        raise DpctlError("an unfinished run is there", str(folder), "go on with --resume, or start again with --force")
    shutil.rmtree(folder, ignore_errors=True)
    return None


def _images(unet: Any, recipe: LoopRecipe) -> Images:
    return open_data(recipe.data, channels=unet.config.in_channels, size=cost.sample_size(unet.config))


def _config(name: str) -> dict[str, Any]:
    """Return a UNet's config from `reference`, a model directory or a config.json."""
    path = Path(name)
    if name != "reference" and path.is_file():
        path = path.parent if path.name == "config.json" else path
        if path.is_file():
            raise DpctlError("not a UNet config", name, "give a diffusers config.json, or a model directory")
        return read_config(path)
    return read_config(resolve(name))


def _random_unet(config: dict[str, Any], seed: int) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_unet(config)


def _teacher(source: Model, recipe: FinetuneRecipe) -> Model | None:
    """Return the teacher, checked against what the manifest says the model was pruned from."""
    if recipe.distillation == 0.0:
        return None
    todo = "name the unpruned model with --teacher, or switch distillation off with --distillation 0"
    if recipe.teacher != "parent":
        teacher = load_model(recipe.teacher)
        if teacher.unet.config.in_channels != source.unet.config.in_channels:
            got = f"{teacher.unet.config.in_channels} input channels, the model has {source.unet.config.in_channels}"
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
    kept = source.directory / "unet" / "kept.safetensors"
    if kept.is_file():
        shutil.copy2(kept, directory / "unet" / kept.name)


def _inherited(source: Model) -> dict[str, Any]:
    """Return the figures of the pruning that stay true of the finetuned network."""
    stats = source.manifest.stats if source.manifest is not None else {}
    return {
        name: stats[name] for name in ("unpruned", "requested", "achieved", "widths", "left_alone") if name in stats
    }


def _finish(
    directory: Path, unet: Any, losses: list[float], inherited: dict[str, Any] | None = None, **entries: Any
) -> Manifest:
    (directory / LOSSES).write_text(json.dumps([round(loss, 6) for loss in losses]) + "\n", encoding="utf-8")
    last = losses[-50:]
    stats = cost.stats(unet) | {
        "bytes": cost.file_bytes(directory),
        "steps": len(losses),
        "loss": sum(last) / len(last),
    }
    return artifact.write_manifest(directory, stats=stats | (inherited or {}), **entries)
