"""Pictures of a training: the same noise, every so many steps, by the averaged weights as they are then."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dpctl.data import save_picture, to_bytes
from dpctl.data.latents import release
from dpctl.errors import DpctlError
from dpctl.finetune import guards
from dpctl.finetune.checkpoint import SHEETS
from dpctl.finetune.painting import IMAGES, OverPixels, Paint
from dpctl.finetune.state import State
from dpctl.progress import say
from dpctl.recipe import LoopRecipe
from dpctl.signature import sample_size

# Of the strip: how many sheets it shows at most, spread evenly, and its measures in pixels. Smaller pictures than TILE
# are enlarged, larger ones than LARGEST made smaller.
MOST_ROWS = 12
TILE, LARGEST, LABEL, GAP = 64, 128, 76, 4


@dataclass
class Sheets:
    """Draws a sheet every `every` steps into the folder of the checkpoints: the teacher's row, below it the model's.

    Each row has the same noise. Nothing that training reads is changed by it.
    """

    paint: Paint
    teacher: Any
    folder: Path
    every: int
    _taught: np.ndarray | None = None

    def draw(self, state: State, *, done: bool) -> None:
        """Draw where it is time to, and at the end; only in the process that has the averaged weights."""
        if state.ema is None or not self.every or (state.step % self.every and not done):
            return
        with _unnoticed(state.unet):
            if self.teacher is not None and self._taught is None:
                self._taught = self._row(self.teacher, state.step)
            trained = state.weights(state.ema.shadows)
            try:
                row = self._row(state.unet, state.step)
            finally:
                state.weights(trained)
        if row is not None:
            rows = [row] if self._taught is None else [self._taught, row]
            save_picture(np.concatenate(rows), self.folder / SHEETS / f"step-{state.step:08d}.png")

    def _row(self, unet: Any, step: int) -> np.ndarray | None:
        """Return the pictures of a network beside one another, [H, W, C]; None while they are not finite."""
        try:
            images = self.paint(unet)
        # A network can be far from its weights-to-be, and memory short for pictures: no reason to end its training.
        except (DpctlError, RuntimeError) as problem:
            if not isinstance(problem, DpctlError) and not guards.is_exhaustion(problem):
                raise
            failed, got = problem.args[:2] if isinstance(problem, DpctlError) else ("out of memory", str(problem))
            say(f"no sample sheet of step {step}: {failed} ({got.splitlines()[0]})")
            return None
        finally:
            release(next(unet.parameters()).device)
        return np.concatenate(list(to_bytes(images)), axis=1)


@contextmanager
def _unnoticed(unet: Any) -> Iterator[None]:
    """Give a training back its network's mode and torch's random state at the end."""
    device, mode = next(unet.parameters()).device, unet.training
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            unet.train(mode)


def open_sheets(objective: Any, recipe: LoopRecipe, folder: Path, paint: Paint | None = None) -> Sheets:
    """Return what draws the sheets of a training; without `paint` the network draws pictures itself."""
    paint = paint or OverPixels(objective.scheduler, recipe.seed)
    return Sheets(paint, objective.teacher, folder, recipe.sample_every)


def strip(folder: Path, config: Any) -> Any:
    """Return the sheets in a folder of checkpoints below one another, the teacher's row first; None without any.

    The result is a Pillow image.
    """
    from PIL import Image, ImageDraw

    paths = sorted((folder / SHEETS).glob("step-*.png"))
    if not paths:
        return None
    rows: list[tuple[str, np.ndarray]] = []
    for path in _spread(paths):
        with Image.open(path) as sheet:
            pixels = np.asarray(sheet)
        height, width = _size(pixels, config)
        if not rows and len(pixels) > height:
            rows.append(("teacher", pixels[:height]))
        rows.append((f"step {int(path.stem.removeprefix('step-'))}", pixels[-height:]))

    tile = _tile(height, width)
    wide, tall = (side + GAP for side in tile)
    mode = "L" if rows[0][1].ndim == 2 else "RGB"
    whole = Image.new(mode, (LABEL + wide * IMAGES, tall * len(rows)), "white")
    filtering = Image.Resampling.NEAREST if tile[0] >= width else Image.Resampling.LANCZOS
    draw = ImageDraw.Draw(whole)
    for line, (label, pixels) in enumerate(rows):
        draw.text((GAP, line * tall + tall // 2), label, fill="black", anchor="lm")
        for column in range(IMAGES):
            picture = Image.fromarray(pixels[:, column * width : (column + 1) * width])
            whole.paste(picture.resize(tile, filtering), (LABEL + column * wide, line * tall))
    return whole


def _size(pixels: np.ndarray, config: Any) -> tuple[int, int]:
    """Return (height, width) of the pictures on a sheet: of the network's shape, but those from latents are larger."""
    rows, columns = sample_size(config)
    width = pixels.shape[1] // IMAGES
    return width * rows // columns, width


def _tile(height: int, width: int) -> tuple[int, int]:
    """Return (width, height) of a picture in the strip."""
    longest = max(height, width)
    if longest > LARGEST:
        return max(1, width * LARGEST // longest), max(1, height * LARGEST // longest)
    scale = max(1, TILE // longest)
    return width * scale, height * scale


def _spread(paths: list[Path]) -> list[Path]:
    """Return at most MOST_ROWS of them, the first and the last among these."""
    if len(paths) <= MOST_ROWS:
        return paths
    return [paths[place * (len(paths) - 1) // (MOST_ROWS - 1)] for place in range(MOST_ROWS)]
