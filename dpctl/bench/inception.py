"""Write the standard Inception network of FID and KID as an ONNX file, for `dpctl bench --features`.

python -m dpctl.bench.inception WEIGHTS.pth OUT.onnx

The network is torch-fidelity's `inception-v3-compat` (2048 features), which computes what the original TensorFlow graph
does; `pip install 'dpctl-diffusion[inception]'` brings it. Its weights are a pickle, which runs code when it is read:
only the published file, known by its SHA-256, is handed over. Nothing is downloaded.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dpctl import artifact
from dpctl.bench.metrics._features import ABOUT
from dpctl.errors import DpctlError

WEIGHTS = "weights-inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
SOURCE = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{WEIGHTS}"
SIZE = 299
# torch-fidelity's own layers, from the resized picture to the 2048 features.
LAYERS = (
    *("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3", "MaxPool_2"),
    *("Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"),
    *("Mixed_7a", "Mixed_7b", "Mixed_7c", "AvgPool"),
)


def write(weights: Path, out: Path) -> None:
    """Write the network with the published weights; a DpctlError for others, or without torch-fidelity."""
    if not weights.is_file() or artifact.hash_file(weights) != SHA256:
        got = f"{weights}: {'another SHA-256' if weights.is_file() else 'no such file'}"
        raise DpctlError("these are not the published Inception weights", got, f"fetch {SOURCE} (SHA-256 {SHA256})")
    if not out.parent.is_dir():
        raise DpctlError("the network cannot be written", f"no directory {out.parent}", "make it first")
    try:
        import torch_fidelity
    except ImportError as problem:
        todo = "pip install 'dpctl-diffusion[inception]'"
        raise DpctlError("Inception's layers are torch-fidelity's", str(problem), todo) from None
    extractor = torch_fidelity.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    export(extractor, out, f"inception-v3-compat 2048 of torch-fidelity, weights {SHA256[:8]}")


def export(extractor: Any, out: Path, about: str) -> None:
    """Write the layers between resizing and classification: pictures [B, 3, 299, 299] in [-1, 1] to features."""
    import torch

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.Sequential(*(getattr(extractor, name) for name in LAYERS))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            # Inception's own scale is (byte - 128) / 128; ours is byte / 127.5 - 1.
            return self.layers(((images + 1) * 127.5 - 128) / 128).flatten(1)

    program = torch.onnx.export(
        Features().eval(),
        (torch.zeros(2, 3, SIZE, SIZE),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        input_names=["images"],
        output_names=["features"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[ABOUT] = about
    program.save(out, external_data=False)


def main(arguments: Sequence[str]) -> int:
    """Run as a script; return the exit code."""
    if len(arguments) != 2:
        sys.stderr.write(f"{__doc__}")
        return 2
    try:
        write(Path(arguments[0]), Path(arguments[1]))
    except DpctlError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
