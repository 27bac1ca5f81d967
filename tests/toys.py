"""What tests of several folders build their toys from: parts of pipelines that diffusers and transformers save."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

# A text encoder of CLIP, and the tokens that `tokenizer` begins and ends with.
TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "projection_dim": 16,
    "bos_token_id": 98,
    "eos_token_id": 99,
    "pad_token_id": 99,
}


class Done(NamedTuple):
    """How a run of the command ended."""

    code: int
    out: str
    err: str


def tokenizer(directory: Path) -> Any:
    """Return a tokenizer of single letters."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(97, 123)]
    words = letters + [f"{letter}</w>" for letter in letters]
    words += [f"unused{n}" for n in range(98 - len(words))] + ["<|startoftext|>", "<|endoftext|>"]
    directory.mkdir(exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps({word: index for index, word in enumerate(words)}))
    (directory / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(directory / "vocab.json"), str(directory / "merges.txt"), model_max_length=77)


def decoder(kind: Any, **changed: Any) -> Any:
    """Return a VAE of a class, of two levels."""
    size = {"latent_channels": 4, "block_out_channels": (8, 16), "norm_num_groups": 4}
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return kind(**(size | blocks | changed)).eval()


# --- whole pipelines, with networks over 8x8 latents of 16x16 pictures ----------------------------------------------

# As small as a UNet2DModel can be; every pipeline's network is one like it.
LEVEL: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}
UNCONDITIONAL = LEVEL | {
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
}
TEXTUAL = LEVEL | {
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
    "cross_attention_dim": 24,
}
# Two text encoders of widths 24 and 24, the second with a projection to 32; six time_ids of 8 each.
XL = TEXTUAL | {
    "cross_attention_dim": 48,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 80,
}


def own_scheduler() -> Any:
    """Return the scheduler of the pipelines."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def seeded(make: Any, seed: int = 0) -> Any:
    """Return what `make` makes under a seed of torch's own generator."""
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def save_latent(directory: Path, vae: str = "VQModel", **changed: Any) -> Path:
    """Save a latent diffusion pipeline; with `num_class_embeds` a class-conditional one."""
    import diffusers

    more = {"num_vq_embeddings": 16} if vae == "VQModel" else {}
    coder = seeded(lambda: decoder(getattr(diffusers, vae), latent_channels=3, **more))
    unet = seeded(lambda: diffusers.UNet2DModel(**(UNCONDITIONAL | changed)))
    diffusers.LDMPipeline(vqvae=coder, unet=unet, scheduler=own_scheduler()).save_pretrained(directory)
    return directory


def save_textual(directory: Path, kind: str = "StableDiffusionPipeline", vae: Any = None, **changed: Any) -> Path:
    """Save a pipeline that draws what a text says: Stable Diffusion's, or SDXL's with its second text encoder."""
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    words = tokenizer(directory.with_name(f"{directory.name}-words"))
    parts: dict[str, Any] = {"tokenizer": words, "scheduler": own_scheduler()}
    parts["text_encoder"] = seeded(lambda: CLIPTextModel(CLIPTextConfig(**TEXT)).eval())
    parts["vae"] = seeded(lambda: decoder(diffusers.AutoencoderKL, **(vae or {})))
    config = TEXTUAL
    if kind == "StableDiffusionXLPipeline":
        config, second = XL, CLIPTextConfig(**TEXT | {"projection_dim": 32})
        parts["text_encoder_2"] = seeded(lambda: CLIPTextModelWithProjection(second).eval(), 1)
        parts |= {"tokenizer_2": words, "add_watermarker": False}
    else:
        parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    unet = seeded(lambda: diffusers.UNet2DConditionModel(**(config | changed)))
    getattr(diffusers, kind)(unet=unet, **parts).save_pretrained(directory)
    return directory


def save_photos(directory: Path, count: int = 8, captions: bool = True) -> Path:
    """Save pictures of several sizes, none as its mirror image, with a class each of three, and with captions."""
    import numpy as np
    from PIL import Image

    directory.mkdir()
    random = np.random.default_rng(0)
    lines = []
    for number in range(count):
        height, width = 20 + number % 3, 24 + number % 5
        ramp = np.linspace(0, 255, width)[None, :, None] * random.uniform(0.3, 1, 3)
        pixels = np.broadcast_to(ramp, (height, width, 3)) * np.linspace(0.5, 1, height)[:, None, None]
        Image.fromarray(pixels.astype(np.uint8)).save(directory / f"{number}.png")
        told = {"text": ("a red cat", "a dog", "two birds")[number % 3]} if captions else {}
        lines.append(json.dumps({"file_name": f"{number}.png", "label": number % 3, **told}))
    (directory / "metadata.jsonl").write_text("\n".join(lines))
    return directory


# Every kind of pipeline that has a VAE: how its toy is saved.
PIPELINES: dict[str, Callable[[Path], Path]] = {
    "quantized": save_latent,
    "labelled": lambda path: save_latent(path, "AutoencoderKL", num_class_embeds=4),
    "sd": save_textual,
    "sdxl": lambda path: save_textual(path, "StableDiffusionXLPipeline"),
}
