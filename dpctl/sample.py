"""`dpctl sample`: images from any model or exported directory, as a grid and one PNG each."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpctl import artifact, progress
from dpctl.errors import DpctlError
from dpctl.inspect import Report
from dpctl.models import resolve

SAMPLES = "samples.json"


@dataclass(frozen=True)
class Wish:
    """What to draw, and how."""

    count: int = 16
    num_inference_steps: int = 50
    scheduler: str = "ddim"
    backend: str = "auto"
    batch_size: int = 16
    seed: int = 0
    prompt: str | None = None
    guidance_scale: float | None = None


def draw(model: str, out: Path, wish: Wish, *, force: bool = False, bar: progress.Bar = progress.no_bar) -> Report:
    """Draw `wish.count` images into `out`: grid.png, 00000.png, 00001.png, ... and samples.json, what was asked for.

    Image i depends on (seed, i) and the prompt alone, not on the batch size. Raises a DpctlError for an unusable model
    or output.
    """
    if min(wish.count, wish.num_inference_steps, wish.batch_size) < 1:
        raise DpctlError("a count is below 1", str(asdict(wish)), "give 1 or more")
    from dpctl.data import picture

    artifact.refuse_existing(out, force=force)
    images = sample_bytes(resolve(model), wish, bar)
    with artifact.writing(out, force=force) as directory:
        for index, image in enumerate(images):
            picture(image).save(directory / f"{index:05d}.png")
        picture(grid(images)).save(directory / "grid.png")
        asked = json.dumps({"model": model, **asdict(wish)}, indent=2)
        (directory / SAMPLES).write_text(asked + "\n", encoding="utf-8")
    document = {"out": str(out), "model": model, **asdict(wish), "files": len(images) + 2}
    return Report(document, [f"{len(images)} images and grid.png in {out}"])


def sample_bytes(directory: Path, wish: Wish, bar: progress.Bar = progress.no_bar) -> Any:
    """Draw images from a directory and return them as bytes [N, H, W, C].

    A pipeline with a VAE makes its images itself; other networks sample through our own loop.
    """
    import torch

    from dpctl.bench.painter import open_painter
    from dpctl.data import to_bytes

    manifest = artifact.read_manifest(directory)
    exported = manifest is not None and manifest.kind == "exported"
    backend = ("ort" if exported else "eager") if wish.backend == "auto" else wish.backend
    asked: dict[str, Any] = {"scheduler": wish.scheduler, "seed": wish.seed, "guidance_scale": wish.guidance_scale}
    prompts = () if wish.prompt is None else (wish.prompt,)
    parts = []
    with open_painter(directory, backend, prompts=prompts, **asked) as painter, bar("sample", wish.count) as advance:
        for start in range(0, wish.count, wish.batch_size):
            indices = range(start, min(start + wish.batch_size, wish.count))
            parts.append(painter.paint(indices, wish.num_inference_steps))
            advance(len(indices))
    return to_bytes(torch.cat(parts))


def grid(images: Any, columns: int | None = None) -> Any:
    """Lay images [N, H, W, C] out in rows, with a border of one pixel; the last row is filled with white."""
    import numpy as np

    count, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    sheet = np.full((rows * (height + 1) + 1, columns * (width + 1) + 1, channels), 255, dtype=np.uint8)
    for index, image in enumerate(images):
        top, left = (index // columns) * (height + 1) + 1, (index % columns) * (width + 1) + 1
        sheet[top : top + height, left : left + width] = image
    return sheet
