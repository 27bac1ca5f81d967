import dataclasses
import errno
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, LCMScheduler, TCDScheduler
from safetensors.torch import save_file
from torch import Tensor

from dpctl import artifact
from dpctl.errors import DpctlError, GateError
from dpctl.signature import of_unet
from export import golden as golden_file
from export import verify, verify_directory
from export.golden import Golden
from runtime.backends.eager import EagerDenoiser
from runtime.backends.ort import OrtDenoiser
from runtime.network import Network

GRAPH = "unet/model.fp32.onnx"


@pytest.fixture
def copied(plain_exported: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(plain_exported, tmp_path / "copied"))


@pytest.fixture(scope="module")
def golden(plain: Any, plain_exported: Path) -> Golden:
    return golden_file.load(plain_exported, of_unet({"_class_name": "UNet2DModel", **plain.unet.config}))


def rewrite_manifest(directory: Path, **changed: Any) -> None:
    """Make the manifest fit the files as they are, as whoever changed them on purpose would."""
    manifest = artifact.read_manifest(directory)
    assert manifest is not None
    manifest = dataclasses.replace(manifest, **{"files": artifact.hash_files(directory)} | changed)
    (directory / artifact.MANIFEST).write_text(manifest.to_json())


def parity_of(plain: Any, golden: Golden, change: Any, batch: tuple[int, int, int] = (1, 2, 4)) -> Any:
    """Return the parity of torch's own network after `change` has had its way with inputs and output."""
    right = EagerDenoiser(plain.unet)

    class Changed:
        config, device, dtype = right.config, right.device, right.dtype

        def __call__(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return change(right, sample, timestep)

    config = {"_class_name": "UNet2DModel", **plain.unet.config}
    denoiser: Any = Changed()
    return verify.measure(denoiser, golden, of_unet(config, batch), plain.scheduler.config)


def test_the_grid_is_the_schedulers_own_timesteps_dense_at_the_start_and_one_fraction() -> None:
    grid = golden_file.timestep_grid(DDPMScheduler())
    whole = grid[grid == grid.round()]
    assert (whole[0], whole[-1], len(whole)) == (0, 999, 8)
    assert (whole.diff().diff() > 0).all()
    assert grid[grid != grid.round()].tolist() == [499.5]
    assert torch.equal(grid, grid.sort().values)


def test_the_grid_of_a_short_or_fractional_schedule_is_sound() -> None:
    assert golden_file.timestep_grid(DDPMScheduler(num_train_timesteps=3)).tolist() == [0, 0.5, 1, 2]
    grid = golden_file.timestep_grid(EulerDiscreteScheduler(timestep_spacing="linspace"))
    assert len(grid) == 9
    assert (grid.min(), grid.max()) == (0, 999)


@pytest.mark.parametrize("kind", [LCMScheduler, TCDScheduler])
def test_the_grid_of_a_scheduler_of_few_steps_is_that_of_its_training(kind: Any) -> None:
    assert torch.equal(golden_file.timestep_grid(kind()), golden_file.timestep_grid(DDPMScheduler()))


def test_a_short_run_says_how_short_it_is(plain: Any, golden: Golden) -> None:
    signature = of_unet({"_class_name": "UNet2DModel", **plain.unet.config})
    scheduler = {**plain.scheduler.config, "num_train_timesteps": 3}
    parity = verify.measure(EagerDenoiser(plain.unet), golden, signature, scheduler)
    assert parity["checks"]["sampling"]["steps"] == 3


def test_what_was_measured_in_tf32_is_called_so(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    always = property(lambda _: "tf32", lambda *_: None)
    monkeypatch.setattr(OrtDenoiser, "precision", always)
    parity = verify_directory(copied)
    assert (parity["verdict"], parity["precision"]) == ("passed", "tf32")
    assert {row["allowed"] for row in parity["timesteps"]} == {1.5 * verify.TF32_ERROR}


def test_an_error_that_is_no_number_does_not_pass() -> None:
    rows = [{"error": error, "allowed": 1e-4, "finite": True} for error in (1e-6, math.nan, 1e-5)]
    assert verify.check_rows(rows)["verdict"] == verify.FAILED


def test_golden_inputs_are_the_same_every_time_and_of_unit_scale() -> None:
    signature = of_unet({"_class_name": "UNet2DModel", "sample_size": [8, 12], "in_channels": 3, "out_channels": 3})
    timesteps = torch.tensor([0.0, 10.0, 999.0])
    first, again = (golden_file.inputs(signature, timesteps, 2) for _ in range(2))
    assert first["sample"].shape == (3, 3, 8, 12)
    assert first["class_labels"].tolist() == [0, 1, 0]
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert 0.2 < first["sample"].std() < 1.5


def test_a_network_that_gives_nan_itself_is_named_by_its_timestep(plain: Any) -> None:
    def network(sample: Tensor, timestep: Tensor) -> Tensor:
        return sample / timestep[:, None, None, None]

    inputs = {"sample": torch.ones(2, 1, 8, 8), "timestep": torch.tensor([3.0, 0.0])}
    with pytest.raises(DpctlError, match="at timestep 0"):
        golden_file.with_outputs(network, inputs)


def test_a_largest_size_that_memory_does_not_hold_is_a_clean_error(plain: Any) -> None:
    signature = of_unet(plain.unet.config | {"_class_name": "UNet2DModel"}, (1, 2, 4), (8, 8, 16))

    def network(sample: Tensor, timestep: Tensor) -> Tensor:
        return sample if sample.shape[-1] == 8 else torch.empty(2**60)

    with pytest.raises(DpctlError, match="more memory than there is") as caught:
        golden_file.make(network, EagerDenoiser(plain.unet), plain.scheduler, signature)
    assert caught.value.got == "8x16 at batch 1"


def test_torch_agrees_with_itself(plain: Any, golden: Golden) -> None:
    parity = parity_of(plain, golden, lambda right, sample, timestep: right(sample, timestep))
    assert parity["verdict"] == "passed"
    assert parity["batch_sizes"] == [1, 4]
    assert parity["worst"]["max_over_std"] < 1e-5
    assert [row["timestep"] for row in parity["timesteps"]] == golden.grid["timestep"].tolist()


@pytest.mark.parametrize(
    ("batch", "sizes"), [((1, 1, 1), [1]), ((4, 4, 4), [4]), ((2, 4, 64), [2, 9]), ((16, 16, 16), [16])]
)
def test_the_batch_sizes_stay_within_the_exported_range(
    plain: Any, golden: Golden, batch: tuple[int, int, int], sizes: list[int]
) -> None:
    seen: set[int] = set()

    def watched(right: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        seen.add(len(sample))
        return right(sample, timestep)

    # Its sampling run was made for another range.
    parity = parity_of(plain, dataclasses.replace(golden, samples=None), watched, batch)
    assert parity["batch_sizes"] == sorted(seen) == sizes
    assert parity["verdict"] == "passed"


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(lambda right, x, t: right(x, t.floor()), id="timestep truncated"),
        pytest.param(lambda right, x, t: right(x, t[:1].expand(len(t))), id="one timestep for the whole batch"),
        pytest.param(lambda right, x, t: right(x, t).roll(1, 0), id="rows in another order"),
        pytest.param(lambda right, x, t: right(x, t) * 1.001, id="a little too large"),
        pytest.param(lambda right, x, t: right(x, t).half().float(), id="half precision"),
    ],
)
def test_a_mistake_of_the_graph_does_not_pass(plain: Any, golden: Golden, mistake: Any) -> None:
    parity = parity_of(plain, golden, mistake)
    assert parity["verdict"] == "failed"
    with pytest.raises(GateError):
        verify.gate(parity, Path("out"))


def test_nan_at_one_timestep_fails_and_is_named(plain: Any, golden: Golden) -> None:
    last = golden.grid["timestep"].max()

    def overflowing(right: Any, sample: Tensor, timestep: Tensor) -> Tensor:
        return right(sample, timestep).masked_fill((timestep == last)[:, None, None, None], math.nan)

    parity = parity_of(plain, golden, overflowing)
    assert [row["finite"] for row in parity["timesteps"]].count(False) == 1
    with pytest.raises(GateError, match=f"timestep {float(last):g}.*NaN or Inf"):
        verify.gate(parity, Path("out"))


def test_an_exported_directory_passes_again_without_the_weights(plain_exported: Path, copied: Path) -> None:
    assert not list(copied.rglob("diffusion_pytorch_model*"))
    parity = verify_directory(copied)
    manifest = artifact.read_manifest(plain_exported)
    assert manifest is not None
    recorded = manifest.parity or {}
    assert parity.keys() == recorded.keys()
    assert (parity["verdict"], parity["precision"], parity["opset"]) == ("passed", "fp32", recorded["opset"])
    assert {name: check["verdict"] for name, check in parity["checks"].items()} == {
        "grid": "passed",
        "guidance": "not run here",
        "other size": "not run here",
        "sampling": "passed",
        "device": "passed",
    }


def test_a_changed_graph_is_refused_before_it_runs(copied: Path) -> None:
    with (copied / GRAPH).open("r+b") as stream:
        stream.seek(-100, 2)
        stream.write(b"changed")
    with pytest.raises(DpctlError, match="differs from its digest") as caught:
        verify_directory(copied)
    assert caught.value.exit_code == 1


def test_a_graph_changed_together_with_its_manifest_does_not_pass_the_gate(copied: Path) -> None:
    import onnx
    from onnx import numpy_helper

    model = onnx.load(copied / GRAPH)
    weight = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("conv_out.weight"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.01, weight.name))
    (copied / GRAPH).write_bytes(model.SerializeToString())
    rewrite_manifest(copied)
    with pytest.raises(GateError, match=r"grid failed \(error .*, tolerance 1\.0e-04\)") as caught:
        verify_directory(copied)
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("consistent", [False, True])
def test_truncated_golden_outputs_are_a_clean_error(copied: Path, consistent: bool) -> None:
    path = copied / golden_file.GOLDEN
    path.write_bytes(path.read_bytes()[:-100])
    if consistent:
        rewrite_manifest(copied)
    with pytest.raises(DpctlError, match="cannot be read" if consistent else "differs from its digest") as caught:
        verify_directory(copied)
    assert caught.value.exit_code == 1


def test_golden_outputs_of_another_model_are_refused(copied: Path, golden: Golden) -> None:
    save_file({name: value for name, value in golden.grid.items() if name != "sample"}, copied / golden_file.GOLDEN)
    rewrite_manifest(copied)
    with pytest.raises(DpctlError, match="not those of the signature"):
        verify_directory(copied)


@pytest.mark.parametrize("cut", [(slice(1),), (slice(None), slice(None), slice(4))])
def test_samples_of_another_shape_are_refused(copied: Path, golden: Golden, cut: Any) -> None:
    assert golden.samples is not None
    golden_file.store(copied, dataclasses.replace(golden, samples=golden.samples[cut]))
    rewrite_manifest(copied)
    with pytest.raises(DpctlError, match="not those of the signature"):
        verify_directory(copied)


def test_what_failed_at_export_and_cannot_be_measured_again_still_fails(copied: Path) -> None:
    manifest = artifact.read_manifest(copied)
    assert manifest is not None
    assert manifest.parity is not None
    overflow = {"verdict": verify.FAILED, "reason": "NaN or Inf in conv_in at timestep 0"}
    checks = {**manifest.parity["checks"], "torch at this precision": overflow}
    rewrite_manifest(copied, parity={**manifest.parity, "verdict": verify.FAILED, "checks": checks})
    with pytest.raises(GateError, match="torch at this precision failed"):
        verify_directory(copied)


def test_samples_that_are_not_finite_do_not_pass_where_torchs_own_are_not_either(plain: Any, golden: Golden) -> None:
    signature = of_unet({"_class_name": "UNet2DModel", **plain.unet.config})
    denoiser, scheduler = EagerDenoiser(plain.unet), plain.scheduler.config
    parity = verify.measure(denoiser, golden, signature, scheduler, {"samples_ssim": -1.0})
    assert parity["checks"]["sampling"]["verdict"] == parity["verdict"] == verify.FAILED


def test_a_full_folder_for_temporary_files_is_named(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite_manifest(copied, parity={"precision": "fp16"})
    manifest = artifact.read_manifest(copied)
    assert manifest is not None
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

    def full(graph: Path, out: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(verify, "write_emulated", full)
    with pytest.raises(DpctlError, match="TMPDIR") as caught, verify.checkable(copied, manifest):
        pytest.fail("the block ran")
    assert caught.value.got.startswith(f"{tmp_path}/")


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match="no such directory"):
        verify_directory(tmp_path / "missing")


@pytest.mark.parametrize("parity", [None, {}, {"verdict": "passed"}])
def test_a_manifest_without_parity_is_refused(copied: Path, parity: Any) -> None:
    rewrite_manifest(copied, parity=parity)
    with pytest.raises(DpctlError, match="no parity"):
        verify_directory(copied)


def test_a_model_that_was_not_exported_is_refused(plain: Any) -> None:
    with pytest.raises(DpctlError, match="dpctl export"):
        verify_directory(plain.directory)


def test_golden_rows_are_torchs_own(plain: Any, golden: Golden) -> None:
    inputs = {name: golden.grid[name] for name in ("sample", "timestep")}
    with torch.no_grad():
        expected = Network(plain.unet)(**inputs)
    torch.testing.assert_close(golden.grid["out_sample"], expected, rtol=1e-4, atol=1e-5)


def test_golden_outputs_without_a_digest_are_refused(copied: Path) -> None:
    manifest = artifact.read_manifest(copied)
    assert manifest is not None
    rewrite_manifest(copied, files={n: d for n, d in manifest.files.items() if n != golden_file.GOLDEN})
    with pytest.raises(DpctlError, match="has no digest"):
        verify_directory(copied)


def test_weights_beside_the_graph_without_a_digest_are_refused(copied: Path) -> None:
    (copied / f"{GRAPH}.data").write_bytes(b"somebody's")
    with pytest.raises(DpctlError, match="has no digest"):
        verify_directory(copied)


def test_tf32_is_held_to_errors_of_its_own(plain: Any, golden: Golden) -> None:
    signature = of_unet({"_class_name": "UNet2DModel", **plain.unet.config}, (1, 2, 4))

    def judged(factor: float, yardstick: Any) -> str:
        right = EagerDenoiser(plain.unet)

        class Rounded:
            config, device, dtype = right.config, right.device, right.dtype

            def __call__(self, sample: Tensor, timestep: Tensor) -> Tensor:
                return factor * right(sample, timestep)

        denoiser: Any = Rounded()
        return verify.measure(denoiser, golden, signature, plain.scheduler.config, yardstick)["checks"]["grid"][
            "verdict"
        ]

    own = verify.tf32_yardstick(golden)
    assert [judged(1.002, own), judged(1.004, own), judged(1.002, None)] == ["passed", "failed", "failed"]
