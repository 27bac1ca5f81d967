import copy
import json
import shutil
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch

from dpctl import artifact
from dpctl.errors import DpctlError, GateError
from dpctl.models import load_model, read_config
from dpctl.recipe import ExportRecipe
from dpctl.signature import Signature, of_unet
from export import export_model, graph, to_onnx, verify
from export import golden as golden_file
from runtime import open_denoiser, sample
from runtime.network import Network

GRAPH, BATCH = "unet/model.fp32.onnx", (1, 2, 4)


@pytest.fixture
def instant(plain_exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let an export of `plain` copy the graph that was made before."""

    def copied(network: Any, signature: Signature, path: Path, *more: Any) -> dict[str, Any]:
        shutil.copyfile(plain_exported / GRAPH, path)
        return {}

    monkeypatch.setattr(to_onnx, "write_graph", copied)


def files(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}


def test_the_directory_is_a_runnable_pipeline_and_nothing_else(plain: Any, plain_exported: Path) -> None:
    assert files(plain_exported) == {
        "dpctl.json",
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "unet/golden.safetensors",
        GRAPH,
    }
    assert read_config(plain_exported) == read_config(plain.directory)
    with open_denoiser(plain_exported, "ort") as denoiser:
        assert sample(denoiser, plain.scheduler, seed=0, indices=[0], num_inference_steps=2).shape == (1, 1, 8, 8)


def test_the_manifest_names_the_parent_the_signature_and_the_parity(plain: Any, plain_exported: Path) -> None:
    manifest = artifact.read_manifest(plain_exported)
    assert manifest is not None
    assert (manifest.kind, manifest.parent) == ("exported", plain.digest)
    assert manifest.lineage[-1]["digest"] == plain.digest
    assert Signature.from_json(manifest.signature) == of_unet(read_config(plain.directory), (1, 2, 4))
    assert manifest.recipe == {"precision": "fp32", "batch": [1, 2, 4], "components": False}
    assert manifest.stats["params"] == sum(parameter.numel() for parameter in plain.unet.parameters())
    assert manifest.stats["bytes"] == (plain_exported / GRAPH).stat().st_size
    parity = manifest.parity or {}
    assert (parity["verdict"], parity["opset"], parity["batch_sizes"]) == ("passed", graph.OPSET, [1, 4])
    artifact.verify_files(plain_exported, manifest)


def test_the_graph_declares_the_signature_and_says_what_it_came_from(plain: Any, plain_exported: Path) -> None:
    model = onnx.load(plain_exported / GRAPH)
    told = {entry.key: entry.value for entry in model.metadata_props}
    signature = Signature.from_json(json.loads(told["signature"]))
    assert told["parent_digest"] == plain.digest
    assert told["dpctl_version"]
    assert [value.name for value in model.graph.input] == [tensor.name for tensor in signature.inputs]
    assert [value.name for value in model.graph.output] == ["out_sample"]
    assert [entry.version for entry in model.opset_import if entry.domain == ""] == [graph.OPSET]
    for value in (*model.graph.input, *model.graph.output):
        axes = [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        assert axes[0] == "batch"
        assert all(isinstance(axis, int) for axis in axes[1:])


def test_the_graph_tells_nothing_of_this_machine(plain_exported: Path) -> None:
    data = (plain_exported / GRAPH).read_bytes()
    assert b"stack_trace" not in data
    assert b"site-packages" not in data
    assert str(Path(__file__).parent.parent.parent).encode() not in data


def test_the_same_model_gives_the_same_graph_without_a_word(
    plain: Any, plain_exported: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: Any
) -> None:
    signature = of_unet(read_config(plain.directory), (1, 2, 4))
    graph.write_graph(Network(plain.unet).eval(), signature, tmp_path / "again", {"parent_digest": plain.digest})
    assert (tmp_path / "again").read_bytes() == (plain_exported / GRAPH).read_bytes()
    assert capfd.readouterr() == ("", "")
    assert not recwarn.list


def test_exporting_leaves_the_model_as_it_was(plain: Any, plain_exported: Path) -> None:
    fresh = load_model(plain.directory).unet.state_dict()
    assert all(torch.equal(value, fresh[name]) for name, value in plain.unet.state_dict().items())


def test_a_pruned_class_conditional_model_exports_alike(pruned: Any, pruned_exported: Path) -> None:
    manifest = artifact.read_manifest(pruned_exported)
    assert manifest is not None
    assert (manifest.parity or {})["verdict"] == "passed"
    assert not (pruned_exported / "unet" / "pruned_unet.py").exists()
    inputs = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 7.0, 99.0]), torch.tensor([2, 0, 1])
    with torch.no_grad():
        expected = pruned.unet(*inputs).sample
    with open_denoiser(pruned_exported, "ort") as denoiser:
        found = denoiser(inputs[0], inputs[1], class_labels=inputs[2])
        drawn = sample(denoiser, pruned.scheduler, seed=0, indices=range(4), num_inference_steps=2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert drawn.shape == (4, 1, 8, 8)


@pytest.mark.usefixtures("instant")
def test_a_bare_unet_becomes_a_pipeline(plain: Any, tmp_path: Path) -> None:
    shutil.copytree(plain.directory / "unet", tmp_path / "bare")
    config = json.loads((tmp_path / "bare" / "config.json").read_text())
    del config["num_class_embeds"], config["time_embedding_type"]  # a hand-written config leaves defaults out
    (tmp_path / "bare" / "config.json").write_text(json.dumps(config))
    export_model(load_model(tmp_path / "bare"), tmp_path / "out", ExportRecipe(batch=(1, 2, 4)))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index["scheduler"] == ["diffusers", "DDPMScheduler"]
    assert (tmp_path / "out" / "scheduler" / "scheduler_config.json").is_file()
    with open_denoiser(tmp_path / "out", "ort") as denoiser:
        assert denoiser.config.time_embedding_type == "positional"
        assert sample(denoiser, plain.scheduler, seed=0, indices=[0], num_inference_steps=1).shape == (1, 1, 8, 8)


@pytest.mark.usefixtures("instant")
def test_an_existing_output_is_replaced_by_force_only(plain: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "bench.json").write_text("an earlier output of ours")
    with pytest.raises(DpctlError, match="--force"):
        export_model(plain, out, ExportRecipe(batch=BATCH))
    assert files(out) == {"bench.json"}
    export_model(plain, out, ExportRecipe(batch=BATCH), force=True)
    assert "bench.json" not in files(out)


@pytest.fixture
def wrong(instant: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's own outputs differ from the graph's at the fourth timestep."""
    right = golden_file.make

    def make(*args: Any) -> golden_file.Golden:
        golden = right(*args)
        golden.grid["out_sample"][3] *= 1.001
        return golden

    monkeypatch.setattr(golden_file, "make", make)


@pytest.mark.usefixtures("wrong")
def test_a_breach_of_tolerance_leaves_no_directory(plain: Any, tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"grid failed .*; worst at timestep .*; worst tensor \S+") as caught:
        export_model(plain, tmp_path / "out", ExportRecipe(batch=BATCH))
    assert caught.value.exit_code == 3
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("wrong")
def test_what_failed_is_kept_on_request_and_says_so(plain: Any, tmp_path: Path) -> None:
    with pytest.raises(GateError):
        export_model(plain, tmp_path / "out", ExportRecipe(batch=BATCH), keep_failed=True)
    manifest = artifact.read_manifest(tmp_path / "out")
    assert manifest is not None
    assert (manifest.parity or {})["verdict"] == "failed"
    with pytest.raises(DpctlError, match="did not pass"):
        open_denoiser(tmp_path / "out", "ort")
    with pytest.raises(GateError, match="grid failed"):
        verify.verify_directory(tmp_path / "out")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"precision": "fp8"}, "choose one of: fp32, fp16, bf16"),
        ({"batch": (4, 2, 1)}, "MIN,OPT,MAX"),
        ({"batch": (0, 1, 1)}, "MIN,OPT,MAX"),
    ],
)
def test_what_cannot_be_exported_is_refused_at_once(
    plain: Any, tmp_path: Path, kwargs: dict[str, Any], words: str
) -> None:
    with pytest.raises(DpctlError, match=words):
        export_model(plain, tmp_path / "out", ExportRecipe(**kwargs))
    assert list(tmp_path.iterdir()) == []


def test_weights_beyond_a_protobufs_size_lie_beside_the_graph(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "LARGEST_GRAPH", 1000)
    manifest = export_model(plain, tmp_path / "out", ExportRecipe(batch=BATCH))
    assert f"{GRAPH}.data" in manifest.files
    assert (manifest.parity or {})["verdict"] == "passed"
    shutil.move(tmp_path / "out", tmp_path / "moved")
    assert verify.verify_directory(tmp_path / "moved")["verdict"] == "passed"
    with (tmp_path / "moved" / f"{GRAPH}.data").open("r+b") as stream:
        stream.write(b"changed")
    with pytest.raises(DpctlError, match="differs from its digest"):
        open_denoiser(tmp_path / "moved", "ort")


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_lower_precision_is_held_to_torchs_own_error(plain: Any, tmp_path: Path, precision: str) -> None:
    out = tmp_path / "out"
    manifest = export_model(plain, out, ExportRecipe(precision=precision, batch=BATCH))
    parity = manifest.parity or {}
    checks = {name: check["verdict"] for name, check in parity["checks"].items()}
    assert checks == {
        "grid": "passed",
        "guidance": "not run here",
        "other size": "not run here",
        "sampling": "passed",
        "torch at this precision": "passed",
        "device": "not run here",
    }
    owns = parity["yardstick"]["relative_l2"]
    for row, own in zip(parity["timesteps"], owns, strict=True):
        assert row["allowed"] == 1.5 * max(own, sum(owns) / len(owns))
        assert 1e-5 < row["error"] == row["relative_l2"] <= row["allowed"]
    assert manifest.stats["precision"]["precision"] == precision
    assert manifest.stats["precision"]["not_lowered"] == {}
    told = {entry.key: entry.value for entry in onnx.load(out / f"unet/model.{precision}.onnx").metadata_props}
    assert told["precision"] == precision
    again = verify.verify_directory(out)
    assert again["worst"]["error"] == pytest.approx(parity["worst"]["error"])
    assert again["checks"]["torch at this precision"] == parity["checks"]["torch at this precision"]


def test_what_overflows_in_float16_is_not_published_as_float16(plain: Any, tmp_path: Path) -> None:
    loud = copy.deepcopy(plain)
    with torch.no_grad():  # 1e5 on the way, and small again: float32 and bfloat16 do not mind
        loud.unet.mid_block.resnets[0].conv1.weight.mul_(3e5)
    with pytest.raises(GateError, match=r"NaN or Inf in mid_block\.resnets\.0\.conv1 at timestep"):
        export_model(loud, tmp_path / "out", ExportRecipe(precision="fp16", batch=BATCH))
    assert not (tmp_path / "out").exists()
    assert (export_model(loud, tmp_path / "bf16", ExportRecipe(precision="bf16", batch=BATCH)).parity or {})[
        "verdict"
    ] == "passed"


@pytest.mark.parametrize("size", [(3, 8, 16), (8, 6, 16), (0, 8, 16)])
def test_impossible_sizes_are_refused(plain: Any, tmp_path: Path, size: tuple[int, int, int]) -> None:
    with pytest.raises(DpctlError, match="MIN,OPT,MAX"):
        export_model(load_model("reference"), tmp_path / "out", ExportRecipe(size=size))


@pytest.mark.usefixtures("instant")
def test_every_file_is_as_readable_as_the_next(plain: Any, tmp_path: Path) -> None:
    (tmp_path / "probe").write_text("")
    export_model(plain, tmp_path / "out", ExportRecipe(batch=BATCH))
    golden = tmp_path / "out" / golden_file.GOLDEN
    assert golden.stat().st_mode == (tmp_path / "probe").stat().st_mode
