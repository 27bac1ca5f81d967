"""ONNX Runtime: what it must refuse, and how its sessions are set up."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from dpctl import artifact
from dpctl.errors import DpctlError
from runtime.backends import ort

GRAPH = "unet/model.fp32.onnx"


def test_a_batch_beyond_the_exported_range_is_refused(exported_directory: Path) -> None:
    with ort.open_denoiser(exported_directory) as denoiser, pytest.raises(DpctlError, match="exported for 1 to 4"):
        denoiser(torch.zeros(5, 1, 8, 8), torch.zeros(5))


def test_inputs_outside_the_signature_are_refused(exported_directory: Path) -> None:
    with ort.open_denoiser(exported_directory) as denoiser:
        with pytest.raises(DpctlError, match=r"give \[2, 1, 8, 8\]"):
            denoiser(torch.zeros(2, 1, 9, 8), torch.zeros(2))
        with pytest.raises(DpctlError, match="give exactly: sample, timestep"):
            denoiser(torch.zeros(2, 1, 8, 8), torch.zeros(2), class_labels=torch.zeros(2))


def test_whole_timesteps_of_another_type_are_converted(exported_directory: Path) -> None:
    sample, timestep = torch.ones(2, 1, 8, 8), torch.tensor([3, 70])
    with ort.open_denoiser(exported_directory) as denoiser:
        assert torch.equal(denoiser(sample.double(), timestep), denoiser(sample, timestep.float()))


def test_the_session_does_not_spin_and_has_the_threads_asked_for(exported_directory: Path) -> None:
    with ort.open_denoiser(exported_directory, threads=2) as denoiser:
        options = denoiser._session.get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        assert options.intra_op_num_threads == 2
    with ort.open_denoiser(exported_directory) as denoiser:
        assert denoiser._session.get_session_options().intra_op_num_threads == torch.get_num_threads()


def test_a_graph_with_other_tensors_than_the_signature_is_refused(
    copied: Path, rewrite_manifest: Callable[..., None]
) -> None:
    manifest = artifact.read_manifest(copied)
    assert manifest is not None
    assert manifest.signature is not None
    inputs = [*manifest.signature["inputs"], {"name": "class_labels", "dtype": "int64", "shape": ["batch"]}]
    rewrite_manifest(copied, signature=manifest.signature | {"inputs": inputs})
    with pytest.raises(DpctlError, match="not those of the signature"):
        ort.open_denoiser(copied)


def test_a_directory_without_its_graph_is_refused(copied: Path, rewrite_manifest: Callable[..., None]) -> None:
    (copied / GRAPH).unlink()
    rewrite_manifest(copied)
    with pytest.raises(DpctlError, match="one ONNX graph"):
        ort.open_denoiser(copied)


@pytest.mark.parametrize("where", ["beside", "above", "absolute", "link"])
def test_weights_outside_the_directory_are_never_read(
    copied: Path, where: str, move_a_weight: Callable[[Path, str], None], rewrite_manifest: Callable[..., None]
) -> None:
    move_a_weight(copied / GRAPH, where)
    rewrite_manifest(copied)

    if where == "beside":  # so that the others fail for the right reason
        with ort.open_denoiser(copied) as denoiser:
            assert denoiser(torch.zeros(1, 1, 8, 8), torch.zeros(1)).isfinite().all()
    else:
        with pytest.raises(DpctlError, match="cannot load the graph"):
            ort.open_denoiser(copied)


def test_a_missing_provider_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    library = ModuleType("onnxruntime")
    library.get_available_providers = lambda: ["CPUExecutionProvider"]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime", library)
    with pytest.raises(DpctlError, match=r"dpctl-diffusion\[gpu\]"):
        ort.require("cuda")


class PlacedSession:
    """What a session says of its providers and of the nodes they were given."""

    def __init__(self, providers: list[str], placed: dict[str, list[str]]) -> None:
        self._providers, self._placed = providers, placed

    def get_providers(self) -> list[str]:
        return self._providers

    def get_provider_graph_assignment_info(self) -> list[Any]:
        def part(provider: str, kinds: list[str]) -> Any:
            nodes = [SimpleNamespace(name=f"node_{kind}", op_type=kind) for kind in kinds]
            return SimpleNamespace(ep_name=provider, get_nodes=lambda: nodes)

        return [part(provider, kinds) for provider, kinds in self._placed.items()]


CUDA, CPU = ort.PROVIDERS["cuda"], ort.PROVIDERS["cpu"]


def test_a_silent_fallback_to_the_processor_is_refused() -> None:
    with pytest.raises(DpctlError, match="could not be used"):
        ort._check_placement(PlacedSession([CPU], {CPU: ["Conv"]}), CUDA)


def test_a_convolution_left_on_the_processor_is_refused() -> None:
    with pytest.raises(DpctlError, match="node_Conv was given to CPUExecutionProvider"):
        ort._check_placement(PlacedSession([CUDA, CPU], {CUDA: ["MatMul"], CPU: ["Shape", "Conv"]}), CUDA)


def test_shapes_may_be_computed_on_the_processor() -> None:
    ort._check_placement(PlacedSession([CUDA, CPU], {CUDA: ["Conv", "MatMul"], CPU: ["Shape", "Gather"]}), CUDA)
