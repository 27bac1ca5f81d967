"""The Inception file: made from layers of the same names at toy size, since torch-fidelity is the user's to install."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpctl.bench import inception
from dpctl.bench.metrics._features import FeatureSpace
from dpctl.errors import DpctlError


def extractor() -> SimpleNamespace:
    """Layers of torch-fidelity's names: two that compute, in both ends, and others that hand on."""
    torch.manual_seed(0)
    layers: dict[str, torch.nn.Module] = {name: torch.nn.Identity() for name in inception.LAYERS}
    layers["Conv2d_1a_3x3"] = torch.nn.Conv2d(3, 8, 3, stride=16)
    layers["Mixed_7c"] = torch.nn.Conv2d(8, 5, 1)
    layers["AvgPool"] = torch.nn.AdaptiveAvgPool2d((1, 1))
    return SimpleNamespace(**{name: layer.eval() for name, layer in layers.items()})


def test_the_file_scales_bytes_as_inception_does(tmp_path: Path) -> None:
    layers = extractor()
    inception.export(layers, tmp_path / "net.onnx", "toy 5")
    space = FeatureSpace(tmp_path / "net.onnx", tmp_path, "", resizes=True)
    assert space.about_network == "toy 5"
    assert space.size == (299, 299)
    images = np.random.default_rng(0).integers(0, 256, size=(3, 299, 299, 3), dtype=np.uint8)
    with torch.inference_mode():
        # Inception's own preprocessing, of bytes.
        own = (torch.from_numpy(images).permute(0, 3, 1, 2).float() - 128) / 128
        expected = layers.AvgPool(layers.Mixed_7c(layers.Conv2d_1a_3x3(own))).flatten(1)
    assert space.rows(images) == pytest.approx(expected.numpy(), abs=1e-5)


def test_a_pickle_that_is_not_the_published_one_is_never_read(tmp_path: Path) -> None:
    (tmp_path / inception.WEIGHTS).write_bytes(b"another pickle")
    for path, said in ((tmp_path / inception.WEIGHTS, "another SHA-256"), (tmp_path / "missing.pth", "no such file")):
        with pytest.raises(DpctlError, match=said):
            inception.write(path, tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"), [([], 2, "WEIGHTS.pth OUT.onnx"), (["a", "b"], 1, "no such file")]
)
def test_it_runs_as_a_module(arguments: list[str], code: int, said: str) -> None:
    done = subprocess.run([sys.executable, "-m", "dpctl.bench.inception", *arguments], capture_output=True, text=True)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
