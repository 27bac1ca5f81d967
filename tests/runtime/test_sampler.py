"""The sampling loop, against the one denoiser whose samples are known: that of a Gaussian."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from diffusers.configuration_utils import FrozenDict
from torch import Tensor

from dpctl.errors import DpctlError
from runtime import make_scheduler, sample
from runtime.noise import initial_noise, step_generators
from runtime.schedulers import SCHEDULERS

MEAN, STD = -0.2, 0.25
# Solvers, which follow a noise prediction in many small steps; lcm takes a few jumps of another network, tested apart.
SOLVERS = [name for name in SCHEDULERS if name != "lcm"]
# First-order steps that add noise need the finest grid: their std is 0.20 after 50 steps.
STEPS = {name: 1000 if name in ("ddpm", "euler-ancestral") else 200 for name in SOLVERS}
CONFIG = DDPMScheduler(clip_sample=False, timestep_spacing="linspace").config


class GaussianDenoiser:
    """The exact noise prediction for pixels that are independent N(MEAN, STD^2)."""

    def __init__(self, **config: Any) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.config = FrozenDict({"in_channels": 1, "sample_size": 4, "num_class_embeds": None} | config)
        self.calls: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []
        # log alpha-bar between whole timesteps is interpolated, as Euler's fractional ones need. [T]
        self._log_alpha_bar = DDPMScheduler().alphas_cumprod.log()

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        self.calls.append((sample, timestep, conditions))
        below = timestep.long().clamp(max=len(self._log_alpha_bar) - 2)
        part = timestep - below
        log = self._log_alpha_bar[below] * (1 - part) + self._log_alpha_bar[below + 1] * part
        alpha_bar = log.exp()[:, None, None, None]
        # x_t ~ N(sqrt(a) MEAN, a STD^2 + 1 - a): the noise is what is left of its mean, scaled back.
        variance = alpha_bar * STD**2 + 1 - alpha_bar
        return (1 - alpha_bar).sqrt() * (sample - alpha_bar.sqrt() * MEAN) / variance


class GaussianConsistency(GaussianDenoiser):
    """The same as a consistency model: its noise prediction leads from any x_t to the end of the ODE's path."""

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        alpha_bar = self._log_alpha_bar[timestep.long()].exp()[:, None, None, None]
        # The path keeps each pixel's place within the distribution: x_0 has as many stds from the mean as x_t.
        x_0 = MEAN + STD * (sample - alpha_bar.sqrt() * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar).sqrt()
        return (sample - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()


def draw(name: str = "ddim", indices: Any = range(4), steps: int = 10, seed: int = 0, **kwargs: Any) -> Tensor:
    denoiser = kwargs.pop("denoiser", None) or GaussianDenoiser()
    scheduler = make_scheduler(name, CONFIG)
    return sample(denoiser, scheduler, seed=seed, indices=indices, num_inference_steps=steps, **kwargs)


@pytest.mark.parametrize(("name", "steps"), STEPS.items())
def test_the_denoiser_of_a_gaussian_gives_that_gaussian(name: str, steps: int) -> None:
    images = draw(name, range(256), steps)
    assert images.shape == (256, 1, 4, 4)
    # 4,096 pixels: the mean's standard error is 0.004, the std's 0.003.
    assert images.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert images.std().item() == pytest.approx(STD, rel=0.03)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_a_consistency_model_of_a_gaussian_gives_it_in_any_number_of_steps(steps: int) -> None:
    images = draw("lcm", range(256), steps, denoiser=GaussianConsistency())
    assert images.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert images.std().item() == pytest.approx(STD, rel=0.03)


def test_one_step_of_a_consistency_model_is_its_function() -> None:
    # One jump, without any noise after it. The scheduler mixes in c_skip = 0.25 / ((10 t)^2 + 0.25) of x_t: 2.5e-9.
    noise = initial_noise(0, range(4), (1, 4, 4))
    alpha_bar = DDPMScheduler().alphas_cumprod[999]
    expected = MEAN + STD * (noise - alpha_bar.sqrt() * MEAN) / (alpha_bar * STD**2 + 1 - alpha_bar).sqrt()
    found = draw("lcm", steps=1, denoiser=GaussianConsistency())
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_noise_prediction_is_no_consistency_model() -> None:
    # One jump to the mean of what x_T may come from loses nearly all of the spread.
    assert draw("lcm", range(256), 1).std().item() < 0.1 * STD


def test_the_grid_of_a_consistency_model_is_no_finer_than_its_timesteps() -> None:
    short = DDPMScheduler(num_train_timesteps=20).config
    assert make_scheduler("lcm", short).config.original_inference_steps == 20
    assert make_scheduler("lcm", CONFIG).config.original_inference_steps == 50
    with pytest.raises(DpctlError, match="give 1 to 50"):
        draw("lcm", steps=51)
    images = sample(GaussianDenoiser(), make_scheduler("lcm", short), seed=0, indices=[0], num_inference_steps=20)
    assert images.isfinite().all()


def test_fewer_steps_come_less_close_to_the_gaussian() -> None:
    errors = [abs(draw("euler", range(256), steps).std().item() - STD) for steps in (10, 30, 100)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_an_image_does_not_depend_on_the_batch_it_is_drawn_in(name: str) -> None:
    together = draw(name, range(5))
    alone = torch.cat([draw(name, [index]) for index in range(5)])
    turned = draw(name, [4, 2, 0])
    torch.testing.assert_close(alone, together, rtol=0, atol=1e-6)
    torch.testing.assert_close(turned, together[[4, 2, 0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_same_seed_draws_the_same_and_another_does_not(name: str) -> None:
    assert torch.equal(draw(name), draw(name))
    assert not torch.allclose(draw(name), draw(name, seed=1), atol=0.01)


@pytest.mark.parametrize("name", ["ddpm", "euler-ancestral", "lcm"])
def test_a_stochastic_scheduler_gives_every_sample_noise_of_its_own(name: str) -> None:
    class Zero(GaussianDenoiser):
        def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            return torch.zeros_like(sample)

    first: list[Tensor] = []
    draw(name, [7, 8], steps=20, denoiser=Zero(), on_step=lambda i, x_t: first.append(x_t))
    change = (first[1] - first[0]).flatten(1)
    assert not torch.allclose(change[0], change[1], atol=0.01)


def test_step_noise_is_not_the_initial_noise_again() -> None:
    start = initial_noise(0, [3], (1, 4, 4))[0]
    assert not torch.allclose(torch.randn((1, 4, 4), generator=step_generators(0, [3])[0]), start)


def test_the_network_sees_float32_timesteps_of_the_batch_fractions_included() -> None:
    denoiser = GaussianDenoiser()
    draw("euler", range(3), steps=7, denoiser=denoiser)
    timesteps = torch.stack([timestep for _, timestep, _ in denoiser.calls])
    assert timesteps.shape == (7, 3)
    assert timesteps.dtype == torch.float32
    assert not torch.equal(timesteps, timesteps.round())
    assert all(timestep.is_contiguous() for _, timestep, _ in denoiser.calls)


def test_the_network_sees_inputs_of_unit_scale_whatever_the_scheduler_carries() -> None:
    denoiser = GaussianDenoiser()
    draw("euler", range(64), steps=5, denoiser=denoiser)
    assert denoiser.calls[0][0].std().item() == pytest.approx(1.0, rel=0.1)


def test_the_scheduler_is_left_as_it_was() -> None:
    scheduler = make_scheduler("dpm-solver++", CONFIG)
    before = scheduler.timesteps.clone()
    sample(GaussianDenoiser(), scheduler, seed=0, indices=[0], num_inference_steps=5)
    assert torch.equal(scheduler.timesteps, before)
    assert scheduler.num_inference_steps is None


def test_the_images_are_ordinary_tensors_within_range() -> None:
    images = draw("ddim", steps=2)
    assert images.dtype == torch.float32
    assert images.abs().max() <= 1.0
    images.requires_grad_().sum().backward()


def test_on_step_is_called_after_every_step() -> None:
    seen: list[int] = []
    draw(steps=6, on_step=lambda i, x_t: seen.append(i))
    assert seen == list(range(6))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_cannot_be_is_refused(steps: int) -> None:
    with pytest.raises(DpctlError, match="give 1 to 1000"):
        draw(steps=steps)


def test_a_sample_that_is_not_finite_is_an_error_and_no_black_image() -> None:
    class Overflowing(GaussianDenoiser):
        def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
            return sample / 0

    with pytest.raises(DpctlError, match="NaN or Inf"):
        draw(denoiser=Overflowing())


def test_a_class_conditional_network_draws_one_class_after_another() -> None:
    denoiser = GaussianDenoiser(num_class_embeds=3)
    draw(indices=[0, 1, 2, 3, 7], steps=1, denoiser=denoiser)
    assert denoiser.calls[0][2]["class_labels"].tolist() == [0, 1, 2, 0, 1]
    draw(indices=[0, 1], steps=1, denoiser=denoiser, conditions={"class_labels": torch.tensor([2, 2])})
    assert denoiser.calls[1][2]["class_labels"].tolist() == [2, 2]


def test_schedulers_keep_what_the_model_was_trained_with() -> None:
    config = DDPMScheduler(beta_end=0.5, prediction_type="v_prediction", clip_sample=False).config
    for name in SCHEDULERS:
        made = make_scheduler(name, config).config
        assert (made.beta_end, made.prediction_type) == (0.5, "v_prediction")
    assert make_scheduler("ddim", config).config.clip_sample is False
    assert isinstance(make_scheduler("ddim", config), DDIMScheduler)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_was_left_at_its_default_is_kept_too(name: str) -> None:
    made = make_scheduler(name, DDPMScheduler().config)
    assert torch.equal(made.betas, DDPMScheduler().betas)


def test_an_unknown_scheduler_is_refused_with_a_hint() -> None:
    with pytest.raises(DpctlError, match="did you mean ddim"):
        make_scheduler("dim", {})


def test_a_scheduler_without_randomness_needs_no_generator() -> None:
    class Halving:
        config: Any = FrozenDict({})
        init_noise_sigma = 1.0
        timesteps = torch.arange(2)

        def set_timesteps(self, steps: int) -> None:
            self.timesteps = torch.arange(steps).flip(0)

        def scale_model_input(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample

        def step(self, output: Tensor, timestep: Tensor, sample: Tensor, return_dict: bool) -> tuple[Tensor]:
            return (sample / 2,)

    plain = SimpleNamespace(device=torch.device("cpu"), config=GaussianDenoiser().config)
    images = sample(_calling(plain), Halving(), seed=0, indices=[0], num_inference_steps=3)
    torch.testing.assert_close(images, (initial_noise(0, [0], (1, 4, 4)) / 8).clamp(-1, 1))


def _calling(plain: SimpleNamespace) -> Any:
    class Callable(SimpleNamespace):
        def __call__(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample

    return Callable(**vars(plain))
