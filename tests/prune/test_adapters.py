"""A LoRA of the base model on a pruned one: refused before anything is attached, and sliced so that it fits."""

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.prune import prune
from dpctl.prune.adapters import slice_lora
from dpctl.prune.surgery import slim
from dpctl.recipe import PruneRecipe

Lora = dict[str, Tensor]
Models = tuple[Any, Any, Lora]
TARGETS = (".to_q", ".to_k", ".to_v", ".to_out.0", ".ff.net.0.proj", ".ff.net.2", ".proj_in", ".conv1", "conv_in")


@pytest.fixture(scope="module")
def toy(families: dict[str, Callable[[], Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    families["stable-diffusion"]().save_pretrained(folder / "base" / "unet")
    DDPMScheduler().save_pretrained(folder / "base" / "scheduler")
    return folder


def loaded(folder: Path, name: str) -> Models:
    kept = load_file(folder / name / "unet" / "kept.safetensors")
    return load_model(folder / "base").unet, load_model(folder / name).unet, kept


@pytest.fixture(scope="module")
def free(toy: Path) -> Models:
    """A toy of Stable Diffusion, the same pruned twice, and what was kept of it."""
    recipe = PruneRecipe(criterion="random", ratio=0.3, align=1)
    prune(str(toy / "base"), toy / "once", recipe)
    prune(str(toy / "once"), toy / "twice", replace(recipe, ratio=0.2, seed=1))
    return loaded(toy, "twice")


@pytest.fixture(scope="module")
def stock(toy: Path) -> Models:
    """The same in the layout stock, which is diffusers' own class."""
    prune(str(toy / "base"), toy / "stock", PruneRecipe(criterion="random", ratio=0.3, layout="stock"))
    return loaded(toy, "stock")


@pytest.fixture(scope="module", params=["free", "stock"])
def models(request: pytest.FixtureRequest) -> Models:
    return request.getfixturevalue(request.param)


def lora_of(unet: Any, rank: int = 2) -> Lora:
    """Return random matrices for linear layers and convolutions of every kind, in peft's names."""
    generator, made = torch.Generator().manual_seed(0), {}
    for name, layer in unet.named_modules():
        if not name.endswith(TARGETS):
            continue
        out, before, *kernel = layer.weight.shape
        made[f"unet.{name}.lora_A.weight"] = torch.randn(rank, before, *kernel, generator=generator)
        made[f"unet.{name}.lora_B.weight"] = torch.randn(out, rank, *(1 for _ in kernel), generator=generator)
    return made


def fused(unet: Any, lora: Lora) -> Any:
    """Return the network with W + B A in the place of W (LoRA, arXiv 2106.09685, equation 3)."""
    unet = copy.deepcopy(unet)
    for key, down in lora.items():
        if key.endswith(".lora_A.weight"):
            up, layer = (
                lora[key.replace("lora_A", "lora_B")],
                unet.get_submodule(key[len("unet.") : -len(".lora_A.weight")]),
            )
            layer.weight.data += torch.einsum("or,ri...->oi...", up.flatten(1), down)
    return unet


# --- sliced ------------------------------------------------------------------------------------------------------


def test_pruning_the_fused_network_is_fusing_the_sliced_lora(models: Models) -> None:
    base, small, kept = models
    lora = lora_of(base)
    stock = None if hasattr(small.config, "base_config") else dict(small.config)
    expected = slim(fused(base, lora), kept, stock).state_dict()
    found = fused(small, slice_lora(lora, kept, small)).state_dict()
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], msg=name)
    assert any(not torch.equal(value, small.state_dict()[name]) for name, value in found.items())


def old_names(key: str) -> str:
    return key.replace(".lora_A", ".lora.down").replace(".lora_B", ".lora.up")


def oldest_names(key: str) -> str:
    for layer in ("to_q", "to_k", "to_v", "to_out"):
        for matrix, word in (("lora_A", "down"), ("lora_B", "up")):
            key = key.replace(
                f".{layer}{'.0' if layer == 'to_out' else ''}.{matrix}", f".processor.{layer}_lora.{word}"
            )
    return old_names(key)


@pytest.mark.parametrize("rename", [old_names, oldest_names, lambda key: key.removeprefix("unet.")])
def test_the_names_of_diffusers_are_understood(models: Models, rename: Callable[[str], str]) -> None:
    base, small, kept = models
    lora = lora_of(base)
    expected = slice_lora(lora, kept, small)
    found = slice_lora({rename(key): value for key, value in lora.items()}, kept, small)
    assert {key.removeprefix("unet."): value.tolist() for key, value in found.items()} == {
        key.removeprefix("unet."): value.tolist() for key, value in expected.items()
    }


def test_what_is_not_of_the_network_stays_as_it_is(models: Models) -> None:
    _, small, kept = models
    others = {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_linear_layer.down.weight": torch.ones(2, 3),
        "unet.conv_in.alpha": torch.tensor(4.0),
    }
    assert slice_lora(others, kept, small) == others


def test_a_lora_that_is_not_of_the_base_model_is_refused(models: Models) -> None:
    _, small, kept = models
    with pytest.raises(DpctlError, match=r"not one of the base model\n.*lora_[AB].weight is \[.*\n.*unpruned"):
        slice_lora(lora_of(small), kept, small)


@pytest.mark.parametrize("key", ["lora_magnitude_vector", "lokr_w1", "lora_B.bias"])
def test_other_kinds_of_adapters_are_refused(models: Models, key: str) -> None:
    _, small, kept = models
    name = next(iter(kept)).rpartition(".")[0]
    with pytest.raises(DpctlError, match=rf"cannot be sliced\n.*{key}"):
        slice_lora({f"unet.{name}.{key}": torch.ones(2, 3)}, kept, small)


# --- loaded ------------------------------------------------------------------------------------------------------


@pytest.fixture
def stock_loads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, dict[str, Any]]]:
    """Return what stock's method was called with; it needs peft, which is not among our dependencies."""
    calls: list[tuple[Any, dict[str, Any]]] = []
    monkeypatch.setattr(UNet2DConditionModel, "load_lora_adapter", lambda _, lora, **how: calls.append((lora, how)))
    return calls


@pytest.mark.parametrize("rename", [str, old_names, oldest_names])
@pytest.mark.parametrize("prefix", ["unet", None])
@pytest.mark.parametrize("from_file", [False, True])
def test_a_lora_of_the_base_model_is_refused_on_a_slim_one(
    free: Models,
    stock_loads: list[Any],
    tmp_path: Path,
    rename: Callable[[str], str],
    prefix: str | None,
    from_file: bool,
) -> None:
    base, small, _ = free
    lora = {rename(key) if prefix else rename(key).removeprefix("unet."): value for key, value in lora_of(base).items()}
    save_file(lora, tmp_path / "lora.safetensors")
    source, how = (tmp_path, {"weight_name": "lora.safetensors"}) if from_file else (lora, {})
    with pytest.raises(ValueError, match=r"does not fit this pruned network.*\n  got: .*\n  do:  .*") as e:
        small.load_lora_adapter(source, prefix=prefix, **how)
    shapes = f"conv_in.lora_B.weight is [32, 2, 1, 1], the layer's weight {list(small.conv_in.weight.shape)}"
    assert all(part in str(e.value) for part in (shapes, "kept.safetensors", "slice_lora"))
    assert stock_loads == []


def test_a_lora_that_fits_is_loaded_by_stock(free: Models, stock_loads: list[Any], tmp_path: Path) -> None:
    base, small, kept = free
    for lora in (lora_of(small), slice_lora(lora_of(base), kept, small)):
        small.load_lora_adapter(lora, prefix="unet", adapter_name="mine", metadata=None)
        assert stock_loads.pop() == (
            lora,
            {"prefix": "unet", "hotswap": False, "adapter_name": "mine", "metadata": None},
        )
        save_file(lora, tmp_path / "lora.safetensors")
        small.load_lora_adapter(tmp_path, prefix="unet", weight_name="lora.safetensors", adapter_name="mine")
        found, how = stock_loads.pop()
        assert how == {"prefix": "unet", "hotswap": False, "adapter_name": "mine", "metadata": None}
        assert found.keys() == lora.keys()
        assert all(torch.equal(value, lora[key]) for key, value in found.items())


def test_keys_of_other_networks_and_other_adapters_are_left_to_stock(free: Models, stock_loads: list[Any]) -> None:
    _, small, _ = free
    lora = {
        "text_encoder.conv_in.lora_A.weight": torch.ones(2, 99),
        "unet.nowhere.lora_A.weight": torch.ones(2, 99),
        "unet.conv_in.lokr_w1": torch.ones(2, 99),
        "unet.conv_norm_out.lora_A.weight": torch.ones(2, 99),
    }
    small.load_lora_adapter(lora, prefix="unet")
    assert stock_loads == [(lora, {"prefix": "unet", "hotswap": False})]


def test_a_layer_below_an_adapter_is_looked_at(free: Models, stock_loads: list[Any]) -> None:
    base, small, _ = copy.deepcopy(free)
    small.conv_in = nn.ModuleDict({"base_layer": small.conv_in})
    with pytest.raises(ValueError, match="does not fit"):
        small.load_lora_adapter({k: v for k, v in lora_of(base).items() if "conv_in" in k}, prefix="unet")
    assert stock_loads == []
