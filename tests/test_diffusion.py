"""Noise, timesteps and targets: against their formulas, and the same whatever the batch."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpctl.diffusion import denoising_loss, noise_for, predicted_target, sample_generator
from dpctl.errors import DpctlError

# --- noise -------------------------------------------------------------------------------------------------------


@given(st.integers(0, 2**63 - 1), st.lists(st.integers(0, 10**9), min_size=1, max_size=6), st.randoms())
def test_row_i_depends_on_seed_and_index_only(seed: int, indices: list[int], shuffler: Any) -> None:
    rows = {index: noise_for(seed, [index], (2, 3))[0] for index in indices}
    shuffler.shuffle(indices)
    torch.randn(3)
    together = noise_for(seed, indices, (2, 3))
    assert all(torch.equal(row, rows[index]) for index, row in zip(indices, together, strict=True))


def test_seeds_indices_and_streams_are_kept_apart() -> None:
    drawn = [
        noise_for(seed, [index], (8,), stream)[0]
        for seed in (0, 1, 12)
        for index in (0, 1, 20)
        for stream in ("sample", "train")
    ]
    # Also 1/20 and 12/0, which would be one if seed and index were written side by side.
    assert len({tuple(row.tolist()) for row in drawn}) == len(drawn)


def test_it_is_standard_normal() -> None:
    noise = noise_for(0, range(2000), (4, 4))
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.02)
    assert float((noise.abs() > 1.96).float().mean()) == pytest.approx(0.05, abs=0.01)


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    noise_for(0, [0, 1], (8,))
    assert torch.equal(torch.get_rng_state(), before)


def test_noise_stays_what_it_was_when_published() -> None:
    # Seeds in papers and reports name pictures: a change here is a change of all of them.
    assert sample_generator(0, 0).initial_seed() == 1575735285
    assert sample_generator(7, 3, "train").initial_seed() == 1130471862


# --- targets -----------------------------------------------------------------------------------------------------


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    clean, noise = noise_for(0, range(5), (1, 4, 4)), noise_for(1, range(5), (1, 4, 4))
    return clean, noise, torch.tensor([0, 1, 30, 70, 99])


@pytest.mark.parametrize("kind", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize("schedule", ["linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_target_is_the_one_of_the_formula(kind: Any, schedule: str, prediction: str, batch: Any) -> None:
    clean, noise, timesteps = batch
    scheduler = kind(num_train_timesteps=100, beta_schedule=schedule, prediction_type=prediction)
    alpha_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
    expected = {
        "epsilon": noise,
        "sample": clean,
        # Salimans and Ho (2022), appendix D: v = sqrt(abar) eps - sqrt(1 - abar) x_0
        "v_prediction": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean,
    }[prediction]
    torch.testing.assert_close(predicted_target(scheduler, clean, noise, timesteps), expected)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_a_network_that_predicts_the_target_is_denoised_by_the_scheduler(prediction: str, batch: Any) -> None:
    clean, noise, _ = batch
    scheduler = DDIMScheduler(num_train_timesteps=100, prediction_type=prediction, clip_sample=False)
    scheduler.set_timesteps(10)
    for t in scheduler.timesteps.tolist():
        timesteps = torch.full((5,), t)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        target = predicted_target(scheduler, clean, noise, timesteps)
        restored = scheduler.step(target, t, noisy).pred_original_sample
        torch.testing.assert_close(restored, clean, rtol=0, atol=1e-3)


def test_an_unknown_prediction_type_is_refused(batch: Any) -> None:
    scheduler = DDPMScheduler(prediction_type="epsilon")
    scheduler.register_to_config(prediction_type="flow")
    with pytest.raises(DpctlError, match="unknown prediction type") as caught:
        predicted_target(scheduler, *batch)
    assert "'flow'" in caught.value.got


# --- the loss ----------------------------------------------------------------------------------------------------


def test_the_loss_is_per_sample(batch: Any) -> None:
    clean, noise, timesteps = batch

    def shifted(noisy: Tensor, t: Tensor) -> Any:
        return SimpleNamespace(sample=noise + t.view(-1, 1, 1, 1))

    losses = denoising_loss(shifted, DDPMScheduler(num_train_timesteps=100), clean, noise, timesteps)
    torch.testing.assert_close(losses, timesteps.float().square())


def test_the_network_sees_x_t(batch: Any) -> None:
    clean, noise, timesteps = batch
    scheduler = DDPMScheduler(num_train_timesteps=100)
    # DDPM equation 4: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps; solved for eps the loss is zero.
    alpha_bar = scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)

    def solver(noisy: Tensor, t: Tensor) -> Any:
        assert torch.equal(t, timesteps)
        return SimpleNamespace(sample=(noisy - alpha_bar.sqrt() * clean) / (1 - alpha_bar).sqrt())

    losses = denoising_loss(solver, scheduler, clean, noise, timesteps)
    torch.testing.assert_close(losses, torch.zeros(5), rtol=0, atol=1e-8)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch(make_unet: Callable[..., Any]) -> None:
    unet, scheduler = make_unet(), DDPMScheduler(num_train_timesteps=100)
    clean, noise = noise_for(0, range(4), (1, 8, 8)), noise_for(1, range(4), (1, 8, 8))
    timesteps = torch.tensor([0, 10, 50, 99])
    with torch.no_grad():
        together = denoising_loss(unet, scheduler, clean, noise, timesteps)
        alone = [denoising_loss(unet, scheduler, *(t[i : i + 1] for t in (clean, noise, timesteps))) for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)
