"""What tests of several folders build their toys from: parts of pipelines that diffusers and transformers save."""

import json
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
