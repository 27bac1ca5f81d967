"""The models that the scripts behind docs/latency.md judge: `reference`, and the paper's network for CIFAR-10.

Nobody's weights of the latter are at hand, and training it as the paper does takes days. It is trained here for half an
hour on the reference's images, 32x32 and in three equal channels: enough that its channels are not alike, and that a
denoising loss and pictures say what a cut costs.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpctl import progress
from dpctl.bench.metrics._features import resized
from dpctl.data import REFERENCE_IMAGES
from dpctl.finetune import train
from dpctl.finetune.checkpoint import folder_for
from dpctl.recipe import FinetuneRecipe, TrainRecipe
from scripts.pruning_sizes import write_random

ROOT = Path(__file__).resolve().parent.parent
WORK = Path("build/latency")  # from the root
SHAPE = "DDPM, CIFAR-10 32x32"


@dataclass(frozen=True)
class Subject:
    """A model, the data that it is scored on, and how its cuts are judged.

    `images` of the data are scored; `file` is the results' name below docs/latency, `profile` the latency file, on
    `threads` threads; `samples` pictures are drawn.
    """

    model: str
    data: str
    images: int
    file: str
    profile: Path
    threads: int
    samples: int
    tuned: FinetuneRecipe
    shares: tuple[str, ...] = ("0.7", "0.5", "0.35")


CIFAR_DATA, CIFAR = str(WORK / "fashion-32.npz"), str(WORK / "cifar-10")
TRAINED = TrainRecipe(
    config=str(WORK / "cifar-10-random"),
    data=CIFAR_DATA,
    steps=400,
    batch_size=32,
    learning_rate=5e-4,
    warmup_steps=40,
    ema_decay=0.98,
    mixed_precision="bf16",
    checkpoint_every=25,
)
SUBJECTS = {
    "reference": Subject(
        "reference",
        "reference",
        512,
        "front.json",
        Path("docs/latency/profile.json"),
        1,
        1024,
        FinetuneRecipe(steps=100, mixed_precision="bf16"),
    ),
    "CIFAR-10": Subject(
        CIFAR,
        CIFAR_DATA,
        128,
        "front-cifar.json",
        Path("docs/latency/profile-cifar.json"),
        2,
        256,
        FinetuneRecipe(data=CIFAR_DATA, steps=100, batch_size=32, warmup_steps=10, mixed_precision="bf16"),
        ("0.5",),
    ),
}


def ready(subject: Subject) -> Subject:
    """Return a subject whose model is there; it is trained where it is not, from where that stopped."""
    out = Path(CIFAR)
    if subject.model == CIFAR and not out.exists():
        if not Path(TRAINED.config).exists():
            write_random(SHAPE, Path(TRAINED.config))
        write_images(Path(CIFAR_DATA))
        train(out, TRAINED, resume=folder_for(out).exists(), bar=progress.bar)
    return subject


def write_images(out: Path) -> None:
    """Write the reference's images as the network takes them, [N, 32, 32, 3]."""
    with np.load(REFERENCE_IMAGES) as archive:
        images = resized(archive["images"][..., None], (32, 32))
    out.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(out, images=np.clip(np.rint(images), 0, 255).astype(np.uint8).repeat(3, axis=-1))


def as_reference(images: Any) -> Any:
    """Return pictures [N, H, W, C] as the reference's feature network takes them: grey, 28x28."""
    grey = resized(images.mean(-1, keepdims=True), (28, 28))
    return np.clip(np.rint(grey), 0, 255).astype(np.uint8)
