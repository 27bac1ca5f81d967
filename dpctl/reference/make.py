"""Make the embedded reference again from Debian's package `dataset-fashion-mnist`.

python -m dpctl.reference.make images    # IDX files -> train.npz, test.npz, and the 10,000 embedded images
python -m dpctl.reference.make features  # train the small feature network, write features.onnx and statistics.npz
dpctl train --data build/reference/train.npz ...   # the DDPM itself (see `make reference`)
python -m dpctl.reference.make install DIR         # put a trained directory in its place, with the model card
"""

import gzip
import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from dpctl.errors import DpctlError

HERE = Path(__file__).parent
BUILD = Path("build/reference")
DATASET = Path("/usr/share/datasets/fashion-mnist")
EMBEDDED = 10_000
FEATURES = 128


def images() -> None:
    """Write build/reference/{train,test}.npz and the embedded subset, 1,000 training images of each class."""
    BUILD.mkdir(parents=True, exist_ok=True)
    pixels, labels = _idx("train")
    np.savez_compressed(BUILD / "train.npz", images=pixels, labels=labels)
    test, test_labels = _idx("t10k")
    np.savez_compressed(BUILD / "test.npz", images=test, labels=test_labels)
    per_class = EMBEDDED // 10
    chosen = np.sort(np.concatenate([np.flatnonzero(labels == label)[:per_class] for label in range(10)]))
    np.savez_compressed(HERE / "images.npz", images=pixels[chosen])
    print(f"train {pixels.shape}, test {test.shape}, embedded {len(chosen)}")


def features(epochs: int = 6, batch_size: int = 256, seed: int = 0) -> None:
    """Train the feature network on the training images; write features.onnx and statistics.npz of the test images."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    train, labels = _tensors("train")
    test, test_labels = _tensors("test")
    network = _network()
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.01)
    steps = epochs * (len(train) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for rows in torch.randperm(len(train))[: len(train) // batch_size * batch_size].split(batch_size):
            flipped = torch.where(torch.rand(len(rows), 1, 1, 1) < 0.5, train[rows].flip(-1), train[rows])
            loss = nn.functional.cross_entropy(network(flipped)[1], labels[rows], label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        accuracy = _accuracy(network.eval(), test, test_labels)
        network.train()
        print(f"epoch {epoch + 1}/{epochs}: test accuracy {accuracy:.4f}", flush=True)
    _write_features(network.eval(), test, _accuracy(network, test, test_labels))


def install(directory: Path) -> None:
    """Put a trained model directory in its place in the package."""
    target = HERE / "model"
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(directory, target)
    print(f"installed {directory} as {target}")


def card(bench: Path) -> None:
    """Write the model card README.md with loss.png and samples.png; FID and KID as the bench file has them."""
    from dpctl import artifact
    from dpctl.data import picture
    from dpctl.sample import Wish, grid, sample_bytes

    manifest = artifact.read_manifest(HERE / "model")
    assert manifest is not None
    _plot_losses(json.loads((HERE / "model" / "losses.json").read_text(encoding="utf-8")), HERE / "loss.png")
    sheet = picture(grid(sample_bytes(HERE / "model", Wish(count=48, num_inference_steps=50)), columns=12))
    sheet.resize((sheet.width * 2, sheet.height * 2), 0).save(HERE / "samples.png")
    about = json.loads((HERE / "features.json").read_text(encoding="utf-8"))
    text = (HERE / "card.md.in").read_text(encoding="utf-8")
    recipe = "\n".join(f"| {name} | {value} |" for name, value in manifest.recipe.items())
    quality = _quality(json.loads(bench.read_text(encoding="utf-8")))
    described = {"stats": manifest.stats, "created": manifest.created, "environment": manifest.environment}
    filled = text.format(recipe=recipe, about=about, quality=quality, **described)
    (HERE / "README.md").write_text(filled, encoding="utf-8")


def _quality(bench: dict[str, Any]) -> str:
    """Say the baseline's FID and KID of a bench file, each with its interval and sample count."""
    found = next(q for q in bench["quality"] if q["model"] == bench["models"][0]["name"])
    steps, scheduler = found["num_inference_steps"], bench["recipe"]["scheduler"]
    lines = [
        f"* **{name.upper()} {figure['value']:.4g}** (95 % interval {figure['low']:.4g} to {figure['high']:.4g}), "
        f"{figure['count']} samples against {figure['against']}, {scheduler}, {steps} steps"
        for name, figure in found["figures"].items()
    ]
    return "\n".join(lines)


def _plot_losses(losses: list[float], path: Path) -> None:
    from matplotlib.figure import Figure

    window = max(1, len(losses) // 100)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(losses, color="0.8", linewidth=0.5, label="each step")
    axes.semilogy(np.arange(len(smooth)) + window / 2, smooth, label=f"mean of {window}")
    axes.set(xlabel="step", ylabel="denoising loss")
    axes.legend()
    figure.savefig(path, dpi=100)


def _network() -> Any:
    from torch import nn

    class Network(nn.Module):
        """Three strided convolutions and a pooled feature vector: images [B, 1, 28, 28] -> features, logits."""

        def __init__(self) -> None:
            super().__init__()
            widths = (1, 32, 64, FEATURES)
            blocks: list[nn.Module] = []
            for before, after in pairwise(widths):
                blocks += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
                blocks += [nn.Conv2d(after, after, 3, padding=1), nn.BatchNorm2d(after), nn.SiLU()]
            self.trunk = nn.Sequential(*blocks)
            self.head = nn.Linear(FEATURES, 10)

        def forward(self, images: Any) -> tuple[Any, Any]:
            pooled = self.trunk(images).mean((2, 3))
            return pooled, self.head(pooled)

    return Network()


def _write_features(network: Any, test: Any, accuracy: float) -> None:
    import torch

    from export.graph import clear_notes

    batch = torch.export.Dim("batch", min=1, max=65536)
    program = torch.onnx.export(
        network,
        (test[:2],),
        dynamo=True,
        input_names=["images"],
        output_names=["features", "logits"],
        dynamic_shapes={"images": {0: batch}},
        opset_version=18,
        verbose=False,
    )
    assert program is not None
    clear_notes(program)
    program.save(HERE / "features.onnx", external_data=False)
    with torch.no_grad():
        rows = torch.cat([network(part)[0] for part in test.split(500)]).double().numpy()
    np.savez_compressed(
        HERE / "statistics.npz",
        mean=rows.mean(0),
        covariance=np.cov(rows, rowvar=False),
        count=np.int64(len(rows)),
        features=rows.astype(np.float16),
    )
    about = {
        "network": "six convolutions, pooled to 128 features, trained on the Fashion-MNIST training images",
        "test_accuracy": accuracy,
        "statistics": f"{len(rows)} test images",
    }
    (HERE / "features.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _accuracy(network: Any, images: Any, labels: Any) -> float:
    import torch

    with torch.no_grad():
        right = sum(
            int((network(x)[1].argmax(1) == y).sum()) for x, y in zip(images.split(500), labels.split(500), strict=True)
        )
    return right / len(images)


def _tensors(split: str) -> tuple[Any, Any]:
    import torch

    with np.load(BUILD / f"{split}.npz") as archive:
        pixels = torch.from_numpy(archive["images"]).float().div(127.5).sub(1.0).unsqueeze(1)
        return pixels, torch.from_numpy(archive["labels"]).long()


def _idx(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Read one split of the IDX files (16 and 8 bytes of header, then bytes)."""
    paths = [DATASET / f"{split}-{kind}-ubyte.gz" for kind in ("images-idx3", "labels-idx1")]
    for path in paths:
        if not path.is_file():
            raise DpctlError("the data set is not installed", str(path), "apt-get install dataset-fashion-mnist")
    raw, label = (gzip.decompress(path.read_bytes()) for path in paths)
    pixels = np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 28, 28)
    return pixels, np.frombuffer(label, np.uint8, offset=8)


def main(arguments: list[str]) -> int:
    """Run one step by name."""
    steps = {"images": images, "features": features}
    try:
        if len(arguments) == 2 and arguments[0] in ("install", "card"):
            {"install": install, "card": card}[arguments[0]](Path(arguments[1]))
        elif len(arguments) == 1 and arguments[0] in steps:
            steps[arguments[0]]()
        else:
            print(__doc__)
            return 2
    except DpctlError as problem:
        print(problem, file=sys.stderr)
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
