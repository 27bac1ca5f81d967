"""Training images for users who have none: the unpruned model draws them, and they are kept as a folder of images.

The folder has a metadata.jsonl with the prompts or classes, so that it can be looked at, and given as --data elsewhere.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dpctl import progress
from dpctl.data import cache, read_prompts, save_picture, to_bytes
from dpctl.data.latents import own_device, release
from dpctl.data.text import require_readable
from dpctl.errors import DpctlError
from dpctl.models import Model, decoder_of
from dpctl.pipelines import hide_progress, pipeline_class, takes_text
from dpctl.recipe import FinetuneRecipe
from runtime import load_pipeline, open_denoiser, sample
from runtime.pipeline import draw_images

TOGETHER = 8
Draw = Callable[[Sequence[int]], Tensor]


def draw(teacher: Model, recipe: FinetuneRecipe, folder: Path, bar: progress.Bar = progress.no_bar) -> Path:
    """Return the folder of `recipe.drawn` images that the teacher drew; draw what is not there yet.

    Image i depends on the seed, i and its prompt, which is prompt i modulo their number, or its class, likewise. The
    scheduler and its guidance are the teacher's own. Raises a DpctlError for a teacher that draws texts without
    prompts, the reverse, and one that cannot draw.
    """
    prompts = read_prompts(Path(recipe.prompts)) if recipe.prompts is not None else ()
    _require_drawable(teacher, prompts)
    steps, seed = str(recipe.drawn_steps), str(recipe.seed)
    asked = {"teacher": teacher.digest, "prompts": json.dumps(prompts), "count": str(recipe.drawn)}
    out = folder / cache.key(kind="drawn", steps=steps, seed=seed, **asked)
    making = out.with_name(out.name + cache.MAKING)
    what = f"{recipe.drawn} images that the teacher draws"
    if out.is_dir():
        return out
    with cache.alone(making, what):
        if out.is_dir():
            shutil.rmtree(making, ignore_errors=True)
            return out
        _draw_missing(teacher, recipe, prompts, making, out, what, bar)
        making.rename(out)
    return out


def _draw_missing(
    teacher: Model,
    recipe: FinetuneRecipe,
    prompts: Sequence[str],
    making: Path,
    out: Path,
    what: str,
    bar: progress.Bar,
) -> None:
    """Draw the batches of which images are missing, and write what each image shows."""
    starts = range(0, recipe.drawn, TOGETHER)
    batches = [range(start, min(start + TOGETHER, recipe.drawn)) for start in starts]
    missing = [batch for batch in batches if not all((making / _name(number)).is_file() for number in batch)]
    left = sum(map(len, missing))
    with _opened(teacher, recipe, prompts) as paint, bar("draw", recipe.drawn, done=recipe.drawn - left) as advance:
        for position, batch in enumerate(missing):
            images = to_bytes(paint(batch))
            if position == 0:  # a PNG is hardly ever larger than its pixels
                cache.require_space(making, out, left * images[0].nbytes, f"at most, {what}")
            for number, image in zip(batch, images, strict=True):
                save_picture(image, making / _name(number))
            advance(len(batch))
    classes = teacher.unet.config.get("num_class_embeds")
    with (making / "metadata.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(recipe.drawn):
            told = {"text": prompts[number % len(prompts)]} if prompts else {}
            told |= {"label": number % classes} if classes else {}
            stream.write(json.dumps({"file_name": _name(number), **told}) + "\n")


def _require_drawable(teacher: Model, prompts: Sequence[str]) -> None:
    kind = pipeline_class(teacher.directory) if decoder_of(teacher.directory) is not None else None
    textual = kind is not None and takes_text(kind)
    got = f"{teacher.source}: {kind.__name__ if kind is not None else 'a network over pixels'}"
    if textual and not prompts:
        raise DpctlError("the teacher draws what a text says", got, "give texts with --prompts FILE, one per line")
    if textual:
        require_readable(teacher.directory)
    if prompts and not textual:
        raise DpctlError("the teacher takes no text", got, "leave --prompts out")
    if kind is not None and not textual and teacher.unet.config.get("num_class_embeds"):
        raise DpctlError("the teacher's pipeline draws no classes", got, "bring images of your own with --data")


@contextmanager
def _opened(teacher: Model, recipe: FinetuneRecipe, prompts: Sequence[str]) -> Iterator[Draw]:
    """Open the teacher to draw images by their numbers, [N, C, H, W] in [-1, 1]; its memory is given back."""
    device = own_device()
    asked: dict[str, Any] = {"seed": recipe.seed, "num_inference_steps": recipe.drawn_steps}
    if decoder_of(teacher.directory) is None:
        with open_denoiser(teacher.directory, "eager", device=str(device)) as denoiser:
            yield lambda numbers: sample(denoiser, teacher.scheduler, indices=numbers, **asked)
    else:
        hide_progress()
        pipe = load_pipeline(teacher.directory, "eager", device=str(device))
        pipe.set_progress_bar_config(disable=True)
        with pipe.unet:
            yield partial(_painted, pipe, prompts, asked)
        del pipe
    release(device)


def _painted(pipe: Any, prompts: Sequence[str], asked: dict[str, Any], numbers: Sequence[int]) -> Tensor:
    texts = [prompts[number % len(prompts)] for number in numbers] if prompts else None
    return draw_images(pipe, indices=numbers, prompts=texts, **asked)


def _name(number: int) -> str:
    return f"{number:06d}.png"
