"""How well each picture matches its prompt, by a CLIP model of the user's (Hessel et al. 2021; 100 times the cosine).

As torchmetrics has it, whose own loading takes models from the Hub by name only. Figures of two CLIP models do not
compare.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from dpctl.bench.metrics import Drawn, Figure, LeftOut, mean_figure
from dpctl.errors import DpctlError

BETTER = "higher"
BATCH = 16


def measure(drawn: Drawn) -> Figure:
    """Return the mean over samples; its interval is the bootstrap's over samples."""
    if drawn.prompts is None:
        raise LeftOut("the pictures were drawn without prompts")
    if drawn.clip is None:
        raise LeftOut("no CLIP model was given")
    if len(drawn.prompts) != len(drawn.images):
        raise LeftOut(f"there are {len(drawn.prompts)} prompts for {len(drawn.images)} pictures")
    scores = per_image(drawn.images, drawn.prompts, *load(drawn.clip))
    if not np.isfinite(scores).all():
        raise LeftOut("the CLIP model gives values that are not finite")
    return mean_figure(scores, against=f"its prompts, by {drawn.clip.name}", better=BETTER)


@lru_cache(maxsize=1)
def load(directory: Path) -> tuple[Any, Any]:
    """Return the CLIP model of a directory and its processor; safetensors only, and never from the Hub."""
    todo = "give a directory that transformers saved: a CLIPModel in safetensors and its CLIPProcessor"
    if not (directory / "config.json").is_file():
        raise DpctlError("no CLIP model", f"{directory}: no config.json", todo)
    try:
        from transformers import CLIPModel, CLIPProcessor
        from transformers.utils import logging
    except ImportError as problem:
        raise DpctlError("CLIP runs in transformers", str(problem), "pip install 'dpctl-diffusion[text]'") from None
    logging.disable_progress_bar()  # ours is the only one
    try:
        offline = {"local_files_only": True}
        model, told = CLIPModel.from_pretrained(directory, use_safetensors=True, output_loading_info=True, **offline)
        processor = CLIPProcessor.from_pretrained(directory, **offline)
    except Exception as problem:  # its errors have no class in common
        got = f"{directory}: {str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__}"
        raise DpctlError("the CLIP model cannot be loaded", got, todo) from None
    if told["missing_keys"]:
        got = f"{directory}: {len(told['missing_keys'])} weights missing, {min(told['missing_keys'])} among them"
        raise DpctlError("the CLIP model is not whole", got, todo)
    return model.eval(), processor


def per_image(images: np.ndarray, prompts: tuple[str, ...], model: Any, processor: Any) -> np.ndarray:
    """Return 100 times the cosine of each picture [N, H, W, C] and its prompt, [N]; long prompts are cut off."""
    import torch

    pixels = np.broadcast_to(images, (*images.shape[:3], 3))  # grey ones as three equal channels
    longest = model.config.text_config.max_position_embeddings
    parts = []
    for start in range(0, len(images), BATCH):
        together = slice(start, start + BATCH)
        given = processor(
            text=list(prompts[together]),
            images=list(pixels[together]),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=longest,
        )
        with torch.inference_mode():
            found = model(**given)
        parts.append(100 * (found.image_embeds * found.text_embeds).sum(1).double())
    return torch.cat(parts).numpy()
