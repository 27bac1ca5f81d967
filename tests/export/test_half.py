"""Torch's own run at a lower precision, and what a lowered graph makes of it: over every family of UNets."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch
from diffusers import DDIMScheduler

from dpctl.signature import OUTPUT, of_unet
from export import golden
from export.graph import write_graph
from export.half import DTYPES, HalfNetwork, evidence, headroom, own_error, relative_l2
from export.precision import emulated, lower
from export.verify import TIMES_TORCH
from runtime.backends.ort import run_graph
from runtime.network import Network

LOW = ("fp16", "bf16")


def golden_rows(unet: Any) -> dict[str, torch.Tensor]:
    """Return the golden inputs of a UNet with torch's float32 outputs; NCSN++ is NaN at timestep 0 in torch itself."""
    timesteps = golden.timestep_grid(DDIMScheduler())
    if unet.config.time_embedding_type == "fourier":
        timesteps = timesteps.clamp_min(0.01)
    given = golden.inputs(signature_of(unet), timesteps, unet.config.get("num_class_embeds"))
    return golden.with_outputs(Network(unet), given)


def signature_of(unet: Any) -> Any:
    return of_unet({**unet.config, "_class_name": type(unet).__name__}, (1, 2, 64))


@pytest.fixture(scope="module")
def rows(plain: Any) -> dict[str, torch.Tensor]:
    return golden_rows(plain.unet)


@pytest.mark.parametrize("precision", LOW)
def test_the_error_of_a_type_is_of_its_size_and_the_model_stays_as_it_was(
    precision: str, plain: Any, rows: dict[str, torch.Tensor]
) -> None:
    before = copy.deepcopy(plain.unet.state_dict())
    found = evidence(plain.unet, rows, precision)
    epsilon = torch.finfo(DTYPES[precision]).eps
    assert len(found["relative_l2"]) == len(rows["timestep"])
    assert all(0.05 * epsilon < error < 10 * epsilon for error in found["relative_l2"])
    assert found["first_non_finite"] is None
    assert ("headroom" in found) == (precision == "fp16")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(torch.equal(value, before[name]) for name, value in plain.unet.state_dict().items())
    assert not any(module._forward_hooks for module in plain.unet.modules())


def test_the_error_is_against_the_rows_given(plain: Any, rows: dict[str, torch.Tensor]) -> None:
    network = HalfNetwork(plain.unet, "fp16")
    with torch.inference_mode():
        outputs = [network(**{n: v[i : i + 1] for n, v in rows.items() if n != OUTPUT}) for i in range(2)]
    own = {name: value[:2] for name, value in rows.items()} | {OUTPUT: torch.cat(outputs)}
    assert own_error(network, own)["relative_l2"] == [0.0, 0.0]
    assert outputs[0].dtype == torch.float32


def test_the_headroom_is_that_of_the_largest_value_of_any_module(plain: Any, rows: dict[str, torch.Tensor]) -> None:
    found = headroom(plain.unet, rows)
    largest = []
    for module in plain.unet.modules():
        module.register_forward_hook(lambda _, __, output: largest.append(_tensor(output).abs().max().item()))
    try:
        with torch.inference_mode():
            for i in range(len(rows["timestep"])):
                Network(plain.unet)(**{n: v[i : i + 1] for n, v in rows.items() if n != OUTPUT})
    finally:
        for module in plain.unet.modules():
            module._forward_hooks.clear()
    assert found["largest"] == max(largest)
    assert found["headroom"] == pytest.approx(65504 / max(largest))
    assert found["module"] in dict(plain.unet.named_modules())
    assert found["timestep"] in rows["timestep"].tolist()


def _tensor(output: Any) -> torch.Tensor:
    return output if isinstance(output, torch.Tensor) else output[0]


def test_an_overflow_is_named_with_its_module_and_timestep(plain: Any) -> None:
    unet = copy.deepcopy(plain.unet)
    block = unet.down_blocks[0].resnets[0]
    with torch.no_grad():
        block.conv1.weight.mul_(2e5)  # finite in float32, where the next norm takes it out again
        block.conv1.bias.mul_(2e5)
    given = golden_rows(unet)
    found = evidence(unet, given, "fp16")
    assert found["first_non_finite"]["module"] == "down_blocks.0.resnets.0.conv1"
    assert found["first_non_finite"]["timestep"] == given["timestep"][0]
    assert None in found["relative_l2"]
    assert found["headroom"]["headroom"] < 1
    assert found["headroom"]["module"].startswith("down_blocks.0.resnets.0")
    wide = evidence(unet, given, "bf16")
    assert wide["first_non_finite"] is None
    assert None not in wide["relative_l2"]


# ---------------------------------------------------------------------------------------------------------- families

# One that takes texts always; an export takes about ten seconds.
ALWAYS = ("stable-diffusion",)
NAMES = (
    "ddpm", "ldm", "class-conditional", "ncsnpp", "resnet-resampling", "scale-shift",
    "stable-diffusion", "sdxl", "inpainting", "latent-consistency",
)  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[pytest.param(name, marks=() if name in ALWAYS else pytest.mark.slow) for name in NAMES],
)
def family(
    request: pytest.FixtureRequest, families: dict[str, Callable[[], Any]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Any, dict[str, torch.Tensor], Path]:
    """Return the UNet of a family, its golden rows and its graph in float32."""
    unet = families[request.param]()
    path = tmp_path_factory.mktemp("family") / "fp32.onnx"
    write_graph(Network(unet).eval(), signature_of(unet), path, {})
    return unet, golden_rows(unet), path


def errors(graph: Path, rows: dict[str, torch.Tensor]) -> list[float]:
    inputs = {name: value.numpy() for name, value in rows.items() if name != OUTPUT}
    (output,) = run_graph(graph, inputs, [OUTPUT])
    return [relative_l2(found, wanted) for found, wanted in zip(torch.from_numpy(output), rows[OUTPUT], strict=True)]


@pytest.mark.parametrize("precision", LOW)
def test_a_lowered_family_errs_no_more_than_torch_itself(precision: str, family: Any, tmp_path: Path) -> None:
    unet, rows, path = family
    lowered = lower(ir.load(path), precision)
    assert lowered.report["not_lowered"] == {}
    assert "unknown operator" not in lowered.report["fp32"]
    found = evidence(unet, rows, precision)
    assert found["first_non_finite"] is None
    allowed = [TIMES_TORCH * error for error in found["relative_l2"]]
    if precision == "fp16":
        ir.save(lowered.model, tmp_path / "low.onnx")
        assert all(error <= most for error, most in zip(errors(tmp_path / "low.onnx", rows), allowed, strict=True))
    ir.save(emulated(lowered.model), tmp_path / "emulated.onnx")
    rounded = errors(tmp_path / "emulated.onnx", rows)
    assert all(error <= most for error, most in zip(rounded, allowed, strict=True)), (rounded, allowed)
    assert min(rounded) > 0.1 * min(allowed)  # it is rounded
