"""What TensorRT's profiler tells, through stand-ins of its real classes: by module, run by run, without CUDA graphs."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpctl import artifact
from dpctl.errors import DpctlError
from runtime import engine as engines
from runtime.backends import trt
from runtime.backends._trt_profile import named, read_layers
from runtime.layers import LayerTime

# As TensorRT's inspector writes them (DETAILED), and as the parsed network of an engine built without a GPU.
BUILT = {
    "of": "the engine as built",
    "Layers": [
        {
            "Name": "__myl_Fc_myl0_12",
            "LayerType": "kgen",
            "Metadata": "[ONNX Layer: mid_block.resnets.0.conv1/Conv]\x1e[ONNX Layer: mid_block.resnets.0/Add]",
        },
        {"Name": "Reformatting CopyNode", "LayerType": "Reformat", "Metadata": ""},
    ],
}
PARSED = {"of": "the parsed network", "layers": [{"name": "conv_in/Conv", "type": "CONVOLUTION"}]}
TOLD = [("__myl_Fc_myl0_12", 2.0), ("Reformatting CopyNode", 0.5), ("conv_in/Conv + conv_in/Add", 1.0)]
NAMED = (
    LayerTime("mid_block.resnets.0.conv1 + mid_block.resnets.0", "kgen", 0.002),
    LayerTime("", "Reformat", 0.0005),
    LayerTime("conv_in", "kernel", 0.001),
)


@pytest.fixture
def with_layers(with_engine: Path) -> Path:
    """An engine with its file of layers."""
    (engine,) = with_engine.rglob("*.engine")
    engines.layers(engine).write_text(json.dumps(BUILT))
    manifest = artifact.read_manifest(with_engine)
    assert manifest is not None
    manifest = dataclasses.replace(manifest, files=artifact.hash_files(with_engine))
    (with_engine / artifact.MANIFEST).write_text(manifest.to_json())
    return with_engine


def test_the_profiler_sees_every_run(with_layers: Path, opened: SimpleNamespace, machine: Any) -> None:
    machine.layers = TOLD
    assert trt.profile(with_layers, batch_size=2, runs=3) == NAMED
    (context,) = machine.contexts
    executed = [name for name, *_ in context._calls if name == "execute_async_v3"]
    assert len(executed) == 3 + 1  # one of them warms up, and none is recorded


def test_a_profiler_that_tells_nothing_is_an_error(with_layers: Path, opened: SimpleNamespace, machine: Any) -> None:
    with pytest.raises(DpctlError, match="told of no layer"):
        trt.profile(with_layers, runs=1)


def test_a_batch_beyond_the_profile_is_refused(with_layers: Path, opened: SimpleNamespace, machine: Any) -> None:
    with pytest.raises(DpctlError, match="exported for 1 to 4"):
        trt.profile(with_layers, batch_size=5)


def test_layers_are_named_as_far_as_the_file_tells(tmp_path: Path) -> None:
    path = tmp_path / "an.engine.layers.json"
    assert read_layers(path) == read_layers(None) == {}
    path.write_text(json.dumps({"Layers": ["names only"]}))
    assert read_layers(path) == {}
    path.write_text(json.dumps(PARSED))
    assert named([("conv_in/Conv", 1.0)], read_layers(path)) == [LayerTime("conv_in", "CONVOLUTION", 0.001)]
    path.write_text(json.dumps(BUILT))
    assert tuple(named(TOLD, read_layers(path))) == NAMED


@pytest.mark.gpu
@pytest.mark.trt
def test_a_real_engine_tells_of_its_layers(engine_directory: Path) -> None:
    found = trt.profile(engine_directory, batch_size=2, runs=3)
    assert all(layer.latency_s >= 0 for layer in found)
    assert any(layer.latency_s > 0 for layer in found)
    assert any("conv" in layer.name for layer in found)
