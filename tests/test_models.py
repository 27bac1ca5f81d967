"""Loading and writing models: bit-equal where they are whole, a DpctlError in three parts where they are not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpctl import artifact, models
from dpctl.errors import DpctlError
from dpctl.models import load_model, load_scheduler, read_config, resolve, save_model, unet_directory, write_pipeline

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def toy(toy_pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the toy pipeline to damage."""
    return shutil.copytree(toy_pipeline, tmp_path / "toy")


def change(path: Path, **values: Any) -> None:
    """Change entries of a JSON file; None removes one."""
    content = json.loads(path.read_text()) | values
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def with_manifest(directory: Path, **values: Any) -> Path:
    artifact.write_manifest(directory, **({"kind": "trained", "recipe": {}, "stats": {}} | values))
    return directory


def same_weights(one: Any, other: Any) -> bool:
    theirs = other.state_dict()
    return all(torch.equal(value, theirs[name]) for name, value in one.state_dict().items())


# --- loading -----------------------------------------------------------------------------------------------------


def test_an_empty_name_is_not_the_folder_one_is_in(toy_pipeline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(toy_pipeline)
    assert load_model(".").source == str(toy_pipeline)
    with pytest.raises(DpctlError, match="no such model\n.*an empty name"):
        load_model("")


def test_a_pipeline_is_loaded_as_stock_loads_it(toy_pipeline: Path) -> None:
    model, stock = load_model(toy_pipeline), diffusers.DDPMPipeline.from_pretrained(toy_pipeline)
    assert same_weights(model.unet, stock.unet)
    assert dict(model.unet.config) | {"_name_or_path": None} == dict(stock.unet.config) | {"_name_or_path": None}
    assert type(model.scheduler) is type(stock.scheduler)
    assert dict(model.scheduler.config) == dict(stock.scheduler.config)
    assert not model.unet.training
    assert model.manifest is None
    assert model.digest == artifact.digest(artifact.hash_files(toy_pipeline))
    assert model.source == str(toy_pipeline.resolve())


def test_where_a_model_was_loaded_from_is_not_saved_with_it(toy_pipeline: Path, tmp_path: Path) -> None:
    for name in ("here", "there"):
        shutil.copytree(toy_pipeline, tmp_path / name)
        load_model(tmp_path / name).unet.save_pretrained(tmp_path / f"{name}-saved")
    here, there = ((tmp_path / f"{name}-saved" / "config.json").read_bytes() for name in ("here", "there"))
    assert here == there


def test_a_bare_unet_directory_is_a_model_with_the_default_scheduler(toy_pipeline: Path) -> None:
    model = load_model(toy_pipeline / "unet")
    assert same_weights(model.unet, load_model(toy_pipeline).unet)
    assert dict(model.scheduler.config) == dict(diffusers.DDPMScheduler().config)


def test_half_precision_and_shards_are_loaded_as_float32(toy: Path, toy_unet: Any) -> None:
    shutil.rmtree(toy / "unet")
    toy_unet.to(torch.float16).save_pretrained(toy / "unet", max_shard_size="300KB")
    assert len(list((toy / "unet").glob("*.safetensors"))) > 1
    model = load_model(toy)
    assert {parameter.dtype for parameter in model.unet.parameters()} == {torch.float32}
    assert same_weights(model.unet.to(torch.float16), toy_unet)


def test_a_manifest_gives_the_digest_and_is_checked(toy: Path) -> None:
    without = load_model(toy).digest
    model = load_model(with_manifest(toy))
    assert model.manifest is not None
    assert model.digest == model.manifest.digest == without


def test_every_scheduler_of_diffusers_may_be_there(toy: Path) -> None:
    path = toy / "scheduler" / "scheduler_config.json"
    for kind in (diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler, diffusers.DPMSolverMultistepScheduler):
        change(path, _class_name=kind.__name__)
        assert type(load_scheduler(toy)) is kind


def test_the_word_reference_is_the_packed_model() -> None:
    assert resolve("reference") == models.REFERENCE
    assert models.REFERENCE.is_relative_to(Path(models.__file__).parent)


def test_code_in_a_directory_is_not_run(toy: Path, tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    (toy / "unet" / "pruned_unet.py").write_text(f"open({str(mark)!r}, 'w')\nraise SystemExit(3)\n")
    (toy / "pipeline.py").write_text(f"open({str(mark)!r}, 'w')\n")
    change(toy / "unet" / "config.json", auto_map={"AutoModel": "pruned_unet.PrunedUNet2DModel"})
    load_model(toy)
    assert not mark.exists()


# --- bad input ---------------------------------------------------------------------------------------------------


def truncate(directory: Path) -> None:
    path = directory / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def truncate_within_the_header(directory: Path) -> None:
    path = directory / "unet" / WEIGHTS
    path.write_bytes(path.read_bytes()[:100])


def empty_weights(directory: Path) -> None:
    (directory / "unet" / WEIGHTS).write_bytes(b"")


def garbage_weights(directory: Path) -> None:
    (directory / "unet" / WEIGHTS).write_bytes(bytes(range(256)) * 40)


def drop_a_tensor(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.pop("conv_in.weight"))


def add_a_tensor(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.update(stranger=torch.zeros(1)))


def reshape_a_tensor(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors.update({"conv_in.bias": torch.zeros(5)}))


def nan_weights(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors["mid_block.attentions.0.to_q.bias"].fill_(float("nan")))


def infinite_weights(directory: Path) -> None:
    edit_weights(directory, lambda tensors: tensors["conv_out.weight"][0, 0, 0, 0].fill_(-float("inf")))


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = directory / "unet" / WEIGHTS
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def pickled_weights(directory: Path) -> None:
    (directory / "unet" / WEIGHTS).unlink()
    # What would happen to a pickle must not matter: it is never opened.
    (directory / "unet" / "diffusion_pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")


def missing_shard(directory: Path) -> None:
    unet = load_model(directory).unet
    shutil.rmtree(directory / "unet")
    unet.save_pretrained(directory / "unet", max_shard_size="300KB")
    min((directory / "unet").glob("*.safetensors")).unlink()


def config_is_no_json(directory: Path) -> None:
    (directory / "unet" / "config.json").write_text('{"_class_name": "UNet2DModel"')


def config_is_no_text(directory: Path) -> None:
    (directory / "unet" / "config.json").write_bytes(b"\xff\xfe\x00\x01")


def config_is_a_list(directory: Path) -> None:
    (directory / "unet" / "config.json").write_text("[1, 2]")


def config_without_class(directory: Path) -> None:
    change(directory / "unet" / "config.json", _class_name=None)


def config_of_another_family(directory: Path) -> None:
    change(directory / "unet" / "config.json", _class_name="UNet3DConditionModel")


def config_of_other_widths(directory: Path) -> None:
    change(directory / "unet" / "config.json", block_out_channels=[64, 64])


def config_of_unknown_blocks(directory: Path) -> None:
    change(directory / "unet" / "config.json", down_block_types=["DownBlock2D", "UnheardOfBlock"])


def config_of_pruning_without_channels(directory: Path) -> None:
    change(directory / "unet" / "config.json", _class_name="PrunedUNet2DModel")


def config_of_pruning_of_unknown_layers(directory: Path) -> None:
    path = directory / "unet" / "config.json"
    base = json.loads(path.read_text())
    path.write_text(json.dumps({"_class_name": "PrunedUNet2DModel", "base_config": base, "channels": {"x.y": [1, 2]}}))


def config_of_pruning_of_mad_widths(directory: Path) -> None:
    path = directory / "unet" / "config.json"
    base = json.loads(path.read_text())
    path.write_text(json.dumps({"_class_name": "PrunedUNet2DModel", "base_config": base, "channels": {"conv_in": [1]}}))


def no_network(directory: Path) -> None:
    shutil.rmtree(directory / "unet")


def unknown_scheduler(directory: Path) -> None:
    change(directory / "scheduler" / "scheduler_config.json", _class_name="os")


def scheduler_is_no_json(directory: Path) -> None:
    (directory / "scheduler" / "scheduler_config.json").write_text("{")


def scheduler_is_a_list(directory: Path) -> None:
    (directory / "scheduler" / "scheduler_config.json").write_text("[]")


def scheduler_of_unknown_schedule(directory: Path) -> None:
    change(directory / "scheduler" / "scheduler_config.json", beta_schedule="guesswork")


def digest_mismatch(directory: Path) -> None:
    with_manifest(directory)
    change(directory / "scheduler" / "scheduler_config.json", beta_end=0.3)


def missing_file(directory: Path) -> None:
    with_manifest(directory)
    (directory / "unet" / WEIGHTS).unlink()


def exported(directory: Path) -> None:
    with_manifest(directory, kind="exported")


DAMAGES = {
    truncate: "cannot be loaded",
    truncate_within_the_header: "cannot be loaded",
    empty_weights: "cannot be loaded",
    garbage_weights: "cannot be loaded",
    drop_a_tensor: "conv_in.weight",
    add_a_tensor: "stranger",
    reshape_a_tensor: "cannot be loaded",
    nan_weights: r"NaN or Inf\n.*mid_block.attentions.0.to_q.bias",
    infinite_weights: r"NaN or Inf\n.*conv_out.weight",
    pickled_weights: "no safetensors weights",
    missing_shard: "cannot be loaded",
    config_is_no_json: "config is not JSON",
    config_is_no_text: "config is not JSON",
    config_is_a_list: "config is not a JSON object",
    config_without_class: "not a diffusers config",
    config_of_another_family: r"not supported yet\n.*UNet3DConditionModel",
    config_of_other_widths: "cannot be loaded",
    config_of_unknown_blocks: "cannot be loaded",
    config_of_pruning_without_channels: "cannot be loaded",
    config_of_pruning_of_unknown_layers: "cannot be loaded",
    config_of_pruning_of_mad_widths: "cannot be loaded",
    no_network: "not a model directory",
    unknown_scheduler: "unknown scheduler",
    scheduler_is_no_json: "scheduler's config is not JSON",
    scheduler_is_a_list: "scheduler's config is not a JSON object",
    scheduler_of_unknown_schedule: "scheduler cannot be built",
    digest_mismatch: "differs from its digest",
    missing_file: "is missing",
    exported: "exported directory holds no weights",
}


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_model_is_explained(toy: Path, damage: Callable[[Path], None]) -> None:
    damage(toy)
    with pytest.raises(DpctlError, match=DAMAGES[damage]) as caught:
        load_model(toy)
    problem = caught.value
    assert problem.exit_code == 1
    assert problem.failed
    assert problem.todo
    assert "\n" not in problem.got


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no/such/place/anywhere", "no such model"),
        ("/no/such/place", "no such model"),
        ("nowhere", "no such model"),
        ("someone/something", "nor to be had from the Hub"),
    ],
)
def test_a_missing_model_is_explained(name: str, expected: str) -> None:
    with pytest.raises(DpctlError, match=expected) as caught:
        load_model(name)
    assert name in caught.value.got


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(DpctlError, match="not a model directory"):
        load_model(tmp_path / "model.safetensors")


def test_a_directory_of_something_else_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match=r"neither unet/config.json nor config.json"):
        load_model(tmp_path)
    with pytest.raises(DpctlError):
        unet_directory(tmp_path)
    with pytest.raises(DpctlError):
        read_config(tmp_path)


def test_verification_can_be_left_out(toy: Path) -> None:
    digest_mismatch(toy)
    assert load_model(toy, verify=False).scheduler.config.beta_end == 0.3


# --- writing -----------------------------------------------------------------------------------------------------


def test_save_then_load_is_bit_equal_and_the_rest_is_copied(toy: Path, tmp_path: Path) -> None:
    (toy / "vae").mkdir()
    (toy / "vae" / "config.json").write_text("{}")
    (toy / "README.md").write_text("card")
    (toy / ".cache").mkdir()
    change(toy / "model_index.json", vae=["diffusers", "AutoencoderKL"], _class_name="LDMPipeline")
    model = load_model(with_manifest(toy))
    (tmp_path / "out").mkdir()
    save_model(tmp_path / "out", model=model, unet=model.unet)
    files = set(artifact.hash_files(tmp_path / "out"))
    assert files == set(artifact.hash_files(toy))
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index == json.loads((toy / "model_index.json").read_text())
    again = load_model(tmp_path / "out")
    assert same_weights(again.unet, model.unet)
    assert again.scheduler.config == model.scheduler.config
    assert again.manifest is None  # the manifest is for the writer to make


def test_what_we_write_stock_loads(toy_pipeline: Path, tmp_path: Path) -> None:
    model = load_model(toy_pipeline)
    write_pipeline(tmp_path, unet=model.unet, scheduler=model.scheduler)
    stock = diffusers.DiffusionPipeline.from_pretrained(tmp_path)
    assert type(stock) is diffusers.DDPMPipeline
    assert same_weights(stock.unet, model.unet)
    assert stock.scheduler.config.beta_end == 0.2


def test_a_bare_unet_becomes_a_pipeline(toy_pipeline: Path, tmp_path: Path) -> None:
    model = load_model(toy_pipeline / "unet")
    save_model(tmp_path, model=model, unet=model.unet)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model_index.json", "scheduler", "unet"]
    assert same_weights(diffusers.DiffusionPipeline.from_pretrained(tmp_path).unet, model.unet)


def test_an_index_that_is_no_json_is_explained(toy: Path, tmp_path: Path) -> None:
    model = load_model(toy)
    (toy / "model_index.json").write_text("{")
    (tmp_path / "out").mkdir()
    with pytest.raises(DpctlError, match="index is not JSON"):
        save_model(tmp_path / "out", model=model, unet=model.unet)
