"""The other networks of a pipeline as graphs, so that an exported directory serves whole images: `--components`.

The VAE's decoder becomes `vae/decoder.onnx`, every text encoder `text_encoder/model.onnx` and so on. They stay float32
at every precision of the UNet: they run once per image, and the decoder of SDXL overflows in float16.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor as Values
from torch import nn

from dpctl.diffusion import noise_for
from dpctl.errors import DpctlError
from dpctl.models import Model
from dpctl.signature import BATCH, Signature, Tensor
from export import verify
from export.graph import write_graph

Batch = tuple[int, int, int]

DECODERS = {"AutoencoderKL": "diffusers", "VQModel": "diffusers"}
TEXT_ENCODERS = {"CLIPTextModel": "transformers", "CLIPTextModelWithProjection": "transformers"}
# Entries of model_index.json that make an image, in the order in which they run.
ENTRIES = ("text_encoder", "text_encoder_2", "vae", "vqvae")


class Decoder(nn.Module):
    """`latent_sample` [B, C, H, W], divided by the scaling factor as diffusers does, to `sample` [B, 3, 8H, 8W]."""

    def __init__(self, vae: Any) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Values) -> Values:
        return self.vae.decode(latent_sample, return_dict=False)[0]


class TextEncoder(nn.Module):
    """`input_ids` [B, T] to the last and the last but one hidden states [B, T, D] and the pooled one [B, P].

    Stable Diffusion reads the first, SDXL the second and, of its second encoder, the third.
    """

    def __init__(self, text_encoder: Any) -> None:
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, input_ids: Values) -> tuple[Values, Values, Values]:
        found = self.text_encoder(input_ids, output_hidden_states=True, return_dict=True)
        pooled = found.text_embeds if "text_embeds" in found else found.pooler_output
        return found.last_hidden_state, found.hidden_states[-2], pooled


@dataclass(frozen=True)
class Component:
    """One network of a pipeline beside its UNet, ready to be exported."""

    entry: str
    file: str
    network: nn.Module
    signature: Signature


def export_components(components: Sequence[Component], parent: str, directory: Path) -> dict[str, dict[str, Any]]:
    """Write the graphs of a pipeline's other networks; return graph, signature and parity of each by its entry.

    `parent` is the digest of the model. A breach of tolerance is a verdict: the gate is the export's.
    """
    found = {}
    for component in components:
        path = directory / component.entry / component.file
        write_graph(component.network, component.signature, path, {"parent_digest": parent})
        found[component.entry] = {
            "graph": path.relative_to(directory).as_posix(),
            "signature": component.signature.to_json(),
            **_parity(component, path),
        }
    return found


def load_components(model: Model, unet: Signature, images: Batch) -> list[Component]:
    """Load what makes an image of latents and texts, from safetensors and known classes only.

    `images` is the range of their batch. Raises a DpctlError for a pipeline without any and for unknown classes.
    """
    index = model.directory / "model_index.json"
    entries = json.loads(index.read_text(encoding="utf-8")) if index.is_file() else {}
    named = [(name, entries[name]) for name in ENTRIES if entries.get(name) and entries[name][1]]
    if not named:
        got = f"{model.directory}: no {', '.join(ENTRIES)}"
        raise DpctlError("this pipeline has no other components to export", got, "leave --components out")
    return [_component(name, str(kind[1]), model.directory / name, unet, images) for name, kind in named]


def _component(entry: str, kind: str, directory: Path, unet: Signature, images: Batch) -> Component:
    known = DECODERS | TEXT_ENCODERS
    if kind not in known:
        got = f"{entry}: {kind}"
        raise DpctlError("this component cannot be exported", got, f"leave --components out; known: {', '.join(known)}")
    network = _load(kind, known[kind], directory)
    if kind in DECODERS:
        return Component(entry, "decoder.onnx", Decoder(network).eval(), _decoder_signature(network, unet, images))
    return Component(entry, "model.onnx", TextEncoder(network).eval(), _text_signature(network, images))


def _load(kind: str, library: str, directory: Path) -> Any:
    import importlib

    try:
        loader = getattr(importlib.import_module(library), kind)
    except ImportError as problem:
        raise DpctlError(
            "a text encoder needs transformers", str(problem), "pip install 'dpctl-diffusion[text]'"
        ) from None
    if library == "transformers":
        from transformers.utils import logging

        logging.disable_progress_bar()  # ours is the only one
    # Eager attention: the exporter cannot follow the masks that transformers makes for the others.
    more = {"attn_implementation": "eager"} if library == "transformers" else {}
    try:
        return loader.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32, **more
        )
    except (OSError, ValueError, RuntimeError, TypeError) as problem:
        said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise DpctlError(
            "a component cannot be loaded", f"{directory}: {said}", "save it as safetensors, or leave --components out"
        ) from None


def _decoder_signature(vae: Any, unet: Signature, images: Batch) -> Signature:
    scale = 2 ** (len(vae.config.block_out_channels) - 1)
    latents = unet.outputs[0].shape[2:]
    grown = [f"image_{side}" if isinstance(side, str) else scale * side for side in latents]
    inputs = Tensor("latent_sample", "float32", (BATCH, int(vae.config.latent_channels), *latents))
    return Signature(
        (inputs,), (Tensor("sample", "float32", (BATCH, int(vae.config.out_channels), *grown)),), images, unet.sizes
    )


def _text_signature(encoder: Any, images: Batch) -> Signature:
    config = encoder.config
    tokens, width = int(config.max_position_embeddings), int(config.hidden_size)
    projected = type(encoder).__name__.endswith("WithProjection")
    pooled = int(config.projection_dim) if projected else width
    outputs = (
        Tensor("last_hidden_state", "float32", (BATCH, tokens, width)),
        Tensor("penultimate_hidden_state", "float32", (BATCH, tokens, width)),
        Tensor("text_embeds" if projected else "pooler_output", "float32", (BATCH, pooled)),
    )
    return Signature((Tensor("input_ids", "int64", (BATCH, tokens)),), outputs, images)


def _parity(component: Component, path: Path) -> dict[str, Any]:
    """Compare the graph with torch on as many rows as two batch sizes need; every output counts."""
    from runtime.backends.ort import run_graph

    signature = component.signature
    low, _, high = signature.batch
    runs = []
    for rows in sorted({low, max(low, min(high, 3))}):
        given = _inputs(component, rows)
        with torch.inference_mode():
            wanted = component.network(**given)
        wanted = wanted if isinstance(wanted, tuple) else (wanted,)
        names = [tensor.name for tensor in signature.outputs]
        found = run_graph(path, {name: value.numpy() for name, value in given.items()}, names)
        for name, got, value in zip(names, found, wanted, strict=True):
            errors = verify.judged([verify.compare(torch.from_numpy(got), value)], None)
            runs += [{"output": name, "batch": rows, **row} for row in errors]
    check = verify.check_rows(runs)
    worst = max(runs, key=lambda row: row["error"] if row["finite"] else float("inf"))
    return {"verdict": check["verdict"], "worst": worst, "checks": {component.entry: check}}


def _inputs(component: Component, rows: int) -> Mapping[str, Values]:
    tensor = component.signature.inputs[0]
    shape = component.signature.shape(tensor, rows)
    if tensor.dtype == "int64":
        encoder: Any = component.network.text_encoder
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(1, int(encoder.config.vocab_size), shape, generator=generator)
        ids[:, shape[1] // 2 :] = int(encoder.config.eos_token_id or 0)  # a text ends somewhere: pooling looks for it
        return {tensor.name: ids}
    return {tensor.name: noise_for(0, range(rows), shape[1:], "golden latents")}
