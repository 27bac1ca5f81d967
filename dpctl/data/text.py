"""Captions as a pipeline's own tokenizers and text encoders read them: encoded once each, cached on disk."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Generator, Tensor

from dpctl import artifact
from dpctl.data import cache
from dpctl.data.images import Images
from dpctl.data.latents import FRAMES, INDICES, Latents, Scaling, release
from dpctl.errors import DpctlError
from dpctl.models import read_index
from dpctl.pipelines import hide_progress, load_text_parts, pipeline_class, quiet
from dpctl.progress import say
from dpctl.signature import Signature

XL = "StableDiffusionXLPipeline"
PIPELINES = ("StableDiffusionPipeline", XL)
EMBEDS, POOLED = "encoder_hidden_states", "text_embeds"
CAPTIONS_TOGETHER = 16


class Captioned(Latents):
    """Latents with their captions, some of which are left out in training: the network then learns what guidance needs.

    `texts` are embeddings [M, T, D], and pooled ones [M, P] for SDXL, whose row 0 is the one without a caption;
    `numbers` [N] is the row of each image. Where there are pooled ones, time_ids are the original height and width, the
    crop's top and left, and the height and width that the network draws (Podell et al., arXiv 2307.01952, section 2.2).
    """

    def __init__(
        self,
        images: Images,
        rows: cache.Rows,
        scaling: Scaling,
        texts: cache.Rows,
        numbers: np.ndarray,
        *,
        size: tuple[int, int],
        dropout: float,
    ) -> None:
        super().__init__(images, rows, scaling)
        self._texts, self._numbers, self._size, self._dropout = texts, numbers, size, dropout

    def captions(self, most: int) -> list[str]:
        """Return the first captions that differ from one another, `most` of them where there are as many."""
        _, places = np.unique(self._numbers, return_index=True)
        return self._images.captions([self._indices[place] for place in sorted(places)[:most]])

    def _conditions(
        self, positions: Sequence[int], flips: Sequence[int], generators: Sequence[Generator] | None
    ) -> dict[str, Tensor]:
        numbers = self._numbers[list(positions)]
        if generators is not None and self._dropout:
            drawn = [float(torch.rand((), generator=generator)) for generator in generators]
            numbers = np.where(np.array(drawn) < self._dropout, 0, numbers)
        found = {name: torch.from_numpy(np.array(values[numbers])) for name, values in self._texts.items()}
        if POOLED in found:
            frames = self._rows[FRAMES][list(positions), list(flips)]
            target = np.broadcast_to(np.array(self._size), (len(frames), 2))
            found["time_ids"] = torch.from_numpy(np.concatenate([frames, target], 1)).float()
        return found


def open_captioned(
    images: Images,
    rows: cache.Rows,
    scaling: Scaling,
    *,
    setting: cache.Setting,
    signature: Signature,
    size: tuple[int, int],
    dropout: float,
) -> Captioned:
    """Open latents with their captions, encoded by the setting's pipeline for the network of a signature.

    Raises a DpctlError for another pipeline than those of `PIPELINES`, for images without captions and for embeddings
    that do not fit the network.
    """
    captions = images.captions(rows[INDICES].tolist())
    distinct = sorted(set(captions))
    places = {caption: number for number, caption in enumerate(distinct, start=1)}
    texts = encode_captions(setting, distinct)
    for name, values in texts.items():
        wanted = next((t.shape[-1] for t in signature.inputs if t.name == name), None)
        if values.shape[-1] != wanted:
            got = f"{name} of width {values.shape[-1]}, the network takes {wanted or 'none'}"
            raise DpctlError("the text encoders do not fit the network", got, "bring the pipeline as it was saved")
    numbers = np.array([places[caption] for caption in captions])
    return Captioned(images, rows, scaling, texts, numbers, size=size, dropout=dropout)


def require_readable(directory: Path) -> Any:
    """Return the class of a pipeline whose captions can be encoded; a DpctlError for any other."""
    kind = pipeline_class(directory)
    if kind.__name__ not in PIPELINES:
        todo = f"bring one of: {', '.join(PIPELINES)}"
        raise DpctlError("the texts of this pipeline cannot be encoded", f"{kind.__name__} in {directory}", todo)
    return kind


def encode_captions(setting: cache.Setting, captions: Sequence[str]) -> cache.Rows:
    """Return the embeddings of the empty caption, as the pipeline's guidance has it, and of `captions` after it."""
    directory, device = setting.directory, setting.device
    kind = require_readable(directory)
    index = read_index(directory)
    readers = sorted(entry for entry in index if entry.startswith(("tokenizer", "text_encoder")))
    about = {name: index.get(name) for name in ("_class_name", "force_zeros_for_empty_prompt", *readers)}
    files = {name: artifact.digest(artifact.hash_files(directory / name)) for name in readers}
    key = cache.key(kind=EMBEDS, about=json.dumps(about), texts=json.dumps(captions), **files)
    columns = (EMBEDS, POOLED) if kind.__name__ == XL else (EMBEDS,)

    @contextmanager
    def maker() -> Iterator[Any]:
        hide_progress()
        pipe = load_text_parts(kind, directory).to(device)
        with quiet():
            _report_cut(pipe, captions)
            yield partial(_encoded, pipe, captions)
        del pipe
        release(device)

    what = f"embeddings of {len(captions)} captions"
    return cache.rows(
        setting.folder / key, columns, len(captions) + 1, maker, what=what, together=CAPTIONS_TOGETHER, bar=setting.bar
    )


@torch.no_grad()
def _encoded(pipe: Any, captions: Sequence[str], numbers: range) -> cache.Rows:
    """Return the rows `numbers`: caption n is row n + 1, row 0 what the pipeline puts in the place of a prompt."""
    asked: dict[str, Any] = {"device": pipe.device, "num_images_per_prompt": 1}
    parts = []
    if numbers.start == 0:
        found = pipe.encode_prompt([""], do_classifier_free_guidance=True, **asked)
        parts.append(found[1::2])
    if texts := [captions[number - 1] for number in numbers if number > 0]:
        found = pipe.encode_prompt(texts, do_classifier_free_guidance=False, **asked)
        parts.append(found[::2])
    joined = [torch.cat(values).float().cpu().numpy() for values in zip(*parts, strict=True)]
    return dict(zip((EMBEDS, POOLED), joined, strict=False))


def _report_cut(pipe: Any, captions: Sequence[str]) -> None:
    """Say how many captions are longer than what the text encoders read."""
    most = int(pipe.tokenizer.model_max_length)
    longer = sum(len(pipe.tokenizer(caption).input_ids) > most for caption in captions)
    if longer:
        say(f"{longer} of {len(captions)} captions have more than {most} tokens: what follows is not read")
