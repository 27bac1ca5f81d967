"""The figures behind the progress bar are those of the step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpctl.data import TrainingSet
from dpctl.finetune import loop
from dpctl.finetune.loss import Objective
from dpctl.finetune.meter import STEPS, Meter
from dpctl.finetune.processes import open_accelerator
from dpctl.recipe import LoopRecipe


def test_speed_is_of_the_last_steps() -> None:
    times = iter([0.0, *range(100, 100 + 4 * STEPS, 2)])
    meter = Meter(6, torch.device("cpu"), clock=lambda: float(next(times)))
    assert meter.speed()["images/s"] == pytest.approx(6 / 100)
    for _ in range(STEPS + 1):
        told = meter.speed()
    assert told["images/s"] == pytest.approx(3.0)  # the slow first step is forgotten
    assert str(told["memory"]).endswith("B")


def test_the_parts_are_means_over_the_step() -> None:
    meter = Meter(4, torch.device("cpu"))
    for values in ([1.0, 2.0], [3.0, 6.0]):
        meter.add({"one": torch.tensor(values), "two": -torch.tensor(values)}, torch.tensor([1.0, 0.5]))
    assert meter.parts() == {"one": pytest.approx(8 / 4), "two": pytest.approx(-8 / 4)}
    meter.add({"one": torch.ones(4)}, torch.ones(4))
    assert meter.parts() == {}  # it would say the loss again


def test_the_loop_tells_parts_that_add_up_to_the_loss(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    told: list[dict[str, Any]] = []
    recipe = LoopRecipe(steps=3, batch_size=5, accumulation=2, timestep_sampling="importance")
    objective = Objective(scheduler, make_tiny(seed=1), denoising=0.5, distillation=3.0)
    loop.train(
        make_tiny(), objective, images, recipe,
        accelerator=open_accelerator(recipe), folder=tmp_path / "c", advance=lambda _, **values: told.append(values),
    )  # fmt: skip
    for step in told:
        assert step["loss"] == pytest.approx(0.5 * step["denoising"] + 3.0 * step["distillation"], rel=1e-5)
        assert step["grad_norm"] > 0
