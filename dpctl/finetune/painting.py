"""How a network in training draws the pictures of a sample sheet: by our own loop, or in its model's pipeline.

A pipeline is opened anew for each sheet: between two of them nothing of it takes memory that the training may want.
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpctl.data import TrainingSet, read_prompts
from dpctl.data.latents import PIXELS_TOGETHER, release
from dpctl.data.text import Captioned, require_readable
from dpctl.errors import DpctlError
from dpctl.models import Model, decoder_of
from dpctl.pipelines import hide_progress, pipeline_class, quiet, takes_text
from dpctl.recipe import FinetuneRecipe
from dpctl.signature import sample_size
from runtime.backends.eager import EagerDenoiser
from runtime.pipeline import DenoiserUNet, assemble, draw_images
from runtime.sampler import sample
from runtime.schedulers import make_scheduler

IMAGES, STEPS = 8, 20
# Draws the pictures of a network, [IMAGES, C, H, W] in [-1, 1]; a DpctlError where they are not finite.
Paint = Callable[[Any], Tensor]


@dataclass(frozen=True)
class OverPixels:
    """A network that draws pictures itself, of class i modulo their number where it has classes."""

    scheduler: Any
    seed: int

    def __call__(self, unet: Any) -> Tensor:
        scheduler = make_scheduler("ddim", self.scheduler.config)
        steps = min(STEPS, int(scheduler.config.num_train_timesteps))
        return sample(EagerDenoiser(unet), scheduler, seed=self.seed, indices=range(IMAGES), num_inference_steps=steps)


@dataclass(frozen=True)
class InPipeline:
    """A network in the place of the one in a pipeline's directory, whose own are VAE, text encoders and scheduler.

    Picture i shows prompt i modulo their number, and class i likewise.
    """

    directory: Path
    prompts: Sequence[str]
    seed: int

    def __call__(self, unet: Any) -> Tensor:
        denoiser = Numbered(unet)
        with _opened(self.directory, denoiser) as pipe:
            asked = {"seed": self.seed, "num_inference_steps": _steps(pipe.scheduler)}
            found = []
            for numbers in _batches(pipe, self.directory):
                denoiser.numbers = numbers
                texts = [self.prompts[number % len(self.prompts)] for number in numbers] if self.prompts else None
                found.append(draw_images(pipe, indices=numbers, prompts=texts, **asked))
        return torch.cat(found)


class Numbered(EagerDenoiser):
    """A network as its pipeline calls it, told the classes of the images `numbers`: no pipeline tells them."""

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        self.numbers: Sequence[int] = ()

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        if classes := self.config.get("num_class_embeds"):
            conditions["class_labels"] = torch.tensor([number % classes for number in self.numbers])
        return super().__call__(sample, timestep, **conditions)


def check(model: Model, recipe: FinetuneRecipe) -> tuple[str, ...]:
    """Return the prompts that a recipe names for its sheets; a DpctlError for a model that cannot draw any.

    The pipeline is opened and closed again: what is missing or damaged in it is told before the data are read.
    """
    if not recipe.sample_every:
        return ()
    prompts = read_prompts(Path(recipe.prompts)) if recipe.prompts is not None else ()
    textual = False
    if decoder_of(model.directory) is not None:
        try:
            textual = takes_text(_drawable(model))
            with _opened(model.directory, Numbered(model.unet)):
                pass
        except DpctlError as problem:
            todo = f"{problem.todo}; or leave --sample-every out"
            raise DpctlError(f"no sample sheets: {problem.failed}", problem.got, todo) from None
        finally:
            release(torch.device("cpu"))
    if prompts and not textual:
        raise DpctlError("the model takes no text", f"{model.source}, --prompts", "leave --prompts out")
    return prompts


def _drawable(model: Model) -> Any:
    """Return the class of a model's pipeline; a DpctlError for one that does not draw from noise, or a text, alone."""
    config, kind = model.unet.config, pipeline_class(model.directory)
    if takes_text(kind):
        require_readable(model.directory)
    elif kind.__name__ != "LDMPipeline":
        got, todo = f"{kind.__name__} in {model.directory}", "bring an LDMPipeline, or one that takes texts"
        raise DpctlError("the pipeline draws something else", got, todo)
    if not isinstance(config.sample_size, int) and kind.__name__ != "StableDiffusionPipeline":
        got = f"sample_size {list(sample_size(config))} in the network's config"
        raise DpctlError(f"{kind.__name__} draws squares only", got, "write one number there, if it is one")
    try:
        copy.deepcopy(model.scheduler).set_timesteps(_steps(model.scheduler))
    except ValueError as problem:
        got = f"{type(model.scheduler).__name__}, {_steps(model.scheduler)} steps: {problem}"
        raise DpctlError("the pipeline's scheduler refuses the steps", got, "give the model another one") from None
    return kind


def open_paint(model: Model, recipe: FinetuneRecipe, prompts: Sequence[str], examples: TrainingSet) -> Paint | None:
    """Return what draws sheets in a model's pipeline: `prompts`, else the first captions; None where it takes none."""
    if not recipe.sample_every or decoder_of(model.directory) is None:
        return None
    if isinstance(examples, Captioned):
        prompts = prompts or examples.captions(IMAGES)
    return InPipeline(model.directory, tuple(prompts), recipe.seed)


def _steps(scheduler: Any) -> int:
    """Return how many steps a picture takes; a model of few timesteps, or a consistency model, has no more."""
    grids = (scheduler.config.get(name) for name in ("num_train_timesteps", "original_inference_steps"))
    return min([STEPS, *(int(grid) for grid in grids if grid is not None)])


@contextmanager
def _opened(directory: Path, denoiser: EagerDenoiser) -> Iterator[Any]:
    hide_progress()
    with quiet(), DenoiserUNet(denoiser) as unet:
        pipe = assemble(pipeline_class(directory), directory, unet)
        pipe.set_progress_bar_config(disable=True)
        yield pipe


def _batches(pipe: Any, directory: Path) -> list[range]:
    """Return which images are drawn together: few large ones, which a VAE takes much memory to decode."""
    vae = pipe.components[decoder_of(directory)]
    height, width = (2 ** (len(vae.config.block_out_channels) - 1) * side for side in sample_size(pipe.unet.config))
    together = max(1, PIXELS_TOGETHER // (height * width))
    return [range(start, min(start + together, IMAGES)) for start in range(0, IMAGES, together)]
