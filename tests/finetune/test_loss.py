"""The training loss, against its formula."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dpctl.finetune.loss import Objective


class Constant(nn.Module):
    """A network whose output is one number, and which counts its calls."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.calls = nn.Parameter(torch.tensor(value)), 0

    def forward(self, sample: Tensor, timesteps: Tensor) -> Any:
        self.calls += 1
        return SimpleNamespace(sample=self.value.expand_as(sample))


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 1, 4, 4, generator=generator) for _ in range(2))
    return clean, noise, torch.tensor([0, 40, 99])


def test_without_a_teacher_it_is_the_mean_squared_error(scheduler: Any, batch: Any) -> None:
    loss = Objective(scheduler)(Constant(0.25), *batch)
    assert loss.item() == pytest.approx(float((batch[1] - 0.25).square().mean()))


def test_the_distance_to_the_teacher_is_added_with_its_weight(scheduler: Any, batch: Any) -> None:
    plain = Objective(scheduler)(Constant(0.25), *batch).item()
    for weight in (0.5, 2.0):
        loss = Objective(scheduler, Constant(1.0), weight)(Constant(0.25), *batch)
        assert loss.item() == pytest.approx(plain + weight * 0.75**2)


def test_a_teacher_that_agrees_adds_nothing(scheduler: Any, batch: Any) -> None:
    loss = Objective(scheduler, Constant(0.25), 1.0)(Constant(0.25), *batch)
    assert loss.item() == Objective(scheduler)(Constant(0.25), *batch).item()


def test_with_weight_zero_the_teacher_is_not_asked(scheduler: Any, batch: Any) -> None:
    teacher = Constant(1.0)
    Objective(scheduler, teacher, 0.0)(Constant(0.25), *batch)
    assert teacher.calls == 0


def test_the_teacher_learns_nothing(scheduler: Any, batch: Any) -> None:
    teacher, student = Constant(1.0), Constant(0.25)
    Objective(scheduler, teacher, 2.0)(student, *batch).backward()
    assert teacher.value.grad is None
    # d/dv [(v - noise)^2 + 2 (v - 1)^2]
    expected = 2 * (0.25 - float(batch[1].mean())) + 4 * (0.25 - 1.0)
    assert student.value.grad is not None
    assert float(student.value.grad) == pytest.approx(expected, rel=1e-5)


def test_teacher_and_student_see_the_same_noisy_sample(scheduler: Any, batch: Any) -> None:
    class Echo(nn.Module):
        def forward(self, sample: Tensor, timesteps: Tensor) -> Any:
            return SimpleNamespace(sample=sample * timesteps.view(-1, 1, 1, 1))

    assert Objective(scheduler, Echo(), 5.0)(Echo(), *batch) == Objective(scheduler)(Echo(), *batch)


@pytest.mark.parametrize(("kind", "target"), [("epsilon", 1), ("sample", 0)])
def test_the_target_is_what_the_scheduler_says(
    make_tiny: Callable[..., Any], batch: Any, kind: str, target: int
) -> None:
    from diffusers import DDPMScheduler

    loss = Objective(DDPMScheduler(num_train_timesteps=100, prediction_type=kind))(Constant(0.5), *batch)
    assert loss.item() == pytest.approx(float((batch[target] - 0.5).square().mean()))


def test_in_half_precision_the_error_is_still_taken_in_float32(scheduler: Any, batch: Any) -> None:
    loss = Objective(scheduler, Constant(1.0).half(), 1.0)(Constant(0.25).half(), *batch)
    assert loss.dtype == torch.float32
