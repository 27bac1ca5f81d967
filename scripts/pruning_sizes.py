"""Print the table of docs/pruning.md: real architectures at `--ratio 0.3`, counted on the meta device."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

from dpctl import artifact
from dpctl.models import write_pipeline
from dpctl.prune.groups import find_groups
from dpctl.prune.network import describe
from dpctl.prune.plan import uniform
from dpctl.units import count

RATIO, ALIGN = 0.3, 8
DDPM = {
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
}
SD = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}


def _ddpm(size: int, widths: tuple[int, ...], attention: int) -> Any:
    levels = range(len(widths))
    down = tuple("AttnDownBlock2D" if level == attention else "DownBlock2D" for level in levels)
    up = tuple("AttnUpBlock2D" if level == attention else "UpBlock2D" for level in reversed(levels))
    return UNet2DModel(sample_size=size, block_out_channels=widths, down_block_types=down, up_block_types=up, **DDPM)


ARCHITECTURES = {
    "DDPM, CIFAR-10 32x32": lambda: _ddpm(32, (128, 256, 256, 256), 1),
    "DDPM, CelebA-HQ 64x64": lambda: _ddpm(64, (128, 256, 256, 256, 512), 2),
    "DDPM, LSUN 256x256": lambda: _ddpm(256, (128, 128, 256, 256, 512, 512), 4),
    "Stable Diffusion 1.x, 64x64 latents": lambda: UNet2DConditionModel(**SD),
    "Stable Diffusion 1.x inpainting": lambda: UNet2DConditionModel(in_channels=9, **SD),
    "SDXL, 128x128 latents": lambda: UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=2048,
        attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    ),
}


def write_random(name: str, out: Path) -> Path:
    """Write a pipeline of an architecture with random weights, the same ones every time; return its directory."""
    torch.manual_seed(0)
    with artifact.writing(out) as directory:
        write_pipeline(directory, unet=ARCHITECTURES[name](), scheduler=DDPMScheduler())
    return out


def row(name: str) -> str:
    """Return one line of the table: sizes before and after, groups, and what is left alone."""
    began = time.perf_counter()
    with torch.device("meta"):
        unet = ARCHITECTURES[name]().eval()
    groups = find_groups(unet)
    network = describe(unet, groups)
    before, after = network.full(), uniform(network, RATIO, ALIGN)
    cells = [name]
    for measure in ("params", "macs"):
        whole, left = network.cost(measure, before), network.cost(measure, after)
        cells += [count(whole), f"{count(left)} ({left / whole:.1%})"]
    cells += [str(len(groups.prunable)), ", ".join(groups.left_alone)]
    sys.stderr.write(f"{name}: {time.perf_counter() - began:.1f} s\n")
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table as Markdown."""
    print(f"| architecture | parameters | at --ratio {RATIO} | MACs | at --ratio {RATIO} | groups | left alone |")
    print("|---|---|---|---|---|---|---|")
    for name in ARCHITECTURES:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
