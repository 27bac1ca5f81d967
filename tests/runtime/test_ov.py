"""OpenVINO: what it must refuse, in what precision it computes, and that it reports nothing to anybody."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpctl import artifact, environment
from dpctl.errors import DpctlError
from runtime.backends import ov

GRAPH = "unet/model.fp32.onnx"


def compiled(denoiser: ov.OvDenoiser, batch: int) -> Any:
    denoiser(torch.zeros(batch, 1, 8, 8), torch.zeros(batch))
    return denoiser._requests[batch,].get_compiled_model()


def test_float32_means_float32_and_the_threads_are_those_asked_for(exported_directory: Path) -> None:
    with ov.open_denoiser(exported_directory, threads=2) as denoiser:
        model = compiled(denoiser, 1)
        assert model.get_property("INFERENCE_PRECISION_HINT").to_string() == "f32"
        assert model.get_property("INFERENCE_NUM_THREADS") == 2
        # What runs, node by node: no node computes in less than its 32 bits.
        nodes = model.get_runtime_model().get_ops()
        ran = {node.get_rt_info()["runtimePrecision"].astype(str) for node in nodes}
    assert "f32" in ran
    assert not ran & {"bf16", "f16"}


def test_without_threads_it_takes_torchs(exported_directory: Path) -> None:
    with ov.open_denoiser(exported_directory) as denoiser:
        assert compiled(denoiser, 1).get_property("INFERENCE_NUM_THREADS") == torch.get_num_threads()


def test_a_shape_is_compiled_once(exported_directory: Path) -> None:
    with ov.open_denoiser(exported_directory) as denoiser:
        for batch in (1, 3, 1, 3):
            compiled(denoiser, batch)
        assert set(denoiser._requests) == {(1,), (3,)}


def test_inputs_and_output_are_the_callers_memory(exported_directory: Path) -> None:
    sample, timestep = torch.ones(2, 1, 8, 8), torch.tensor([3.0, 70.0])
    with ov.open_denoiser(exported_directory) as denoiser:
        output = denoiser(sample, timestep)
        request = denoiser._requests[2,]
        for name, tensor in {"sample": sample, "timestep": timestep, "out_sample": output}.items():
            assert request.get_tensor(name).data.ctypes.data == tensor.data_ptr()


def test_a_batch_beyond_the_exported_range_is_refused(exported_directory: Path) -> None:
    with ov.open_denoiser(exported_directory) as denoiser, pytest.raises(DpctlError, match="exported for 1 to 4"):
        denoiser(torch.zeros(5, 1, 8, 8), torch.zeros(5))


def test_whole_timesteps_of_another_type_are_converted(exported_directory: Path) -> None:
    sample, timestep = torch.ones(2, 1, 8, 8), torch.tensor([3, 70])
    with ov.open_denoiser(exported_directory) as denoiser:
        assert torch.equal(denoiser(sample.double(), timestep), denoiser(sample, timestep.float()))


@pytest.mark.parametrize("changed", [{"name": "SAMPLE"}, {"dtype": "int64"}, {"shape": ["batch", 1, 9, 8]}])
def test_a_graph_with_other_tensors_than_the_signature_is_refused(
    copied: Path, changed: dict[str, Any], rewrite_manifest: Callable[..., None]
) -> None:
    manifest = artifact.read_manifest(copied)
    assert manifest is not None
    assert manifest.signature is not None
    first, *others = manifest.signature["inputs"]
    rewrite_manifest(copied, signature=manifest.signature | {"inputs": [first | changed, *others]})
    with pytest.raises(DpctlError, match="not those of the signature|cannot be read"):
        ov.open_denoiser(copied)


def test_a_failed_export_is_refused_unless_it_is_asked_for(copied: Path, rewrite_manifest: Callable[..., None]) -> None:
    rewrite_manifest(copied, parity={"verdict": "failed"})
    with pytest.raises(DpctlError, match="did not pass its parity check"):
        ov.open_denoiser(copied)
    with ov.open_denoiser(copied, failed=True) as denoiser:
        assert denoiser(torch.zeros(1, 1, 8, 8), torch.zeros(1)).isfinite().all()


@pytest.mark.parametrize("where", ["beside", "above", "absolute", "link"])
def test_weights_outside_the_directory_are_never_read(
    copied: Path, where: str, move_a_weight: Callable[[Path, str], None], rewrite_manifest: Callable[..., None]
) -> None:
    move_a_weight(copied / GRAPH, where)
    rewrite_manifest(copied)
    if where == "beside":  # so that the others fail for the right reason
        with ov.open_denoiser(copied) as denoiser:
            assert denoiser(torch.zeros(1, 1, 8, 8), torch.zeros(1)).isfinite().all()
    else:
        with pytest.raises(DpctlError, match="outside the base directory"):
            ov.open_denoiser(copied)


def test_importing_it_loads_no_telemetry() -> None:
    code = (
        "import sys; from dpctl import environment; environment.import_openvino(); "
        "sys.exit(any(name.partition('.')[0] == 'openvino_telemetry' for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_telemetry_that_somebody_loaded_stays_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino_telemetry", sys)
    environment.import_openvino()
    assert sys.modules["openvino_telemetry"] is sys
