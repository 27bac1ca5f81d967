"""The training loss, against its formulae."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dpctl.data import Batch
from dpctl.diffusion import trained_schedule
from dpctl.finetune.features import Features, match
from dpctl.finetune.loss import Objective, min_snr

Drawn = tuple[Batch, Tensor, Tensor]
KINDS = ("epsilon", "v_prediction", "sample")


class Constant(nn.Module):
    """A network whose output is one number, and which counts its calls."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value, self.calls = nn.Parameter(torch.tensor(value)), 0

    def forward(self, sample: Tensor, timestep: Tensor) -> Any:
        self.calls += 1
        return SimpleNamespace(sample=self.value.expand_as(sample))


@pytest.fixture
def drawn() -> Drawn:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(3, 1, 8, 8, generator=generator) for _ in range(2))
    return Batch(clean), noise, torch.tensor([0, 40, 99])


def errors(value: float, target: Tensor) -> list[float]:
    return (target - value).square().flatten(1).mean(1).tolist()


# --- the terms ------------------------------------------------------------------------------------------------------


def test_without_a_teacher_it_is_each_samples_mean_squared_error(scheduler: Any, drawn: Drawn) -> None:
    loss = Objective(scheduler)(Constant(0.25), *drawn)
    assert loss.tolist() == pytest.approx(errors(0.25, drawn[1]))


def test_the_distance_to_the_teacher_is_added_with_its_weight(scheduler: Any, drawn: Drawn) -> None:
    plain = Objective(scheduler)(Constant(0.25), *drawn)
    for weight in (0.5, 2.0):
        loss = Objective(scheduler, Constant(1.0), distillation=weight)(Constant(0.25), *drawn)
        assert loss.tolist() == pytest.approx((plain + weight * 0.75**2).tolist())


def test_the_terms_are_told_before_their_weights_and_add_up(scheduler: Any, drawn: Drawn) -> None:
    student, teacher = Constant(0.25), Constant(1.0)
    objective = Objective(scheduler, teacher, 0.5, 3.0)
    terms = objective.terms(student, *drawn)
    assert (student.calls, teacher.calls) == (1, 1)
    assert {name: loss.tolist() for name, loss in terms.items()} == {
        "denoising": pytest.approx(errors(0.25, drawn[1])),
        "distillation": pytest.approx([0.75**2] * 3),
    }
    assert torch.equal(objective.total(terms), 0.5 * terms["denoising"] + 3.0 * terms["distillation"])
    assert torch.equal(objective.total(terms), objective(student, *drawn))


def test_what_weighs_nothing_is_not_computed(scheduler: Any, drawn: Drawn) -> None:
    teacher = Constant(1.0)
    assert list(Objective(scheduler, teacher).terms(Constant(0.25), *drawn)) == ["denoising"]
    assert teacher.calls == 0
    taught = Objective(scheduler, teacher, denoising=0.0, distillation=1.0).terms(Constant(0.25), *drawn)
    assert list(taught) == ["distillation"]


def test_the_teacher_learns_nothing_and_the_gradient_is_the_one_by_hand(scheduler: Any, drawn: Drawn) -> None:
    teacher, student = Constant(1.0), Constant(0.25)
    importance = torch.tensor([0.5, 2.0, 1.0])
    loss = Objective(scheduler, teacher, 0.5, 2.0, min_snr_gamma=5.0)(student, *drawn)
    (loss * importance).mean().backward()
    assert teacher.value.grad is None
    # d/dv mean_i u_i [0.5 w_i (v - noise_i)^2 + 2 (v - 1)^2], with w_i = min(1, 5 (1 - abar) / abar)
    kept = scheduler.alphas_cumprod[drawn[2]].tolist()
    means = drawn[1].flatten(1).mean(1).tolist()
    by_hand = [
        u * (min(1.0, 5.0 * (1 - abar) / abar) * (0.25 - mean) + 4.0 * (0.25 - 1.0))
        for u, abar, mean in zip(importance.tolist(), kept, means, strict=True)
    ]
    assert student.value.grad is not None
    assert float(student.value.grad) == pytest.approx(sum(by_hand) / 3, rel=1e-5)


def test_teacher_and_student_see_the_same_noisy_sample(scheduler: Any, drawn: Drawn) -> None:
    class Echo(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Any:
            return SimpleNamespace(sample=sample * timestep.view(-1, 1, 1, 1))

    taught = Objective(scheduler, Echo(), distillation=5.0)(Echo(), *drawn)
    assert torch.equal(taught, Objective(scheduler)(Echo(), *drawn))


def test_conditions_reach_both_networks(scheduler: Any, drawn: Drawn) -> None:
    class Labelled(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
            return SimpleNamespace(sample=class_labels.view(-1, 1, 1, 1).expand_as(sample).float())

    batch = dataclasses.replace(drawn[0], conditions={"class_labels": torch.tensor([0, 1, 2])})
    terms = Objective(scheduler, Labelled(), distillation=1.0).terms(Labelled(), batch, *drawn[1:])
    assert terms["distillation"].tolist() == [0.0] * 3
    expected = [float((drawn[1][row] - row).square().mean()) for row in range(3)]
    assert terms["denoising"].tolist() == pytest.approx(expected)


def test_in_half_precision_the_error_is_still_taken_in_float32(scheduler: Any, drawn: Drawn) -> None:
    loss = Objective(scheduler, Constant(1.0).half(), distillation=1.0)(Constant(0.25).half(), *drawn)
    assert loss.dtype == torch.float32


def test_terms_that_lack_what_they_need_are_our_mistake(scheduler: Any) -> None:
    with pytest.raises(ValueError, match="without a teacher"):
        Objective(scheduler, distillation=1.0)
    with pytest.raises(ValueError, match="without features"):
        Objective(scheduler, Constant(1.0), feature_distillation=1.0)


# --- features -------------------------------------------------------------------------------------------------------


def test_features_are_a_term_like_the_others(scheduler: Any, drawn: Drawn, make_unet: Callable[..., Any]) -> None:
    student, teacher = make_unet(1), make_unet(2)
    features = match(student, teacher)
    objective = Objective(scheduler, teacher, 1.0, 3.0, 0.5, features)
    terms = objective.terms(student, *drawn)
    assert list(terms) == ["denoising", "distillation", "features"]
    assert terms["features"].shape == (3,)
    assert float(terms["features"].detach().min()) > 0.01
    plain = Objective(scheduler, teacher, 1.0, 3.0)(student, *drawn)
    assert torch.allclose(objective(student, *drawn), plain + 0.5 * terms["features"], rtol=1e-5)


def test_by_features_alone_every_weight_gets_a_gradient(
    scheduler: Any, drawn: Drawn, make_unet: Callable[..., Any]
) -> None:
    student, teacher = make_unet(1), make_unet(2)
    objective = Objective(scheduler, teacher, 0.0, 0.0, 1.0, match(student, teacher))
    objective(student, *drawn).mean().backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert float(student.conv_out.weight.grad.abs().max()) == 0.0
    assert float(student.conv_in.weight.grad.abs().max()) > 0.0
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_without_their_weight_nothing_is_watched(scheduler: Any, drawn: Drawn) -> None:
    objective = Objective(scheduler, Constant(1.0), 1.0, 1.0, 0.0, Features({"no_such_block": None}))
    assert list(objective.terms(Constant(0.25), *drawn)) == ["denoising", "distillation"]


# --- what the scheduler says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_what_the_scheduler_says(drawn: Drawn, kind: str) -> None:
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, prediction_type=kind)
    clean, noise = drawn[0].clean, drawn[1]
    signal = scheduler.alphas_cumprod[drawn[2]].view(-1, 1, 1, 1)
    velocity = signal.sqrt() * noise - (1 - signal).sqrt() * clean  # Salimans and Ho (arXiv 2202.00512), appendix D
    target = {"epsilon": noise, "v_prediction": velocity, "sample": clean}[kind]
    assert Objective(scheduler)(Constant(0.5), *drawn).tolist() == pytest.approx(errors(0.5, target), rel=1e-5)


@pytest.mark.parametrize(
    "name", ["EulerDiscreteScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler"]
)
def test_noise_is_added_as_in_training_whatever_the_pipeline_samples_with(drawn: Drawn, name: str) -> None:
    schedule = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    found = trained_schedule(getattr(diffusers, name)(prediction_type="v_prediction", **schedule))
    wanted = diffusers.DDPMScheduler(prediction_type="v_prediction", **schedule)
    assert found.config.prediction_type == "v_prediction"
    given = (drawn[0].clean, *drawn[1:])
    assert torch.equal(found.add_noise(*given), wanted.add_noise(*given))
    assert torch.equal(found.get_velocity(*given), wanted.get_velocity(*given))


def test_a_scheduler_of_the_ddpm_kind_is_taken_as_it_is(scheduler: Any) -> None:
    assert Objective(scheduler).scheduler is scheduler


# --- min-SNR --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weights_are_the_papers(kind: str) -> None:
    from diffusers.training_utils import compute_snr

    scheduler = diffusers.DDPMScheduler(prediction_type=kind)
    timesteps = torch.arange(1000)
    snr = compute_snr(scheduler, timesteps).double()
    assert float(snr.min()) < 5.0 < float(snr.max())
    divisor = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[kind]
    expected = snr.clamp(max=5.0) / divisor
    assert torch.allclose(min_snr(scheduler, timesteps, 5.0).double(), expected, rtol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_same_error_in_the_image_alike_whatever_is_predicted(drawn: Drawn, kind: str) -> None:
    # A network that is wrong by d in x_0 and says so in its own terms: the loss is min(SNR, gamma) |d|^2 (equation 8).
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=100, prediction_type=kind)
    clean, noise, timesteps = drawn[0].clean, drawn[1], drawn[2]
    wrong = clean + 0.3
    abar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)

    class Wrong(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor) -> Any:
            eps = (sample - abar.sqrt() * wrong) / (1 - abar).sqrt()
            velocity = abar.sqrt() * eps - (1 - abar).sqrt() * wrong
            return SimpleNamespace(sample={"epsilon": eps, "v_prediction": velocity, "sample": wrong}[kind])

    snr = (abar / (1 - abar)).flatten().tolist()
    loss = Objective(scheduler, min_snr_gamma=5.0)(Wrong(), drawn[0], noise, timesteps)
    assert loss.tolist() == pytest.approx([min(value, 5.0) * 0.09 for value in snr], rel=1e-3)


@pytest.mark.parametrize(("kind", "last"), [*zip(KINDS, (1.0, 0.0, 0.0), strict=True)])
def test_a_schedule_that_ends_in_noise_alone_has_weights_too(drawn: Drawn, kind: str, last: float) -> None:
    scheduler = diffusers.DDPMScheduler(prediction_type=kind, rescale_betas_zero_snr=True)
    assert float(scheduler.alphas_cumprod[-1]) == 0.0
    weights = min_snr(scheduler, torch.tensor([0, 998, 999]), 5.0)
    assert bool(weights.isfinite().all())
    assert float(weights[-1]) == last
    assert float(weights[1]) > 0.0
    loss = Objective(scheduler, min_snr_gamma=5.0)(Constant(0.5), drawn[0], drawn[1], torch.tensor([0, 998, 999]))
    assert bool(loss.isfinite().all())


def test_min_snr_leaves_the_distillation_alone(scheduler: Any, drawn: Drawn) -> None:
    terms = Objective(scheduler, Constant(1.0), 1.0, 1.0, min_snr_gamma=1e-3).terms(Constant(0.25), *drawn)
    assert terms["distillation"].tolist() == pytest.approx([0.75**2] * 3)
    weighted, plain = terms["denoising"].tolist(), errors(0.25, drawn[1])
    assert weighted[0] < 1e-3 * plain[0]
    assert weighted[2] == pytest.approx(plain[2])  # there is less signal than gamma


def test_a_schedule_without_a_known_snr_is_refused(refused: Callable[..., Any]) -> None:
    with refused("signal-to-noise ratio", got="FlowMatch", todo="--min-snr-gamma"):
        Objective(diffusers.FlowMatchEulerDiscreteScheduler(), min_snr_gamma=5.0)
