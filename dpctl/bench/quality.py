"""The quality of each model's samples by every metric of the registry."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dpctl import registry
from dpctl.bench.metrics import Drawn, Figure, LeftOut, clip_score
from dpctl.bench.metrics._features import FeatureSpace, reference_space
from dpctl.bench.metrics._real import open_space
from dpctl.bench.result import Quality
from dpctl.errors import DpctlError
from dpctl.progress import Advance, Bar, silent
from dpctl.recipe import BenchRecipe

METRICS = "dpctl.bench.metrics"


class Samples(NamedTuple):
    """Pictures of one model on one backend, and the file below the output that holds them.

    The baseline at fewer steps is compared with itself at `instead_of`.
    """

    model: str
    backend: str
    num_inference_steps: int
    file: str
    instead_of: int | None = None


def check(recipe: BenchRecipe) -> None:
    """Raise a DpctlError for a feature network without real images, the reverse, or with nothing to judge."""
    given = {"features": recipe.features, "real_images": recipe.real_images}
    found = [name for name, value in given.items() if value is not None]
    if len(found) == 1:
        todo = "give --features and --real-images together, or neither for the embedded ones"
        raise DpctlError("FID and KID need a network and the real images", f"{found[0]} alone", todo)
    found += ["clip"] if recipe.clip is not None else []
    if found and recipe.samples == 0:
        raise DpctlError("there would be nothing to judge", f"{', '.join(found)}, but 0 samples", "draw samples")
    if recipe.clip is not None:
        clip_score.load(Path(recipe.clip))  # a damaged one is named before anything is measured


def feature_space(recipe: BenchRecipe, shape: tuple[int, int, int], out: Path, bar: Bar) -> FeatureSpace | None:
    """Return the feature network that judges pictures [C, H, W]: the recipe's, else the embedded one, if there."""
    if recipe.features is None or recipe.real_images is None:
        return reference_space()
    return open_space(Path(recipe.features), recipe.real_images, shape, out, bar)


def save_samples(path: Path, parts: Sequence[np.ndarray]) -> None:
    """Save samples [N, H, W, C] of bytes as an `.npz` with the array `images`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, images=np.concatenate(parts))


def load_samples(path: Path) -> np.ndarray:
    """Return the samples [N, H, W, C] of bytes."""
    with np.load(path, allow_pickle=False) as archive:
        return archive["images"]


def judge(drawn: Drawn) -> tuple[dict[str, Figure], dict[str, str]]:
    """Return the figures by metric name, and for each metric that was left out the reason."""
    figures: dict[str, Figure] = {}
    left_out: dict[str, str] = {}
    for name in registry.names(METRICS):
        try:
            figures[name] = registry.load(METRICS, name, "metric").measure(drawn)
        except LeftOut as reason:
            left_out[name] = str(reason)
    return figures, left_out


def assess(
    samples: Sequence[Samples],
    out: Path,
    baseline: str,
    space: FeatureSpace | None,
    *,
    prompts: tuple[str, ...] | None = None,
    clip: str | None = None,
    advance: Advance = silent,
) -> tuple[Quality, ...]:
    """Judge all samples, each against the baseline's own of the same steps.

    Prompt i is that of picture i of every model; `clip` is the directory of the CLIP model that compares the two.
    """
    # The first of the baseline's at a number of steps are its own: approximations come after them.
    own: dict[int, np.ndarray] = {}
    found = []
    for each in samples:
        images, steps = load_samples(out / each.file), each.num_inference_steps
        first = each.model == baseline and each.instead_of is None and steps not in own
        if first:
            own[steps] = images
        theirs = None if first else own.get(each.instead_of or steps)
        figures, left_out = judge(Drawn(images, theirs, space, prompts, None if clip is None else Path(clip)))
        found.append(Quality(*each[:4], figures, left_out))
        advance(1, model=each.model)
    return tuple(found)
