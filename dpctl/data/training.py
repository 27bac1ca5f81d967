"""Opening what a model is trained on: pixels or latents, with classes or texts, as its directory and config say."""

from pathlib import Path
from typing import Any

import torch

from dpctl import progress
from dpctl.data import latents
from dpctl.data.batch import Labelled, Pixels, TrainingSet
from dpctl.data.cache import Setting
from dpctl.data.images import Images
from dpctl.data.sources import open_data
from dpctl.data.text import open_captioned, require_readable
from dpctl.errors import DpctlError
from dpctl.models import Model, decoder_of, read_index
from dpctl.pipelines import load_vae
from dpctl.recipe import LoopRecipe
from dpctl.signature import Signature, of_unet, sample_size

LABELS, TEXT = "class_labels", "encoder_hidden_states"
# What a network may be told, in all.
CONDITIONS = ((), (LABELS,), (TEXT,), (TEXT, "text_embeds", "time_ids"))


def open_training_set(
    model: Model,
    recipe: LoopRecipe,
    *,
    cache: Path,
    bar: progress.Bar = progress.no_bar,
    device: torch.device | None = None,
) -> TrainingSet:
    """Open the recipe's data for a model: what the pipeline's own components make of images, labels and captions.

    Latents and embeddings are made once, on `device` (this process's GPU, if there is one), and kept below `cache`;
    what made them is freed. Raises a DpctlError for a network that is told what no data has, for data without labels or
    captions where they are needed, and for a disk that is too small.
    """
    told = conditions_of(model.unet)
    entry = decoder_of(model.directory)
    if entry is None:
        return open_pixels(model.unet, recipe)
    if recipe.crop != "center":
        got = f"--crop {recipe.crop} for a model in latent space"
        raise DpctlError("what is cropped anew each time cannot be cached", got, "use --crop center, or crop the files")
    vae = load_vae(model.directory, entry)
    size = _image_size(model, vae)
    images = open_data(recipe.data, channels=vae.config.in_channels, size=size, max_broken=recipe.max_broken)
    _require_told(images, told, model)
    setting = Setting(model.directory, device or latents.own_device(), cache, bar)
    scaling = latents.scaling_of(vae, str(read_index(model.directory).get("_class_name")))
    rows = latents.encode(setting, entry, vae, images, size=size, flip=recipe.flip)
    del vae
    latents.release(setting.device)
    if LABELS in told:
        return latents.LabelledLatents(images, rows, scaling)
    if TEXT not in told:
        return latents.Latents(images, rows, scaling)
    asked: dict[str, Any] = {"signature": _signature(model.unet), "size": size, "dropout": recipe.condition_dropout}
    return open_captioned(images, rows, scaling, setting=setting, **asked)


def open_pixels(unet: Any, recipe: LoopRecipe) -> TrainingSet:
    """Open the recipe's data for a network over pixels, with or without classes."""
    told, config = conditions_of(unet), unet.config
    if TEXT in told:
        got = f"cross_attention_dim {config.get('cross_attention_dim')}, and no VAE beside it"
        raise DpctlError("a text network needs its pipeline", got, "give the whole pipeline's directory")
    images = open_data(recipe.data, channels=config.in_channels, size=sample_size(config), max_broken=recipe.max_broken)
    if LABELS in told:
        return Labelled(images, int(config.num_class_embeds), flip=recipe.flip, crop=recipe.crop)
    return Pixels(images, flip=recipe.flip, crop=recipe.crop)


def conditions_of(unet: Any) -> tuple[str, ...]:
    """Return what a network is told beside image and timestep, by the names in the signature.

    Raises a DpctlError for what no data set tells, and for a network that predicts something else than it is given (a
    learned variance, or what is left of more inputs).
    """
    config = unet.config
    told = tuple(tensor.name for tensor in _signature(unet).inputs[2:])
    if "timestep_cond" in told:
        raise DpctlError(
            "a latent consistency model cannot be trained",
            f"time_cond_proj_dim {config.get('time_cond_proj_dim')}: the strength of guidance is an input",
            "finetune the model that it was distilled from",
        )
    if told not in CONDITIONS:
        got = f"the inputs {', '.join(told)}"
        raise DpctlError("a network with these inputs cannot be trained", got, "bring one with classes or texts alone")
    if config.in_channels != config.out_channels:
        raise DpctlError(
            "the network's output is no image like its input",
            f"{config.in_channels} input channels, {config.out_channels} output channels",
            "bring a model that predicts noise, image or velocity alone (no learned variance, no inpainting)",
        )
    return told


def _signature(unet: Any) -> Signature:
    return of_unet({**unet.config, "_class_name": type(unet).__name__})


def _image_size(model: Model, vae: Any) -> tuple[int, int]:
    """Return the size [H, W] of the images whose latents a network takes; a DpctlError where they do not fit."""
    config, channels = model.unet.config, int(vae.config.latent_channels)
    if config.in_channels != channels:
        raise DpctlError(
            "the VAE does not fit the network",
            f"it makes latents of {channels} channels, the network takes {config.in_channels}",
            "bring the pipeline as it was saved",
        )
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    height, width = sample_size(config)
    return scale * height, scale * width


def _require_told(images: Images, told: tuple[str, ...], model: Model) -> None:
    """Raise a DpctlError where there are no labels or captions for a network, before any image is encoded."""
    if LABELS in told:
        Labelled(images, int(model.unet.config.num_class_embeds))
    if TEXT in told:
        require_readable(model.directory)
        images.captions([0])
