"""Pictures of a training: the same noise, every so many steps, by the averaged weights as they are then."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpctl.data import save_picture, to_bytes
from dpctl.errors import DpctlError
from dpctl.finetune.checkpoint import SHEETS
from dpctl.finetune.state import State
from dpctl.recipe import LoopRecipe
from dpctl.signature import sample_size
from runtime.backends.eager import EagerDenoiser
from runtime.sampler import sample
from runtime.schedulers import make_scheduler

IMAGES, STEPS = 8, 20
CONDITIONS = ("num_class_embeds", "class_embed_type", "cross_attention_dim", "encoder_hid_dim", "addition_embed_type")
# Of the strip: how many sheets it shows at most, spread evenly, and its measures in pixels.
MOST_ROWS = 12
TILE, LABEL, GAP = 64, 76, 4


def check(config: Mapping[str, Any], decoder: str | None, every: int) -> None:
    """Raise a DpctlError where sheets are asked for and noise and network alone do not give a picture."""
    found = [f"{name} {config[name]!r}" for name in CONDITIONS if config.get(name) is not None]
    if decoder is not None:
        found.append(f"a {decoder}")
    if every and found:
        todo = "leave --sample-every out, and draw from the finished model with `dpctl sample`"
        raise DpctlError("sample sheets are drawn of unconditional pixel models only", ", ".join(found), todo)


@dataclass
class Sheets:
    """Draws a sheet every `every` steps into the folder of the checkpoints: the teacher's row, below it the model's.

    Each row has the same noise. Nothing that training reads is changed by it.
    """

    scheduler: Any
    teacher: Any
    folder: Path
    every: int
    seed: int
    _taught: np.ndarray | None = None

    def draw(self, state: State, *, done: bool) -> None:
        """Draw where it is time to, and at the end; only in the process that has the averaged weights."""
        if state.ema is None or not self.every or (state.step % self.every and not done):
            return
        if self.teacher is not None and self._taught is None:
            self._taught = self._row(self.teacher)
        trained, mode = state.weights(state.ema.shadows), state.unet.training
        row = self._row(state.unet)
        state.unet.train(mode)
        state.weights(trained)
        if row is not None:
            rows = [row] if self._taught is None else [self._taught, row]
            save_picture(np.concatenate(rows), self.folder / SHEETS / f"step-{state.step:08d}.png")

    def _row(self, unet: Any) -> np.ndarray | None:
        """Return the pictures of a network beside one another, [H, W, C]; None while they are not finite."""
        scheduler = make_scheduler("ddim", self.scheduler.config)
        steps = min(STEPS, int(scheduler.config.num_train_timesteps))
        try:
            images = sample(
                EagerDenoiser(unet), scheduler, seed=self.seed, indices=range(IMAGES), num_inference_steps=steps
            )
        except DpctlError:  # a network can be far from its weights-to-be: that is no reason to end its training
            return None
        return np.concatenate(list(to_bytes(images)), axis=1)


def open_sheets(objective: Any, recipe: LoopRecipe, folder: Path) -> Sheets:
    """Return what draws the sheets of a training."""
    return Sheets(objective.scheduler, objective.teacher, folder, recipe.sample_every, recipe.seed)


def strip(folder: Path, config: Any) -> Any:
    """Return the sheets in a folder of checkpoints below one another, the teacher's row first; None without any.

    The result is a Pillow image.
    """
    from PIL import Image, ImageDraw

    paths = sorted((folder / SHEETS).glob("step-*.png"))
    if not paths:
        return None
    height, width = sample_size(config)
    scale = max(1, TILE // max(height, width))
    rows: list[tuple[str, np.ndarray]] = []
    for path in _spread(paths):
        with Image.open(path) as sheet:
            pixels = np.asarray(sheet)
        if not rows and len(pixels) > height:
            rows.append(("teacher", pixels[:height]))
        rows.append((f"step {int(path.stem.removeprefix('step-'))}", pixels[-height:]))

    tall = height * scale + GAP
    mode = "L" if rows[0][1].ndim == 2 else "RGB"
    whole = Image.new(mode, (LABEL + (width * scale + GAP) * IMAGES, tall * len(rows)), "white")
    draw = ImageDraw.Draw(whole)
    for line, (label, pixels) in enumerate(rows):
        draw.text((GAP, line * tall + tall // 2), label, fill="black", anchor="lm")
        for column in range(IMAGES):
            tile = Image.fromarray(pixels[:, column * width : (column + 1) * width])
            tile = tile.resize((width * scale, height * scale), Image.Resampling.NEAREST)
            whole.paste(tile, (LABEL + column * (width * scale + GAP), line * tall))
    return whole


def _spread(paths: list[Path]) -> list[Path]:
    """Return at most MOST_ROWS of them, the first and the last among these."""
    if len(paths) <= MOST_ROWS:
        return paths
    return [paths[place * (len(paths) - 1) // (MOST_ROWS - 1)] for place in range(MOST_ROWS)]
