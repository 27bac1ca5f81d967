"""Feature networks by path: against torchmetrics over the same network in torch, and what is refused."""

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from dpctl import bench
from dpctl.bench.document import read_result
from dpctl.bench.metrics import Drawn, LeftOut, fid, kid
from dpctl.bench.metrics._features import ABOUT, FeatureSpace, resized
from dpctl.bench.metrics._real import STATISTICS, open_space
from dpctl.bench.quality import judge
from dpctl.errors import DpctlError
from dpctl.recipe import BenchRecipe

FEATURES = 6
SHAPE = (3, 8, 8)
Network = Callable[..., Path]


def pictures(seed: int, count: int = 40, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, 8, 8, channels), dtype=np.uint8)


def weights(values: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(values, FEATURES)).astype(np.float32) / np.float32(values**0.5)


@pytest.fixture
def network(tmp_path: Path) -> Network:
    """Return `network(shape, **changes)`: a file of a real ONNX network, a matrix over the flattened pictures."""

    def make(shape: tuple[Any, ...] = ("B", 3, 12, 10), *, name: str = "net.onnx", **changes: Any) -> Path:
        values = int(np.prod([axis for axis in shape[1:] if isinstance(axis, int)]))
        nodes = [
            helper.make_node("Flatten", ["images"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "weight"], ["rows"]),
            helper.make_node(changes.get("last", "Tanh"), ["rows", *changes.get("more", [])], ["features"]),
        ]
        kind = changes.get("kind", TensorProto.FLOAT)
        matrix = weights(values).astype(helper.tensor_dtype_to_np_dtype(kind))
        held = [numpy_helper.from_array(matrix, "weight"), numpy_helper.from_array(np.array([1]), "axis")]
        graph = helper.make_graph(
            nodes,
            "net",
            [helper.make_tensor_value_info("images", kind, shape)],
            [helper.make_tensor_value_info("features", kind, None)],
            held,
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
        helper.set_model_props(model, changes.get("properties", {}))
        onnx.save(model, tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def archive(tmp_path: Path) -> str:
    np.savez(tmp_path / "real.npz", images=pictures(7, 60))
    return str(tmp_path / "real.npz")


class InTorch(torch.nn.Module):
    """The same network over pictures [N, C, H, W] of bytes, resized by torch: what torchmetrics takes."""

    num_features = FEATURES

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        larger = torch.nn.functional.interpolate(images.float(), (12, 10), mode="bicubic", antialias=True)
        return torch.tanh((larger / 127.5 - 1).flatten(1) @ torch.from_numpy(weights(360)))


def planes(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("size", [(19, 13), (5, 3), (8, 8), (299, 8)])
def test_resizing_is_torchs_antialiased_bicubic(size: tuple[int, int]) -> None:
    found = resized(pictures(0, 3), size)
    expected = torch.nn.functional.interpolate(planes(pictures(0, 3)).float(), size, mode="bicubic", antialias=True)
    assert found == pytest.approx(expected.permute(0, 2, 3, 1).numpy(), abs=2e-3)


def test_fid_and_kid_are_those_of_torchmetrics(network: Network, archive: str, tmp_path: Path) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    space = open_space(network(), archive, SHAPE, tmp_path)
    drawn = Drawn(pictures(0, 60), None, space)
    theirs = FrechetInceptionDistance(InTorch(), normalize=False, input_img_size=SHAPE).set_dtype(torch.float64)
    # One subset of all: then its mean over subsets is the estimate over all pairs.
    kernel = KernelInceptionDistance(InTorch(), subsets=1, subset_size=60)
    for images, real in ((pictures(7, 60), True), (pictures(0, 60), False)):
        theirs.update(planes(images), real=real)
        kernel.update(planes(images), real=real)
    for module, value in ((fid, theirs.compute()), (kid, kernel.compute()[0])):
        found = module.measure(drawn)
        assert found.value == pytest.approx(float(value), rel=1e-4, abs=1e-5)
        assert found.low < found.value < found.high
        assert (found.count, found.against) == (60, "60 real images")


def test_the_report_names_network_features_resizing_and_images(network: Network, archive: str, tmp_path: Path) -> None:
    said = open_space(network(), archive, SHAPE, tmp_path).description
    expected = "the network net.onnx (6 features of pictures in [-1, 1], resized to 12x10, bicubic with antialiasing)"
    assert said["about"] == f"{expected}; against 60 images of {archive}"
    assert (said["real_images"], said["dimensions"]) == (60, FEATURES)
    own = network(properties={ABOUT: "some features, version 3"})
    again = open_space(own, archive, SHAPE, tmp_path).description
    assert again["about"].startswith("some features, version 3 (6 features")
    assert again["network_sha256"] != said["network_sha256"]


def test_the_statistics_of_an_earlier_run_serve(network: Network, archive: str, tmp_path: Path) -> None:
    first = open_space(network(), archive, SHAPE, tmp_path / "made")
    again = open_space(network(), str(tmp_path / "made" / STATISTICS), SHAPE, tmp_path / "unused")
    assert judge(Drawn(pictures(0), None, first)) == judge(Drawn(pictures(0), None, again))
    assert not (tmp_path / "unused").exists()
    assert f"against 60 images of the statistics {tmp_path}/made/{STATISTICS}" in again.about


def test_kid_keeps_a_part_of_many_images(
    network: Network, archive: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = open_space(network(), archive, SHAPE, tmp_path / "whole").statistics
    monkeypatch.setattr("dpctl.bench.metrics._real.KEPT", 20)
    part = open_space(network(), archive, SHAPE, tmp_path / "part").statistics
    assert (whole.mean == part.mean).all()
    assert whole.features is not None
    assert part.features is not None
    assert (len(whole.features), len(part.features), whole.count, part.count) == (60, 20, 60, 60)


def test_a_folder_of_images_serves(network: Network, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for i, picture in enumerate(pictures(7, 60)):
        Image.fromarray(picture).save(folder / f"{i:03}.png")
    found = open_space(network(), str(folder), SHAPE, tmp_path).statistics
    rows = InTorch()(planes(pictures(7, 60))).double().numpy()
    assert found.mean == pytest.approx(rows.mean(0), abs=1e-5)
    assert found.covariance == pytest.approx(np.cov(rows, rowvar=False), abs=1e-5)


def test_grey_pictures_are_three_equal_channels(network: Network, tmp_path: Path) -> None:
    grey = pictures(7, 60, channels=1)
    np.savez(tmp_path / "grey.npz", images=grey)
    found = open_space(network(), str(tmp_path / "grey.npz"), (1, 8, 8), tmp_path).statistics
    assert found.mean == pytest.approx(InTorch()(planes(grey.repeat(3, 3))).numpy().mean(0), abs=1e-5)


def test_a_network_of_any_size_gets_pictures_as_they_are(network: Network, archive: str, tmp_path: Path) -> None:
    # Over the mean of all pixels, so that any size will do.
    mean = network(("B", "C", "H", "W"), last="Identity")
    model = onnx.load(mean)
    del model.graph.node[:]
    model.graph.node.extend(
        [
            helper.make_node("GlobalAveragePool", ["images"], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["features"], axis=1),
        ]
    )
    onnx.save(model, mean)
    space = open_space(mean, archive, SHAPE, tmp_path)
    assert "not resized" in space.about
    expected = (pictures(7, 60) / 127.5 - 1).mean((0, 1, 2))
    assert space.statistics.mean == pytest.approx(expected, abs=1e-6)


def test_too_few_pictures_for_the_features_are_named(network: Network, archive: str, tmp_path: Path) -> None:
    space = open_space(network(), archive, SHAPE, tmp_path)
    assert "cannot fill" not in fid.measure(Drawn(pictures(0, FEATURES + 1), None, space)).against
    few = fid.measure(Drawn(pictures(0, FEATURES), None, space))
    assert few.against.startswith("60 real images; 6 pictures cannot fill 6 features")
    assert np.isfinite([few.value, few.low, few.high]).all()


def test_features_that_are_not_finite_leave_the_figures_out(network: Network, archive: str, tmp_path: Path) -> None:
    space = open_space(network(), archive, SHAPE, tmp_path)
    # The logarithm of a negative number: the same network otherwise, so the statistics are taken from the first.
    broken = FeatureSpace(network(last="Log", name="log.onnx"), space.statistics_file, "", resizes=True)
    with np.load(space.statistics_file) as held:
        np.savez(tmp_path / "s.npz", **{name: held[name] for name in ("mean", "covariance", "count", "features")})
    broken = dataclasses.replace(broken, statistics_file=tmp_path / "s.npz")
    for metric in (fid, kid):
        with pytest.raises(LeftOut, match=r"no finite features for \d+ of 40 pictures"):
            metric.measure(Drawn(pictures(0), None, broken))
    with pytest.raises(DpctlError, match="gives no numbers"):
        open_space(broken.network, archive, SHAPE, tmp_path / "log")
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("shape", "changes", "said"),
    [
        (("B", 192), {}, "takes other inputs"),
        (("B", 3, 8, 8, 1), {}, "takes other inputs"),
        ((4, 3, 8, 8), {}, "takes other inputs"),
        (("B", 3, 8, 8), {"kind": TensorProto.DOUBLE}, "takes other inputs"),
        (("B", 4, 8, 8), {}, "takes 4x8x8 images, the model draws 3x8x8"),
        (("B", 3, 8, 8), {"last": "Unsqueeze", "more": ["axis"]}, "gives no features"),
        (("B", 3, 8, "W"), {}, "does not run"),
    ],
)
def test_networks_that_are_none_for_features_are_refused(
    shape: tuple[Any, ...], changes: dict[str, Any], said: str, network: Network, archive: str, tmp_path: Path
) -> None:
    with pytest.raises(DpctlError, match=said):
        open_space(network(shape, **changes), archive, SHAPE, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_images_that_cannot_be_compared_with_are_refused(network: Network, archive: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", images=pictures(0, 1))
    for given, shape, said in [
        ("/nowhere", SHAPE, "no such data"),
        (archive, (3, 16, 16), "does not fit"),
        (str(tmp_path / "one.npz"), SHAPE, "too few real images"),
    ]:
        with pytest.raises(DpctlError, match=said):
            open_space(network(), given, shape, tmp_path / "out")
    with pytest.raises(DpctlError, match="network cannot be loaded"):
        open_space(tmp_path / "missing.onnx", archive, SHAPE, tmp_path / "out")


def test_statistics_that_belong_elsewhere_are_refused(network: Network, archive: str, tmp_path: Path) -> None:
    open_space(network(), archive, SHAPE, tmp_path)
    made = str(tmp_path / STATISTICS)
    with pytest.raises(DpctlError, match="not of this feature network"):
        open_space(network(last="Sigmoid", name="other.onnx"), made, SHAPE, tmp_path)
    with pytest.raises(DpctlError, match="images of another size"):
        open_space(network(), made, (3, 16, 16), tmp_path)
    with np.load(made) as held:
        values = dict(held)
    np.savez(tmp_path / "nan.npz", **(values | {"mean": values["mean"] * np.nan}))
    with pytest.raises(DpctlError, match="not finite"):
        open_space(network(), str(tmp_path / "nan.npz"), SHAPE, tmp_path)


@pytest.mark.slow
def test_a_benchmark_uses_the_network_of_its_recipe(network: Network, tiny: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "grey.npz", images=pictures(7, 60, channels=1))
    recipe = BenchRecipe(
        baseline=str(tiny),
        backends=("eager",),
        batch_sizes=(1,),
        num_inference_steps=(1,),
        rounds=1,
        samples=8,
        threads=1,
        features=str(network()),
        real_images=str(tmp_path / "grey.npz"),
    )
    result = bench.run_bench(recipe, tmp_path / "out")
    assert read_result(tmp_path / "out" / "bench.json") == result
    assert result.features is not None
    assert "net.onnx (6 features" in result.features["about"]
    space = open_space(network(), str(tmp_path / "out" / STATISTICS), (1, 8, 8), tmp_path)
    with np.load(tmp_path / "out" / result.quality[0].samples) as held:
        assert result.quality[0].figures["fid"] == fid.measure(Drawn(held["images"], None, space))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"features": "net.onnx"}, "features alone"),
        ({"real_images": "reference"}, "real_images alone"),
        ({"features": "net.onnx", "real_images": "reference", "samples": 0}, "nothing to judge"),
    ],
)
def test_half_of_the_options_is_refused(given: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match=said):
        bench.run_bench(BenchRecipe(baseline="/nowhere", **given), tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--features", "net.onnx"], "features alone"),
        (["--real-images", "reference"], "real_images alone"),
        (["--features", "net.onnx", "--real-images", "reference"], "net.onnx"),
        (["--clip", "/nowhere"], "/nowhere: no config.json"),
    ],
)
def test_the_options_arrive(options: list[str], said: str, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "dpctl",
        "bench",
        "reference",
        "reference",
        *options,
        "--out",
        str(tmp_path / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert f"got: {said}" in done.stderr
    assert list(tmp_path.iterdir()) == []
