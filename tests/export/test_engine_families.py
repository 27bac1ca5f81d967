"""Engines of every family of UNets that users bring, by TensorRT-RTX: its parser reads what the exporter writes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpctl.recipe import EngineRecipe
from dpctl.signature import Signature, of_unet, rows_of
from export.graph import write_graph
from export.to_tensorrt import build
from runtime import engine as engines
from runtime.network import Network

pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed: pip install 'dpctl-diffusion[rtx]'")
FAMILIES = (
    "ddpm", "ldm", "class-conditional", "ncsnpp", "resnet-resampling", "scale-shift",
    "stable-diffusion", "sdxl", "inpainting", "latent-consistency",
)  # fmt: skip
RTX = EngineRecipe(flavor="rtx", compute_capability=("8.9", "12.0"))


def built(
    unet: Any, folder: Path, precision: str, sizes: tuple[int, int, int] | None = None
) -> tuple[Signature, Path, engines.EngineManifest]:
    """Write the graph of a network and build its engine."""
    config = {**unet.config, "_class_name": type(unet).__name__}
    signature = of_unet(config, rows_of(config, (1, 2, 4)), sizes)
    graph = folder / f"model.{precision}.onnx"
    write_graph(Network(unet).eval(), signature, graph, {}, precision)
    return signature, *build(graph, signature, RTX, precision)


def dtypes(engine: Path) -> dict[str, set[str]]:
    """Return the types of what the network's layers give, by the kind of layer."""
    found: dict[str, set[str]] = {}
    for layer in json.loads(engines.layers(engine).read_text())["layers"]:
        found.setdefault(layer["type"], set()).update(tensor["dtype"] for tensor in layer["outputs"])
    return found


def test_no_family_is_forgotten(families: dict[str, Any]) -> None:
    assert set(FAMILIES) == set(families)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_engine_of_every_family_is_built_in_every_precision(
    family: str, precision: str, families: dict[str, Callable[[], Any]], tmp_path: Path
) -> None:
    signature, engine, about = built(families[family](), tmp_path, precision)
    assert about.profile == {
        tensor.name: [list(shape) for shape in signature.bounds(tensor)] for tensor in signature.inputs
    }
    assert (about.targets, about.precision) == (["8.9", "12.0"], precision)
    wanted = {"fp32": "FLOAT", "fp16": "HALF", "bf16": "BF16"}[precision]
    assert wanted in dtypes(engine)["CONVOLUTION"]  # strongly typed: as the graph says


@pytest.mark.slow
@pytest.mark.parametrize("family", ["ddpm", "stable-diffusion"])
def test_an_engine_of_dynamic_size_is_built(
    family: str, families: dict[str, Callable[[], Any]], tmp_path: Path
) -> None:
    _, _, about = built(families[family](), tmp_path, "fp32", (8, 16, 32))
    assert [shape[2:] for shape in about.profile["sample"]] == [[8, 8], [16, 16], [32, 32]]


@pytest.mark.slow
def test_half_precision_is_what_the_graph_says(families: dict[str, Callable[[], Any]], tmp_path: Path) -> None:
    _, engine, about = built(families["ldm"](), tmp_path, "fp16")
    assert dtypes(engine)["CONVOLUTION"] == {"HALF"}
    assert dtypes(engine)["NORMALIZATION"] == {"FLOAT"}  # statistics stay float32
    assert about.precision == "fp16"
    assert engine.name == "model.fp16.rtx-sm89+sm120.engine"
