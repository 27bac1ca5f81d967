"""The gradients behind Taylor and Diff-Pruning scores: over which timesteps, of what, and always the same."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from dpctl.data import Images, open_data
from dpctl.diffusion import noise_for, sample_generator
from dpctl.errors import DpctlError
from dpctl.prune.gradients import (
    Gradients,
    Weighting,
    accumulate,
    active_timesteps,
    require_finite,
    timestep_grid,
)

losses_by_timestep = st.dictionaries(st.integers(0, 999), st.floats(0.0, 10.0), min_size=1, max_size=20)


@pytest.fixture
def images(toy_images: Path) -> Images:
    return open_data(str(toy_images), channels=1, size=(8, 8))


def run(model: Any, images: Images, **changed: Any) -> Gradients:
    wanted: dict[str, Any] = {"count": 4, "timesteps": 5, "threshold": 0.0, "early": 1.0, "seed": 0} | changed
    wanted["weighting"] = Weighting(wanted.pop("threshold"), wanted.pop("early"))
    return accumulate(model.unet, model.scheduler, images, **wanted)


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


# --- which timesteps ---------------------------------------------------------------------------------------------


def reference_timesteps(losses: Mapping[int, float], threshold: float) -> tuple[int, ...]:
    """Return the timesteps whose gradients VainF/Diff-Pruning's ddpm_prune.py adds up.

    Its loop runs upwards in t, calls `loss.backward()` first and only then leaves at the first loss below
    `loss_max * thr`.
    """
    counted, largest = [], 0.0
    for t, loss in losses.items():
        counted.append(t)  # loss.backward()
        largest = max(largest, loss)
        if loss < largest * threshold:
            break
    return tuple(counted)


def test_the_first_timestep_below_the_threshold_does_not_count_as_it_does_in_the_reference_code() -> None:
    losses = {0: 1.0, 10: 0.4, 20: 0.11, 30: 0.09, 40: 0.05}  # denoising losses fall with t
    assert active_timesteps(losses, 0.1) == (0, 10, 20)
    assert reference_timesteps(losses, 0.1) == (0, 10, 20, 30)  # off by one
    assert active_timesteps(losses, 0.0) == reference_timesteps(losses, 0.0) == tuple(losses)


def test_the_threshold_is_strict_and_looks_at_every_timestep() -> None:
    # L_t / L_max > T is a property of each timestep: one below it does not end the search.
    assert active_timesteps({0: 0.5, 1: 0.04, 2: 1.0, 3: 0.05}, 0.05) == (0, 2)


@given(losses_by_timestep, st.floats(0.0, 0.99), st.floats(0.0, 0.99))
def test_a_higher_threshold_takes_fewer_timesteps(losses: dict[int, float], one: float, other: float) -> None:
    low, high = sorted((one, other))
    assert set(active_timesteps(losses, high)) <= set(active_timesteps(losses, low))


@given(losses_by_timestep, st.floats(0.0, 0.99))
def test_the_largest_loss_always_counts(losses: dict[int, float], threshold: float) -> None:
    largest = max(losses, key=lambda t: losses[t])
    assert largest in active_timesteps(losses, threshold) or losses[largest] == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_an_error(bad: float) -> None:
    with pytest.raises(DpctlError, match="not finite\n.*timestep 20"):
        active_timesteps({0: 1.0, 20: bad}, 0.05)


@given(st.integers(1, 1200), st.integers(1, 1000))
def test_the_grid_is_even_over_the_whole_schedule(count: int, total: int) -> None:
    grid = timestep_grid(DDPMScheduler(num_train_timesteps=total), count)
    assert len(grid) == min(count, total)
    assert grid == sorted(set(grid))
    assert grid[0] == 0
    gaps = [after - before for before, after in zip(grid, [*grid[1:], total], strict=True)]
    assert max(gaps) - min(gaps) <= 1


# --- what is added up --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [0.0, 0.97])
def test_the_gradient_is_that_of_the_summed_loss(toy_model: Any, images: Images, threshold: float) -> None:
    """DDPM equation 14 written out, one graph for all timesteps, and autograd once."""
    found = run(toy_model, images, threshold=threshold)
    chosen = torch.randperm(48, generator=sample_generator(0, 0, "score-images"))[:4].tolist()
    clean, noise = images.batch(chosen), noise_for(0, chosen, (1, 8, 8), "score-noise")
    alphas = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 100), 0)
    losses = {}
    for t in (0, 20, 40, 60, 80):
        noisy = alphas[t].sqrt() * clean + (1 - alphas[t]).sqrt() * noise
        losses[t] = (toy_model.unet(noisy, torch.full((4,), t)).sample - noise).square().mean()
    active = [t for t in losses if losses[t] / max(losses.values()) > threshold]
    assert found.active == tuple(active)
    assert found.losses == pytest.approx({t: loss.item() for t, loss in losses.items()}, rel=1e-5)

    names, parameters = zip(*toy_model.unet.named_parameters(), strict=True)
    expected = torch.autograd.grad(sum(losses[t] for t in active), parameters)
    assert set(found.by_name) == set(names)
    for name, gradient in zip(names, expected, strict=True):
        torch.testing.assert_close(found.by_name[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_threshold_takes_some_of_the_timesteps(toy_model: Any, images: Images) -> None:
    # An untrained network's losses hardly fall with t: the threshold is high.
    everything, some = run(toy_model, images), run(toy_model, images, threshold=0.97)
    assert everything.active == (0, 20, 40, 60, 80)
    assert 0 < len(some.active) < 5
    assert everything.losses == some.losses
    assert not same(everything.by_name, some.by_name)


def test_the_same_seed_gives_the_same_bits(toy_model: Any, images: Images) -> None:
    one = run(toy_model, images)
    torch.manual_seed(99)  # the global generator plays no part
    other = run(toy_model, images)
    assert one.losses == other.losses
    assert same(one.by_name, other.by_name)
    assert not same(one.by_name, run(toy_model, images, seed=1).by_name)


def test_nothing_stays_behind_in_the_model(toy_model: Any, images: Images) -> None:
    before = {name: value.clone() for name, value in toy_model.unet.state_dict().items()}
    run(toy_model, images)
    assert same(before, toy_model.unet.state_dict())
    assert all(parameter.grad is None for parameter in toy_model.unet.parameters())
    assert not toy_model.unet.training


def test_more_images_than_there_are_is_all_of_them(toy_model: Any, images: Images) -> None:
    assert run(toy_model, images, count=48, timesteps=1).losses == run(toy_model, images, count=99, timesteps=1).losses


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_it_scores_what_the_network_was_trained_to_predict(toy_model: Any, images: Images, kind: str) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=100, prediction_type=kind)
    found = accumulate(toy_model.unet, scheduler, images, count=4, timesteps=2, weighting=Weighting(), seed=0)
    assert len(found.losses) == 2


def test_progress_is_told_twice_per_timestep(toy_model: Any, images: Images) -> None:
    told: list[int] = []
    run(toy_model, images, threshold=0.5, advance=lambda steps=1, **_: told.append(steps))
    assert sum(told) == 10


@given(losses_by_timestep, st.floats(0.0, 0.99), st.floats(0.01, 1.0))
def test_early_timesteps_are_those_at_the_start_of_the_schedule(
    losses: dict[int, float], threshold: float, early: float
) -> None:
    total = max(losses) + 1
    found = Weighting(threshold, early).active(losses, total)
    assert set(found) == {t for t in active_timesteps(losses, threshold) if t / total < early}


def test_each_timesteps_gradient_can_be_seen_alone(toy_model: Any, images: Images) -> None:
    alone: list[dict[str, torch.Tensor]] = []

    def look() -> None:
        alone.append({n: p.grad.clone() for n, p in toy_model.unet.named_parameters() if p.grad is not None})

    assert run(toy_model, images, each=look).by_name == {}
    together = run(toy_model, images)
    assert len(alone) == len(together.active) == 5
    for name, gradient in together.by_name.items():
        torch.testing.assert_close(sum(one[name] for one in alone), gradient, rtol=1e-4, atol=1e-6)


# --- what is not finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_named(bad: float) -> None:
    good = torch.ones(3)
    require_finite({"a.weight": good}, "timestep 7")
    with pytest.raises(DpctlError, match=r"gradient is not finite\n.*b\.bias.* timestep 7\n.*magnitude or random"):
        require_finite({"a.weight": good, "b.bias": torch.tensor([1.0, bad])}, "timestep 7")


@pytest.mark.parametrize("each", [None, lambda: None])
def test_a_backward_pass_that_overflows_is_explained(toy_model: Any, images: Images, each: Any) -> None:
    # Small activations times large weights: the loss can be held in float32, its gradient cannot.
    unet = toy_model.unet
    with torch.no_grad():
        unet.conv_norm_out.weight.mul_(1e-10)
        unet.conv_norm_out.bias.mul_(1e-10)
        unet.conv_out.weight.mul_(1e28)
    with pytest.raises(DpctlError, match=r"a gradient is not finite\n.*\(conv_in.weight\) at timestep 0\n"):
        run(toy_model, images, each=each)


def test_a_loss_that_overflows_is_explained(toy_model: Any, images: Images) -> None:
    with torch.no_grad():
        toy_model.unet.conv_out.weight.mul_(1e20)
    with pytest.raises(DpctlError, match=r"loss is not finite\n.*timestep 0\n.*too large"):
        run(toy_model, images)
