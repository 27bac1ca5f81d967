"""The training loop: stopped anywhere and resumed it is the same training; its EMA weights are what it leaves."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import EMAModel
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpctl.data import Images
from dpctl.errors import DpctlError
from dpctl.finetune import checkpoint, loop
from dpctl.finetune.loss import Objective
from dpctl.recipe import LoopRecipe

RECIPE = LoopRecipe(steps=6, batch_size=4, learning_rate=1e-2, warmup_steps=2, ema_decay=0.7, checkpoint_every=2)


class Stopped(Exception):
    """The process ends here."""


def recipe(**changed: Any) -> LoopRecipe:
    return LoopRecipe(**(vars(RECIPE) | changed))


def stop_after(steps: int) -> Callable[..., None]:
    left = iter(range(steps - 1))

    def advance(*_: Any, **__: Any) -> None:
        if next(left, None) is None:
            raise Stopped

    return advance


def weights(unet: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- stop and resume ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("stop", range(1, 7))
def test_stopped_at_any_step_and_resumed_is_never_having_stopped(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images, stop: int, every: int
) -> None:
    whole, cut = make_tiny(), make_tiny()
    wanted = recipe(checkpoint_every=every)
    losses = loop.train(whole, Objective(scheduler), images, wanted, folder=tmp_path / "whole")
    with pytest.raises(Stopped):
        loop.train(cut, Objective(scheduler), images, wanted, folder=tmp_path / "cut", advance=stop_after(stop))

    start = checkpoint.newest(tmp_path / "cut")
    assert (start.step if start else 0) == min(stop, 5) // every * every
    again = make_tiny() if start is None else make_tiny(seed=9)  # nothing but the checkpoint decides
    assert loop.train(again, Objective(scheduler), images, wanted, folder=tmp_path / "cut", start=start) == losses
    assert same(weights(again), weights(whole))


def test_stopped_and_resumed_twice_with_a_teacher_and_bf16(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images
) -> None:
    wanted = recipe(mixed_precision="bf16", checkpoint_every=1)
    whole, cut = make_tiny(), make_tiny()
    losses = loop.train(whole, Objective(scheduler, make_tiny(3), 1.0), images, wanted, folder=tmp_path / "whole")
    for stop in (2, 2):
        start = checkpoint.newest(tmp_path / "cut")
        objective = Objective(scheduler, make_tiny(3), 1.0)
        with pytest.raises(Stopped):
            loop.train(cut, objective, images, wanted, folder=tmp_path / "cut", start=start, advance=stop_after(stop))
        cut = make_tiny(seed=9)
    start = checkpoint.newest(tmp_path / "cut")
    assert start is not None
    assert start.step == 4
    objective = Objective(scheduler, make_tiny(3), 1.0)
    assert loop.train(cut, objective, images, wanted, folder=tmp_path / "cut", start=start) == losses
    assert same(weights(cut), weights(whole))
    assert {tensor.dtype for tensor in cut.state_dict().values()} == {torch.float32}


def test_the_scale_of_fp16_is_part_of_a_checkpoint(tmp_path: Path, make_tiny: Callable[..., Any]) -> None:
    # Half precision needs a GPU; its scaler does not.
    def parts(scale: float) -> tuple[Any, EMAModel, torch.optim.AdamW, torch.amp.GradScaler]:
        unet = make_tiny()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)
        return unet, EMAModel(unet.parameters()), torch.optim.AdamW(unet.parameters()), scaler

    stopped, resumed = parts(512.0), parts(4.0)
    stopped[3].load_state_dict(stopped[3].state_dict() | {"_growth_tracker": 5})
    checkpoint.save(tmp_path, checkpoint.Checkpoint(1, {}, [0.5], loop._state(*stopped)))
    start = checkpoint.newest(tmp_path)
    assert start is not None
    loop._restore(start, *resumed)
    assert resumed[3].state_dict() == stopped[3].state_dict()
    assert resumed[3].state_dict()["_growth_tracker"] == 5


def test_a_training_depends_on_nothing_drawn_before(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images
) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        unet = make_tiny()
        loop.train(unet, Objective(scheduler), images, RECIPE, folder=tmp_path / str(seed))
        found.append(weights(unet))
    assert same(*found)


def test_a_checkpoint_of_another_network_is_refused(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images
) -> None:
    with pytest.raises(Stopped):
        loop.train(make_tiny(), Objective(scheduler), images, RECIPE, folder=tmp_path, advance=stop_after(3))
    other = make_tiny(block_out_channels=(16,))
    with pytest.raises(DpctlError, match="another network"):
        loop.train(other, Objective(scheduler), images, RECIPE, folder=tmp_path, start=checkpoint.newest(tmp_path))


# --- the weights -------------------------------------------------------------------------------------------------


def test_the_weights_left_are_the_moving_average(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images
) -> None:
    unet = make_tiny()
    raw: list[dict[str, Tensor]] = [weights(unet)]
    loop.train(
        unet, Objective(scheduler), images, RECIPE, folder=tmp_path, advance=lambda *_, **__: raw.append(weights(unet))
    )
    assert len(raw) == RECIPE.steps + 1

    # EMA with warm-up: the first step takes the weights over, then the decay grows as 1 - (1 + t)^-3/4 to its limit.
    average = {name: tensor.double() for name, tensor in raw[0].items()}
    for step, now in enumerate(raw[1:]):
        decay = min(RECIPE.ema_decay, 1 - (1 + step) ** -0.75)
        average = {name: decay * average[name] + (1 - decay) * now[name].double() for name in average}
    left = weights(unet)
    for name, expected in average.items():
        torch.testing.assert_close(left[name].double(), expected, rtol=0, atol=1e-6)
    assert max(float((left[name] - raw[-1][name]).abs().max()) for name in left) > 1e-4


def test_without_decay_the_average_is_the_last_weight(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images
) -> None:
    unet = make_tiny()
    raw: list[dict[str, Tensor]] = []
    loop.train(
        unet,
        Objective(scheduler),
        images,
        recipe(ema_decay=0.0),
        folder=tmp_path,
        advance=lambda *_, **__: raw.append(weights(unet)),
    )
    for name, tensor in weights(unet).items():  # s - (s - w) is w up to rounding
        torch.testing.assert_close(tensor, raw[-1][name], rtol=0, atol=1e-6)


def test_training_lowers_the_loss_and_leaves_a_network_to_sample_with(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images
) -> None:
    unet = make_tiny()
    losses = loop.train(unet, Objective(scheduler), images, recipe(steps=60, batch_size=16), folder=tmp_path)
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert not unet.training
    assert type(unet).__name__ == "UNet2DModel"
    assert unet(torch.zeros(1, 1, 8, 8), 3).sample.dtype == torch.float32


def test_the_gradient_is_clipped(tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images) -> None:
    def moved(clip: float) -> float:
        unet = make_tiny()
        before = weights(unet)
        wanted = recipe(steps=1, warmup_steps=0, gradient_clip=clip, weight_decay=0.0)
        loop.train(unet, Objective(scheduler), images, wanted, folder=tmp_path)
        return max(float((after - before[name]).abs().max()) for name, after in weights(unet).items())

    # AdamW's first step is lr * g / (|g| + 1e-8): only a gradient far below 1e-8 makes it small.
    assert moved(1.0) == pytest.approx(1e-2, rel=0.01)
    assert moved(1e-12) < 1e-5


def test_two_trainings_of_different_precision_in_one_process(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images
) -> None:
    for precision in ("no", "bf16", "no"):
        wanted = recipe(mixed_precision=precision, steps=2)
        losses = loop.train(make_tiny(), Objective(scheduler), images, wanted, folder=tmp_path)
        assert all(map(math.isfinite, losses))


# --- divergence --------------------------------------------------------------------------------------------------


class NanFrom:
    """Images that are NaN from the nth batch on."""

    name = "broken"

    def __init__(self, images: Images, batch: int) -> None:
        self._images, self._left = images, batch

    def __len__(self) -> int:
        return len(self._images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        self._left -= 1
        return self._images.batch(indices) * (1.0 if self._left > 0 else math.nan)


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images
) -> None:
    with pytest.raises(DpctlError, match="not finite") as caught:
        loop.train(make_tiny(), Objective(scheduler), NanFrom(images, 4), recipe(checkpoint_every=1), folder=tmp_path)
    assert "step 4 of 6" in caught.value.got
    assert str(tmp_path) in caught.value.todo
    kept = checkpoint.newest(tmp_path)
    assert kept is not None
    assert kept.step == 3
    assert all(bool(tensor.isfinite().all()) for tensor in kept.tensors.values())


class NanGradient(Objective):
    """A finite loss whose gradient is not, from the third batch on."""

    def __call__(self, unet: Any, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        loss = super().__call__(unet, clean, noise, timesteps)
        self.scheduler.calls = getattr(self.scheduler, "calls", 0) + 1
        return loss + (0.0 * loss).sqrt() if self.scheduler.calls >= 3 else loss


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_a_checkpoint(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images
) -> None:
    with pytest.raises(DpctlError, match="not finite"):
        loop.train(make_tiny(), NanGradient(scheduler), images, recipe(checkpoint_every=1), folder=tmp_path)
    kept = checkpoint.newest(tmp_path)
    assert kept is not None
    assert kept.step == 2
    assert all(bool(tensor.isfinite().all()) for tensor in kept.tensors.values())


# --- what a step sees --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", [[1] * 12, [5, 7], [4, 4, 4]])
def test_what_sample_i_sees_does_not_depend_on_the_batch_size(scheduler: Any, images: Images, split: list[int]) -> None:
    whole = loop.draw(images, range(40, 52), RECIPE, scheduler)
    parts, first = [], 40
    for size in split:
        parts.append(loop.draw(images, range(first, first + size), RECIPE, scheduler))
        first += size
    for index, tensor in enumerate(whole):
        assert torch.equal(torch.cat([part[index] for part in parts]), tensor)


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 6), (12, 2)])
def test_a_step_takes_the_samples_after_those_of_the_step_before(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images, batch_size: int, steps: int
) -> None:
    seen: list[tuple[Tensor, ...]] = []

    class Watching(Objective):
        def __call__(self, unet: Any, *batch: Tensor) -> Tensor:
            seen.append(batch)
            return super().__call__(unet, *batch)

    loop.train(make_tiny(), Watching(scheduler), images, recipe(batch_size=batch_size, steps=steps), folder=tmp_path)
    for index, expected in enumerate(loop.draw(images, range(24), RECIPE, scheduler)):
        assert torch.equal(torch.cat([batch[index] for batch in seen]), expected)


def test_what_is_drawn_is_what_ddpm_draws(scheduler: Any, images: Images) -> None:
    _, noise, timesteps = loop.draw(images, range(2000), RECIPE, scheduler)
    assert (int(timesteps.min()), int(timesteps.max())) == (0, 99)
    assert float(timesteps.float().mean()) == pytest.approx(49.5, abs=2.0)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.01)
    # Timestep and noise are independent, and so are neighbours.
    assert abs(float(torch.corrcoef(torch.stack([timesteps.float(), noise[:, 0, 0, 0]]))[0, 1])) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1])) < 0.02


def test_about_half_of_the_images_are_flipped_and_none_without_flip(scheduler: Any, images: Images) -> None:
    plain = loop.draw(images, range(480), recipe(flip=False), scheduler)
    flipped = loop.draw(images, range(480), RECIPE, scheduler)
    upright = [torch.equal(a, b) for a, b in zip(plain[0], flipped[0], strict=True)]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain[0], flipped[0], strict=True)]
    assert all(one or other for one, other in zip(upright, mirrored, strict=True))
    assert 0.4 < sum(mirrored) / 480 < 0.6
    assert torch.equal(plain[1], flipped[1])
    assert torch.equal(plain[2], flipped[2])


@given(st.integers(0, 2**40), st.integers(1, 200), st.integers(0, 20))
def test_every_epoch_is_a_permutation(seed: int, size: int, epoch: int) -> None:
    places = [loop.shuffled_position(seed, epoch * size + place, size) for place in range(size)]
    assert sorted(places) == list(range(size))


def test_epochs_and_seeds_have_permutations_of_their_own() -> None:
    orders = {
        tuple(loop.shuffled_position(seed, epoch * 50 + place, 50) for place in range(50))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 6


def test_the_order_does_not_depend_on_what_was_asked_before() -> None:
    forward = [loop.shuffled_position(3, index, 7) for index in range(70)]
    backward = [loop.shuffled_position(3, index, 7) for index in reversed(range(70))]
    assert forward == backward[::-1]


# --- learning rate -----------------------------------------------------------------------------------------------


def test_the_learning_rate_warms_up_and_falls_as_a_cosine() -> None:
    wanted = SimpleNamespace(learning_rate=2.0, warmup_steps=4, steps=100)
    rates = [loop.learning_rate(step, wanted) for step in range(100)]  # type: ignore[arg-type]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0], rel=0.01)
    assert rates[50] == pytest.approx(1.0)
    assert rates[25] == pytest.approx(1 + math.cos(math.pi / 4))
    assert all(before > after > 0 for before, after in zip(rates[4:], rates[5:], strict=False))
    assert rates[99] < 0.001
    assert loop.learning_rate(0, recipe(warmup_steps=0)) == RECIPE.learning_rate


def test_the_learning_rate_is_the_optimizers(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: Images
) -> None:
    # AdamW's first step moves every weight with a gradient by the learning rate.
    unet = make_tiny()
    before = weights(unet)
    wanted = recipe(steps=1, warmup_steps=10, weight_decay=0.0)
    loop.train(unet, Objective(scheduler), images, wanted, folder=tmp_path)
    moved = max(float((after - before[name]).abs().max()) for name, after in weights(unet).items())
    assert moved == pytest.approx(loop.learning_rate(0, wanted), rel=0.01)


def test_a_fourier_embedding_is_never_asked_for_the_logarithm_of_zero(
    tmp_path: Path, make_tiny: Callable[..., Any], images: Images
) -> None:
    unet = make_tiny(time_embedding_type="fourier")
    losses = loop.train(unet, Objective(DDPMScheduler(num_train_timesteps=2)), images, RECIPE, folder=tmp_path)
    assert all(math.isfinite(loss) for loss in losses)
