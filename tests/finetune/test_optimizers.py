"""AdamW with moments of eight bits takes a quarter of their memory, learns, and resumes exactly."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from dpctl.errors import DpctlError
from dpctl.finetune import optimizers, train
from dpctl.finetune.optimizers import EIGHT_BIT
from dpctl.models import load_model
from dpctl.recipe import OPTIMIZERS, LoopRecipe, TrainRecipe

CPU = torch.device("cpu")
needs_torchao = pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")


@pytest.fixture
def wide(tmp_path: Path, make_tiny: Callable[..., Any], training: Callable[..., TrainRecipe]) -> TrainRecipe:
    """The recipe of a network with convolutions that are large enough for eight bits: 32 * 32 * 9 values."""
    make_tiny(block_out_channels=(32,)).save_config(tmp_path)
    return training(config=str(tmp_path / "config.json"), steps=5, checkpoint_every=2, optimizer=EIGHT_BIT)


def stepped(unet: Any, recipe: LoopRecipe, steps: int) -> Any:
    optimizer = optimizers.open_optimizer(unet.parameters(), recipe, CPU)
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for _ in range(steps):
        optimizers.set_learning_rate(optimizer, 1e-2)
        unet(sample, 3).sample.pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_torchao if n == EIGHT_BIT else ()) for n in OPTIMIZERS])
def test_the_estimate_is_the_size_of_the_moments(name: str, make_tiny: Callable[..., Any]) -> None:
    unet = make_tiny(block_out_channels=(32,))
    optimizer = stepped(unet, LoopRecipe(optimizer=name), 1)
    kept = {key: value for key, value in optimizers.tensors(optimizer).items() if not key.endswith(".step")}
    size = sum(tensor.numel() * tensor.element_size() for tensor in kept.values())
    assert optimizers.size_of_moments(list(unet.parameters()), name) == size


@pytest.mark.parametrize("name", [pytest.param(n, marks=needs_torchao if n == EIGHT_BIT else ()) for n in OPTIMIZERS])
def test_the_learning_rate_of_a_step_is_the_one_that_was_set(name: str, make_tiny: Callable[..., Any]) -> None:
    unet = make_tiny(block_out_channels=(32,))
    before = [p.detach().clone() for p in unet.parameters()]
    optimizer = optimizers.open_optimizer(unet.parameters(), LoopRecipe(optimizer=name, weight_decay=0.5), CPU)
    for rate, factor in ((0.0, 1.0), (0.1, 0.95)):
        optimizers.set_learning_rate(optimizer, rate)
        for p in unet.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()  # without a gradient there is the decay alone
        for p, was in zip(unet.parameters(), before, strict=True):
            torch.testing.assert_close(p.detach(), was * factor)


@needs_torchao
def test_eight_bits_learn_nearly_as_all_of_them(make_tiny: Callable[..., Any]) -> None:
    sample, losses = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), {}
    for name in OPTIMIZERS:
        unet = make_tiny(block_out_channels=(32,))
        first = unet(sample, 3).sample.pow(2).mean().item()
        stepped(unet, LoopRecipe(optimizer=name), 20)
        losses[name] = unet(sample, 3).sample.pow(2).mean().item() / first
    assert losses["adamw"] < 0.2
    assert losses[EIGHT_BIT] < 0.2
    assert losses[EIGHT_BIT] != losses["adamw"]


@needs_torchao
def test_a_training_in_eight_bits_resumed_is_never_having_stopped(
    tmp_path: Path, wide: TrainRecipe, stopping: Any
) -> None:
    whole = train(tmp_path / "whole", wide)
    with stopping(3) as bar:
        train(tmp_path / "cut", wide, bar=bar)
    newest = max((tmp_path / "cut.checkpoints").glob("step-*"))
    with safe_open(newest, framework="pt") as stream:
        kept = {name.rsplit(".", 1)[-1]: stream.get_tensor(name).dtype for name in stream.keys()}  # noqa: SIM118
    assert kept["codes"] == torch.uint8
    cut = train(tmp_path / "cut", wide, resume=True)
    assert (cut.files, cut.digest) == (whole.files, whole.digest)
    assert load_model(tmp_path / "cut").manifest.recipe["optimizer"] == EIGHT_BIT


def test_a_missing_package_is_said_before_anything_is_read(
    tmp_path: Path, training: Callable[..., TrainRecipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DpctlError, match="needs a package") as caught:
        train(tmp_path / "out", training(config="no such file", optimizer=EIGHT_BIT))
    assert "[adam8bit]" in caught.value.todo


def test_another_optimizer_is_refused_by_its_name(tmp_path: Path, training: Callable[..., TrainRecipe]) -> None:
    with pytest.raises(DpctlError, match="optimizer") as caught:
        train(tmp_path / "out", training(optimizer="adamw-8bits"))
    assert EIGHT_BIT in str(caught.value)
