"""`prune` from end to end: a model directory in, a slim one out, and nothing where it cannot be."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpctl import artifact, cost, registry
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.prune import CRITERIA, check, prune, prune_unet
from dpctl.recipe import PruneRecipe, to_dict

HALF = PruneRecipe(criterion="magnitude", ratio=0.5)


def files_below(directory: Path) -> set[str]:
    return {path.relative_to(directory).as_posix() for path in directory.rglob("*")}


def same_bytes(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


# --- what comes out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", registry.names(CRITERIA))
def test_every_criterion_writes_a_model_and_the_same_one_again(
    name: str, toy_pipeline: Path, toy_images: Path, tmp_path: Path
) -> None:
    recipe = PruneRecipe(criterion=name, ratio=0.3, data=str(toy_images), images=4, timesteps=3, seed=7)
    one, other = (prune(str(toy_pipeline), tmp_path / out, recipe) for out in ("one", "other"))
    assert one.digest == other.digest
    manifest = artifact.read_manifest(tmp_path / "one")
    assert manifest == one
    assert files_below(tmp_path / "one") == {
        "dpctl.json",
        "model_index.json",
        "scheduler",
        "scheduler/scheduler_config.json",
        "unet",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/kept.safetensors",
        "unet/pruned_unet.py",
    }
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_manifest_says_what_was_asked_and_what_was_achieved(toy_pipeline: Path, tmp_path: Path) -> None:
    manifest = prune(str(toy_pipeline), tmp_path / "out", HALF)
    before, after = load_model(toy_pipeline), load_model(tmp_path / "out")
    assert manifest.kind == "pruned"
    assert manifest.recipe == to_dict(HALF)
    assert manifest.parent == before.digest
    assert manifest.parent_source == str(toy_pipeline)
    assert [entry["kind"] for entry in manifest.lineage] == ["foreign"]
    stats = manifest.stats
    assert stats["requested"] == {"ratio": 0.5}
    assert stats["unpruned"] == cost.stats(before.unet)
    counted = cost.stats(after.unet)
    assert {name: stats[name] for name in counted} == counted
    for measure in ("macs", "params"):
        assert stats["achieved"][measure] == counted[measure] / stats["unpruned"][measure]
    assert stats["bytes"] == (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").stat().st_size
    assert stats["widths"]["conv_in"] == [32, 16]
    assert after.unet.conv_in.out_channels == 16
    assert stats["left_alone"] == {"conv_out": "it is the network's output"}


@pytest.mark.parametrize("measure", ["macs", "params"])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.9])
def test_a_target_is_met_and_nearly_used_up(toy_model: Any, measure: str, fraction: float) -> None:
    recipe = PruneRecipe(criterion="magnitude", align=1, **{f"target_{measure}": fraction})
    pruned = prune_unet(toy_model, recipe)
    unpruned, left = cost.stats(toy_model.unet)[measure], cost.stats(pruned.unet)[measure]
    assert fraction - 0.02 <= left / unpruned <= fraction
    assert pruned.stats["achieved"][measure] == left / unpruned
    assert pruned.stats["requested"] == {f"target_{measure}": fraction}


@pytest.mark.parametrize("align", [1, 8, 16])
def test_widths_are_aligned(toy_model: Any, align: int) -> None:
    pruned = prune_unet(toy_model, replace(HALF, ratio=0.6, align=align))
    assert all(kept % align == 0 or kept == full for full, kept in pruned.stats["widths"].values())


def test_a_ratio_too_small_for_any_step_changes_no_bit(toy_model: Any, tmp_path: Path, toy_pipeline: Path) -> None:
    # One channel of four per norm group is a quarter: a ratio below that takes nothing from any group.
    pruned = prune_unet(toy_model, replace(HALF, ratio=0.001))
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([1, 50])
    with torch.no_grad():
        assert torch.equal(pruned.unet(*inputs).sample, toy_model.unet(*inputs).sample)
    assert pruned.stats["achieved"] == {"macs": 1.0, "params": 1.0}
    with pytest.raises(DpctlError, match="nothing would be pruned"):
        prune(str(toy_pipeline), tmp_path / "out", replace(HALF, ratio=0.001))
    assert not (tmp_path / "out").exists()


def test_the_source_is_not_changed(toy_pipeline: Path, toy_model: Any, tmp_path: Path) -> None:
    files = artifact.hash_files(toy_pipeline)
    before = {name: value.clone() for name, value in toy_model.unet.state_dict().items()}
    prune_unet(toy_model, HALF)
    prune(str(toy_pipeline), tmp_path / "out", HALF)
    assert artifact.hash_files(toy_pipeline) == files
    assert all(torch.equal(before[name], value) for name, value in toy_model.unet.state_dict().items())


def test_other_components_are_copied_untouched(toy_pipeline: Path, tmp_path: Path) -> None:
    source = shutil.copytree(toy_pipeline, tmp_path / "source")
    (source / "vae").mkdir()
    (source / "vae" / "config.json").write_text('{"x": 1}')
    prune(str(source), tmp_path / "out", HALF)
    for name in ("vae/config.json", "scheduler/scheduler_config.json"):
        assert same_bytes(source / name, tmp_path / "out" / name)


def test_a_bare_unet_becomes_a_pipeline(toy_pipeline: Path, tmp_path: Path) -> None:
    prune(str(toy_pipeline / "unet"), tmp_path / "bare", HALF)
    prune(str(toy_pipeline), tmp_path / "whole", HALF)
    for name in ("diffusion_pytorch_model.safetensors", "kept.safetensors"):
        assert same_bytes(tmp_path / "bare" / "unet" / name, tmp_path / "whole" / "unet" / name)
    assert (tmp_path / "bare" / "model_index.json").is_file()


def test_progress_is_shown_for_scoring_and_compensation(toy_model: Any, toy_images: Path) -> None:
    from contextlib import contextmanager

    told: list[Any] = []

    @contextmanager
    def bar(description: str, total: int, *, done: int = 0) -> Any:
        told.append((description, total))
        yield lambda steps=1, **_: told.append(steps)

    recipe = PruneRecipe(ratio=0.5, data=str(toy_images), images=2, timesteps=3)
    prune_unet(toy_model, recipe, bar=bar)
    compensation = told.index(("compensate", 51))  # layers
    scored, compensated = told[1:compensation], told[compensation + 1 :]
    assert told[0] == ("score", sum(scored))
    assert compensated == [1] * 51


# --- pruning what was pruned -------------------------------------------------------------------------------------


@pytest.fixture
def once(toy_pipeline: Path, tmp_path: Path) -> Path:
    prune(str(toy_pipeline), tmp_path / "once", PruneRecipe(criterion="random", ratio=0.25, align=1))
    return tmp_path / "once"


def expect_kept_of_the_base(base: Path, pruned: Path) -> None:
    """Every weight of the pruned model is the base model's at the kept positions (to_q holds a factor besides)."""
    original, kept = load_model(base).unet.state_dict(), load_file(pruned / "unet" / "kept.safetensors")
    for name, value in load_model(pruned).unet.state_dict().items():
        module, expected = name.rpartition(".")[0], original[name]
        if f"{module}.out" in kept:
            expected = expected[kept[f"{module}.out"]]
        if f"{module}.in" in kept and expected.ndim > 1:
            expected = expected[:, kept[f"{module}.in"]]
        if ".to_q." in name:
            expected = expected * (len(value) / len(original[name])) ** 0.5
            torch.testing.assert_close(value, expected)
        else:
            assert torch.equal(value, expected), name


def test_fractions_and_kept_channels_are_of_the_unpruned_model(toy_pipeline: Path, once: Path, tmp_path: Path) -> None:
    expect_kept_of_the_base(toy_pipeline, once)
    recipe = PruneRecipe(criterion="random", target_macs=0.3, align=1, seed=5)
    manifest = prune(str(once), tmp_path / "twice", recipe)
    unpruned = cost.stats(load_model(toy_pipeline).unet)
    assert manifest.stats["unpruned"] == unpruned
    assert 0.28 <= cost.stats(load_model(tmp_path / "twice").unet)["macs"] / unpruned["macs"] <= 0.3
    assert manifest.stats["achieved"]["macs"] == manifest.stats["macs"] / unpruned["macs"]
    assert [entry["kind"] for entry in manifest.lineage] == ["foreign", "pruned"]
    assert manifest.parent == load_model(once).digest
    expect_kept_of_the_base(toy_pipeline, tmp_path / "twice")
    config = json.loads((tmp_path / "twice" / "unet" / "config.json").read_text())
    assert config["base_config"] == json.loads((once / "unet" / "config.json").read_text())["base_config"]


def test_the_bare_unet_of_a_pruned_model_remembers_too(toy_pipeline: Path, once: Path, tmp_path: Path) -> None:
    # unet/ alone has no manifest: what it was made from is in its config, what was kept beside its weights.
    manifest = prune(str(once / "unet"), tmp_path / "twice", PruneRecipe(criterion="random", target_params=0.4))
    assert manifest.stats["unpruned"] == cost.stats(load_model(toy_pipeline).unet)
    expect_kept_of_the_base(toy_pipeline, tmp_path / "twice")


def test_what_nobody_knows_is_not_made_up(toy_pipeline: Path, once: Path, tmp_path: Path) -> None:
    load_model(once).unet.save_pretrained(tmp_path / "stock")  # stock diffusers drops kept.safetensors
    manifest = prune(str(tmp_path / "stock"), tmp_path / "twice", PruneRecipe(criterion="random", ratio=0.3))
    assert manifest.stats["unpruned"] == cost.stats(load_model(toy_pipeline).unet)
    assert not (tmp_path / "twice" / "unet" / "kept.safetensors").exists()


def test_a_target_that_is_met_already_is_refused(once: Path, tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match="meets the target already"):
        prune(str(once), tmp_path / "twice", PruneRecipe(criterion="random", target_macs=0.9))
    assert not (tmp_path / "twice").exists()


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"ratio": None}, r"exactly one target\n.*none"),
        ({"target_macs": 0.5}, r"exactly one target\n.*ratio, target_macs"),
        ({"target_macs": 0.5, "target_params": 0.5}, "exactly one target"),
        ({"ratio": 0.0}, r"--ratio is outside \(0, 1\)\n.*got: 0"),
        ({"ratio": 1.0}, r"--ratio is outside \(0, 1\)"),
        ({"ratio": -0.5}, r"--ratio is outside \(0, 1\)"),
        ({"ratio": 30.0}, r"--ratio is outside \(0, 1\)\n.*30"),
        ({"ratio": float("nan")}, r"--ratio is outside \(0, 1\)\n.*nan"),
        ({"ratio": None, "target_macs": 1.0}, "--target-macs is outside"),
        ({"ratio": None, "target_params": 5e6}, "--target-params is outside"),
        ({"threshold": 1.0}, "--threshold is outside"),
        ({"threshold": -0.1}, "--threshold is outside"),
        ({"floor": float("nan")}, r"--floor is outside \[0, 1\)"),
        ({"threshold": float("nan")}, "--threshold is outside"),
        ({"align": 0}, "a count is below 1"),
        ({"images": 0}, "a count is below 1"),
        ({"timesteps": -1}, "a count is below 1"),
        ({"keep": ("",)}, "empty pattern"),
        ({"only": ("mid_block.*", " ")}, "empty pattern"),
        ({"reduction": "sum"}, r"unknown reduction\n.*\n.*sum-abs, abs-sum"),
        ({"criterion": "magnitud"}, r"unknown criterion\n.*magnitud\D.*\n.*did you mean magnitude\?"),
        ({"criterion": "diff_pruning"}, r"did you mean diff-pruning\?"),
        ({"criterion": "__init__"}, "unknown criterion"),
        ({"criterion": "../plan"}, "unknown criterion"),
    ],
)
def test_an_unusable_recipe_is_explained(
    toy_pipeline: Path, tmp_path: Path, changed: dict[str, Any], expected: str
) -> None:
    recipe = replace(HALF, **changed)
    with pytest.raises(DpctlError, match=expected):
        check(recipe)
    with pytest.raises(DpctlError, match=expected):
        prune(str(toy_pipeline), tmp_path / "out", recipe)
    assert files_below(tmp_path) == set()


def broken(toy: Path, how: str) -> Path:
    """Damage a copy of the toy; more ways are in tests/test_models.py."""
    weights = toy / "unet" / "diffusion_pytorch_model.safetensors"
    if how == "missing":
        shutil.rmtree(toy)
    elif how == "no model":
        shutil.rmtree(toy / "unet")
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-10])
    elif how == "altered":
        artifact.write_manifest(toy, kind="trained", recipe={}, stats={})
        weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    elif how == "pickle":
        weights.rename(weights.with_suffix(".bin"))
    elif how == "nan":
        tensors = load_file(weights)
        tensors["conv_out.bias"][0] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    elif how == "index":
        (toy / "model_index.json").write_text("{")
    elif how == "family":
        config = json.loads((toy / "unet" / "config.json").read_text())
        config["_class_name"] = "UNet2DConditionModel"
        (toy / "unet" / "config.json").write_text(json.dumps(config))
    return toy


@pytest.mark.parametrize("criterion", ["random", "magnitude", "diff-pruning"])
@pytest.mark.parametrize("how", ["missing", "no model", "truncated", "altered", "pickle", "nan", "index", "family"])
def test_a_broken_model_leaves_nothing(
    toy_pipeline: Path, toy_images: Path, tmp_path: Path, how: str, criterion: str
) -> None:
    source = broken(shutil.copytree(toy_pipeline, tmp_path / "in" / "toy"), how)
    (tmp_path / "out").mkdir()
    recipe = PruneRecipe(criterion=criterion, ratio=0.5, data=str(toy_images), images=2, timesteps=2)
    with pytest.raises(DpctlError):
        prune(str(source), tmp_path / "out" / "slim", recipe)
    assert files_below(tmp_path / "out") == set()


def no_data(_: Path) -> Path:
    return Path("/no/such/data")


def empty_folder(folder: Path) -> Path:
    return folder


def broken_image(folder: Path) -> Path:
    (folder / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    return folder


def images_of_another_size(folder: Path) -> Path:
    np.savez(folder / "a.npz", images=np.zeros((3, 9, 9), np.uint8))
    return folder / "a.npz"


def images_in_colour(folder: Path) -> Path:
    np.savez(folder / "a.npz", images=np.zeros((3, 8, 8, 3), np.uint8))
    return folder / "a.npz"


def images_with_channels_first(folder: Path) -> Path:
    np.savez(folder / "a.npz", images=np.zeros((3, 1, 8, 8), np.uint8))
    return folder / "a.npz"


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (images_in_colour, r"images of 8x8 with 3 channel\(s\); the model takes 8x8 with 1"),
        (images_with_channels_first, r"images of 1x8 with 8 channel\(s\).*\n.*\[N, H, W, C\]"),
        (no_data, "no such data"),
        (empty_folder, "no images"),
        (broken_image, "an image cannot be read"),
        (images_of_another_size, "does not fit the model"),
    ],
)
def test_bad_data_is_explained(toy_pipeline: Path, tmp_path: Path, make: Callable[[Path], Path], expected: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "out").mkdir()
    recipe = PruneRecipe(ratio=0.5, data=str(make(tmp_path / "data")))
    with pytest.raises(DpctlError, match=expected):
        prune(str(toy_pipeline), tmp_path / "out" / "slim", recipe)
    assert files_below(tmp_path / "out") == set()


@pytest.mark.parametrize("changed", [{"out_channels": 2}, {"in_channels": 4, "out_channels": 4}])
def test_a_model_whose_loss_images_do_not_give_is_explained(
    make_unet: Callable[..., Any], tmp_path: Path, toy_images: Path, changed: dict[str, Any]
) -> None:
    make_unet(**changed).save_pretrained(tmp_path / "unet")
    recipe = PruneRecipe(ratio=0.5, data=str(toy_images))
    with pytest.raises(DpctlError, match=r"(?s)diff-pruning cannot score this model.*magnitude or random"):
        prune(str(tmp_path / "unet"), tmp_path / "out", recipe)
    assert prune(str(tmp_path / "unet"), tmp_path / "out", HALF).stats["achieved"]["macs"] < 0.5


def test_an_existing_output_is_refused_before_any_work(toy_pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "bench.json").touch()
    with pytest.raises(DpctlError, match="output exists"):
        prune("/no/such/model", tmp_path / "out", HALF)
    assert files_below(tmp_path) == {"out", "out/bench.json"}
    manifest: Manifest = prune(str(toy_pipeline), tmp_path / "out", HALF, force=True)
    assert artifact.read_manifest(tmp_path / "out") == manifest
    assert "out/bench.json" not in files_below(tmp_path)


def test_a_failed_forced_run_leaves_the_old_output(toy_pipeline: Path, tmp_path: Path) -> None:
    old = prune(str(toy_pipeline), tmp_path / "out", HALF)
    with pytest.raises(DpctlError):
        prune(str(toy_pipeline), tmp_path / "out", replace(HALF, ratio=None, target_macs=0.001), force=True)
    assert artifact.read_manifest(tmp_path / "out") == old
    artifact.verify_files(tmp_path / "out", old)


def test_a_model_of_ours_can_be_replaced_by_its_slim_self_and_no_other(toy_pipeline: Path, tmp_path: Path) -> None:
    model = shutil.copytree(toy_pipeline, tmp_path / "model")
    with pytest.raises(DpctlError, match="only what dpctl wrote"):
        prune(str(model), model, HALF, force=True)
    prune(str(model), tmp_path / "slim", HALF)
    prune(str(tmp_path / "slim"), tmp_path / "slim", replace(HALF, target_macs=None, ratio=0.5), force=True)
    assert load_model(tmp_path / "slim").unet.conv_in.out_channels == 8
