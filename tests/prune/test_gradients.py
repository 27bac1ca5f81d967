"""The gradients behind Taylor and Diff-Pruning scores: over which timesteps, of what, and always the same."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from dpctl.data import ArrayImages, Pixels, TrainingSet, open_data
from dpctl.diffusion import noise_for, sample_generator
from dpctl.errors import DpctlError
from dpctl.prune.gradients import (
    Active,
    Draws,
    Weighting,
    active_timesteps,
    draw,
    each_gradient,
    find_active,
    require_finite,
    timestep_grid,
)

losses_by_timestep = st.dictionaries(st.integers(0, 999), st.floats(0.0, 10.0), min_size=1, max_size=20)


@pytest.fixture
def images(toy_images: Path) -> TrainingSet:
    return Pixels(open_data(str(toy_images), channels=1, size=(8, 8)))


def wish(**changed: Any) -> Draws:
    wanted: dict[str, Any] = {"images": 8, "batch_size": 4, "accumulation": 1, "timesteps": 5, "seed": 0} | changed
    weighting = Weighting(wanted.pop("threshold", 0.0), wanted.pop("early", 1.0))
    return Draws(weighting=weighting, **wanted)


def run(model: Any, data: TrainingSet, **changed: Any) -> tuple[Active, list[dict[str, torch.Tensor]]]:
    """Return the timesteps that counted and every gradient."""
    advance = changed.pop("advance", lambda steps=1, **_: None)
    found: list[dict[str, torch.Tensor]] = []

    def look() -> None:
        found.append({n: p.grad.clone() for n, p in model.unet.named_parameters() if p.grad is not None})

    return each_gradient(model.unet, model.scheduler, data, wish(**changed), look, advance), found


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
def test_a_gradient_is_that_of_its_images_losses(toy_model: Any, images: TrainingSet, threshold: float) -> None:
    """DDPM equation 14 written out, each image at a timestep of its own, and autograd once a batch."""
    active, found = run(toy_model, images, threshold=threshold)
    order, timesteps = draw(images, toy_model.scheduler, active, wish(threshold=threshold))
    assert order == torch.randperm(48, generator=sample_generator(0, 0, "score-images"))[:8].tolist()
    clean, noise = images.plain(order).clean, noise_for(0, range(8), (1, 8, 8), "score-noise")
    alphas = torch.cumprod(1 - torch.linspace(1e-3, 0.2, 100), 0)[timesteps][:, None, None, None]
    noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise

    names, parameters = zip(*toy_model.unet.named_parameters(), strict=True)
    assert len(found) == 2
    for batch, gradients in zip((slice(0, 4), slice(4, 8)), found, strict=True):
        loss = (toy_model.unet(noisy[batch], timesteps[batch]).sample - noise[batch]).square().mean()
        assert set(gradients) == set(names)
        for name, gradient in zip(names, torch.autograd.grad(loss, parameters), strict=True):
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("sizes", [{"batch_size": 4, "accumulation": 2}, {"batch_size": 3, "accumulation": 3}])
def test_accumulation_gives_the_gradient_of_one_large_batch(
    toy_model: Any, images: TrainingSet, sizes: dict[str, int]
) -> None:
    _, (whole,) = run(toy_model, images, batch_size=8)
    _, (added,) = run(toy_model, images, **sizes)
    for name, gradient in whole.items():
        torch.testing.assert_close(added[name], gradient, rtol=1e-3, atol=1e-6)


def test_batches_that_do_not_go_up_are_of_nearly_one_size(toy_model: Any, images: TrainingSet) -> None:
    assert len(run(toy_model, images, images=10, batch_size=4)[1]) == 3  # 3 + 3 + 4
    assert len(run(toy_model, images, images=10, batch_size=16)[1]) == 1


def test_a_threshold_takes_some_of_the_timesteps(toy_model: Any, images: TrainingSet) -> None:
    # An untrained network's losses hardly fall with t: the threshold is high.
    everything, some = run(toy_model, images)[0], run(toy_model, images, threshold=0.97)[0]
    assert everything.timesteps == (0, 20, 40, 60, 80)
    assert everything.losses == {}  # nobody had to look
    assert 0 < len(some.timesteps) < 5
    assert set(some.losses) == set(everything.timesteps)
    assert some.timesteps == active_timesteps(some.losses, 0.97)


def test_losses_are_looked_up_with_the_same_images_and_noise_at_every_timestep(
    toy_model: Any, images: TrainingSet
) -> None:
    found = find_active(toy_model.unet, toy_model.scheduler, images, wish(threshold=0.5, batch_size=3)).losses
    order = torch.randperm(48, generator=sample_generator(0, 0, "score-losses"))[:8].tolist()
    clean, noise = images.plain(order).clean, noise_for(0, range(8), (1, 8, 8), "score-losses")
    for t, loss in found.items():
        noisy = toy_model.scheduler.add_noise(clean, noise, torch.full((8,), t))
        with torch.no_grad():
            expected = (toy_model.unet(noisy, torch.full((8,), t)).sample - noise).square().mean()
        assert loss == pytest.approx(expected.item(), rel=1e-5)


@given(st.integers(1, 300), st.integers(1, 60), st.sets(st.integers(0, 59), min_size=1), st.integers(0, 5))
def test_timesteps_are_spread_evenly_over_those_that_count(count: int, parts: int, chosen: set[int], seed: int) -> None:
    scheduler = DDPMScheduler(num_train_timesteps=100)
    grid = timestep_grid(scheduler, parts)
    active = tuple(grid[i] for i in sorted({c % len(grid) for c in chosen}))
    counted = [t for t in range(100) if max(g for g in grid if g <= t) in active]
    order, timesteps = draw(
        range(7), scheduler, Active(active, tuple(grid), {}), wish(images=count, timesteps=parts, seed=seed)
    )  # type: ignore[arg-type]
    assert set(timesteps.tolist()) <= set(counted)
    assert len(order) == len(timesteps) == count
    # One in each of `count` equal slices: no timestep is drawn more often than its share, up to the slices' borders.
    most = max(timesteps.tolist().count(t) for t in counted)
    assert most <= count / len(counted) + 2
    # Fewer images than draws: each is taken again, as often as any other.
    assert max(order.count(i) for i in range(7)) - min(order.count(i) for i in range(7)) <= 1


def test_the_same_seed_gives_the_same_bits(toy_model: Any, images: TrainingSet) -> None:
    one = run(toy_model, images, threshold=0.97)
    torch.manual_seed(99)  # the global generator plays no part
    other = run(toy_model, images, threshold=0.97)
    assert one[0] == other[0]
    assert all(same(mine, theirs) for mine, theirs in zip(one[1], other[1], strict=True))
    assert not same(one[1][0], run(toy_model, images, seed=1)[1][0])


def test_nothing_stays_behind_in_the_model(toy_model: Any, images: TrainingSet) -> None:
    before = {name: value.clone() for name, value in toy_model.unet.state_dict().items()}
    run(toy_model, images)

    def fail() -> None:
        raise KeyError("stop")

    with pytest.raises(KeyError):
        each_gradient(toy_model.unet, toy_model.scheduler, images, wish(), fail)
    assert same(before, toy_model.unet.state_dict())
    assert all(parameter.grad is None for parameter in toy_model.unet.parameters())
    assert not toy_model.unet.training


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_it_scores_what_the_network_was_trained_to_predict(toy_model: Any, images: TrainingSet, kind: str) -> None:
    toy_model = dataclasses.replace(toy_model, scheduler=DDPMScheduler(num_train_timesteps=100, prediction_type=kind))
    _, (found,) = run(toy_model, images, images=2)
    order, timesteps = draw(
        images, toy_model.scheduler, Active((0, 20, 40, 60, 80), (0, 20, 40, 60, 80), {}), wish(images=2)
    )
    clean, noise = images.plain(order).clean, noise_for(0, range(2), (1, 8, 8), "score-noise")
    alphas = toy_model.scheduler.alphas_cumprod[timesteps][:, None, None, None]
    target = {
        "epsilon": noise,
        "sample": clean,
        "v_prediction": alphas.sqrt() * noise - (1 - alphas).sqrt() * clean,
    }[kind]
    noisy = alphas.sqrt() * clean + (1 - alphas).sqrt() * noise
    bias = toy_model.unet.conv_out.bias
    (expected,) = torch.autograd.grad((toy_model.unet(noisy, timesteps).sample - target).square().mean(), bias)
    torch.testing.assert_close(found["conv_out.bias"], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_progress_is_told_image_by_image(toy_model: Any, images: TrainingSet, threshold: float) -> None:
    told: list[int] = []
    run(toy_model, images, threshold=threshold, advance=lambda steps=1, **_: told.append(steps))
    assert sum(told) == wish(threshold=threshold).work(toy_model.scheduler) == (8 + 5 * 8 if threshold else 8)


@given(losses_by_timestep, st.floats(0.0, 0.99), st.floats(0.01, 1.0))
def test_early_timesteps_are_those_at_the_start_of_the_schedule(
    losses: dict[int, float], threshold: float, early: float
) -> None:
    total = max(losses) + 1
    found = Weighting(threshold, early).active(losses, total)
    assert set(found) == {t for t in active_timesteps(losses, threshold) if t / total < early}


# --- what is not finite ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_is_named(bad: float) -> None:
    good = torch.ones(3)
    require_finite({"a.weight": good}, "timestep 7")
    with pytest.raises(DpctlError, match=r"gradient is not finite\n.*b\.bias.* timestep 7\n.*magnitude or random"):
        require_finite({"a.weight": good, "b.bias": torch.tensor([1.0, bad])}, "timestep 7")


def test_a_backward_pass_that_overflows_is_explained(toy_model: Any, images: TrainingSet) -> None:
    # Small activations times large weights: the loss can be held in float32, its gradient cannot.
    unet = toy_model.unet
    with torch.no_grad():
        unet.conv_norm_out.weight.mul_(1e-10)
        unet.conv_norm_out.bias.mul_(1e-10)
        unet.conv_out.weight.mul_(1e28)
    with pytest.raises(
        DpctlError, match=r"a gradient is not finite\n.*\(conv_in.weight\) at images 0 to 3 of the draw\n"
    ):
        run(toy_model, images)


def test_a_loss_that_overflows_is_explained(toy_model: Any, images: TrainingSet) -> None:
    with torch.no_grad():
        toy_model.unet.conv_out.weight.mul_(1e20)
    for threshold in (0.0, 0.5):  # found by the batch that it is in, or when the losses are looked up
        with pytest.raises(DpctlError, match=r"loss is not finite\n.*at timestep \d+\n.*too large"):
            run(toy_model, images, threshold=threshold)


def test_a_fourier_embedding_is_never_asked_for_the_logarithm_of_zero(families: dict[str, Any], toy_model: Any) -> None:
    unet = families["ncsnpp"]()
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    model = dataclasses.replace(toy_model, unet=unet, scheduler=DDPMScheduler(num_train_timesteps=4))
    active, found = run(model, Pixels(ArrayImages("noise", pixels)), images=6, timesteps=4, threshold=0.01)
    assert active.grid == (1, 2, 3)
    assert all(bool(gradient.isfinite().all()) for gradients in found for gradient in gradients.values())
