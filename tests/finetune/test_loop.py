"""The training loop: stopped anywhere and resumed it is the same training; its EMA weights are what it leaves."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from dpctl.data import Batch, Images, Pixels, TrainingSet
from dpctl.errors import DpctlError
from dpctl.finetune import checkpoint, loop
from dpctl.finetune.loss import Objective
from dpctl.finetune.processes import open_accelerator
from dpctl.finetune.state import Ema, State
from dpctl.finetune.timesteps import make_timesteps
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


def fit(unet: Any, objective: Objective, examples: TrainingSet, recipe: LoopRecipe, **more: Any) -> list[float]:
    """Train in this process and return the loss of every step."""
    return loop.train(unet, objective, examples, recipe, accelerator=open_accelerator(recipe), **more).losses


def weights(unet: Any) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in unet.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


# --- stop and resume ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 2, 4])
@pytest.mark.parametrize("stop", range(1, 7))
def test_stopped_at_any_step_and_resumed_is_never_having_stopped(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet, stop: int, every: int
) -> None:
    whole, cut = make_tiny(), make_tiny()
    wanted = recipe(checkpoint_every=every)
    losses = fit(whole, Objective(scheduler), images, wanted, folder=tmp_path / "whole")
    with pytest.raises(Stopped):
        fit(cut, Objective(scheduler), images, wanted, folder=tmp_path / "cut", advance=stop_after(stop))

    start = checkpoint.newest(tmp_path / "cut")
    assert (start.step if start else 0) == min(stop, 5) // every * every
    again = make_tiny() if start is None else make_tiny(seed=9)  # nothing but the checkpoint decides
    assert fit(again, Objective(scheduler), images, wanted, folder=tmp_path / "cut", start=start) == losses
    assert same(weights(again), weights(whole))


def test_stopped_and_resumed_twice_with_a_teacher_and_bf16(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    wanted = recipe(mixed_precision="bf16", checkpoint_every=1)
    whole, cut = make_tiny(), make_tiny()
    losses = fit(whole, Objective(scheduler, make_tiny(3), distillation=1.0), images, wanted, folder=tmp_path / "whole")
    for stop in (2, 2):
        start = checkpoint.newest(tmp_path / "cut")
        objective = Objective(scheduler, make_tiny(3), distillation=1.0)
        with pytest.raises(Stopped):
            fit(cut, objective, images, wanted, folder=tmp_path / "cut", start=start, advance=stop_after(stop))
        cut = make_tiny(seed=9)
    start = checkpoint.newest(tmp_path / "cut")
    assert start is not None
    assert start.step == 4
    objective = Objective(scheduler, make_tiny(3), distillation=1.0)
    assert fit(cut, objective, images, wanted, folder=tmp_path / "cut", start=start) == losses
    assert same(weights(cut), weights(whole))
    assert {tensor.dtype for tensor in cut.state_dict().values()} == {torch.float32}


def test_the_scale_of_fp16_is_part_of_a_checkpoint(tmp_path: Path, make_tiny: Callable[..., Any]) -> None:
    # Half precision needs a GPU; its scaler does not.
    def state(scale: float) -> State:
        unet = make_tiny()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=7)
        ema = Ema(unet, 0.9, on_cpu=False)
        return State(unet, torch.optim.AdamW(unet.parameters()), scaler, make_timesteps("uniform", 0, 100), ema)

    stopped, resumed = state(512.0), state(4.0)
    stopped.scaler.load_state_dict(stopped.scaler.state_dict() | {"_growth_tracker": 5})
    checkpoint.save(tmp_path, stopped.checkpoint({}, None))
    start = checkpoint.newest(tmp_path)
    assert start is not None
    resumed.restore(start)
    assert resumed.scaler.state_dict() == stopped.scaler.state_dict()
    assert resumed.scaler.state_dict()["_growth_tracker"] == 5


def test_a_training_depends_on_nothing_drawn_before(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        unet = make_tiny()
        fit(unet, Objective(scheduler), images, RECIPE, folder=tmp_path / str(seed))
        found.append(weights(unet))
    assert same(*found)


def test_a_checkpoint_of_another_network_is_refused(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    with pytest.raises(Stopped):
        fit(make_tiny(), Objective(scheduler), images, RECIPE, folder=tmp_path, advance=stop_after(3))
    other = make_tiny(block_out_channels=(16,))
    with pytest.raises(DpctlError, match="another network"):
        fit(other, Objective(scheduler), images, RECIPE, folder=tmp_path, start=checkpoint.newest(tmp_path))


# --- the weights -------------------------------------------------------------------------------------------------


def test_the_weights_left_are_the_moving_average(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    unet = make_tiny()
    raw: list[dict[str, Tensor]] = [weights(unet)]
    fit(unet, Objective(scheduler), images, RECIPE, folder=tmp_path, advance=lambda *_, **__: raw.append(weights(unet)))
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
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    unet = make_tiny()
    raw: list[dict[str, Tensor]] = []
    fit(
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
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    unet = make_tiny()
    losses = fit(unet, Objective(scheduler), images, recipe(steps=60, batch_size=16), folder=tmp_path)
    assert len(losses) == 60
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert not unet.training
    assert type(unet).__name__ == "UNet2DModel"
    assert unet(torch.zeros(1, 1, 8, 8), 3).sample.dtype == torch.float32


def test_the_gradient_is_clipped(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    def moved(clip: float) -> float:
        unet = make_tiny()
        before = weights(unet)
        wanted = recipe(steps=1, warmup_steps=0, gradient_clip=clip, weight_decay=0.0)
        fit(unet, Objective(scheduler), images, wanted, folder=tmp_path)
        return max(float((after - before[name]).abs().max()) for name, after in weights(unet).items())

    # AdamW's first step is lr * g / (|g| + 1e-8): only a gradient far below 1e-8 makes it small.
    assert moved(1.0) == pytest.approx(1e-2, rel=0.01)
    assert moved(1e-12) < 1e-5


def test_two_trainings_of_different_precision_in_one_process(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    for precision in ("no", "bf16", "no"):
        wanted = recipe(mixed_precision=precision, steps=2)
        losses = fit(make_tiny(), Objective(scheduler), images, wanted, folder=tmp_path)
        assert all(map(math.isfinite, losses))


# --- divergence --------------------------------------------------------------------------------------------------


class NanFrom(Pixels):
    """Images that are NaN from the nth batch on."""

    def __init__(self, images: Images, batch: int) -> None:
        super().__init__(images)
        self._left = batch

    def batch(self, positions: Sequence[int], generators: Sequence[torch.Generator]) -> Batch:
        self._left -= 1
        return Batch(super().batch(positions, generators).clean * (1.0 if self._left > 0 else math.nan))


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, plain_images: Images
) -> None:
    with pytest.raises(DpctlError, match="not finite") as caught:
        fit(make_tiny(), Objective(scheduler), NanFrom(plain_images, 4), recipe(checkpoint_every=1), folder=tmp_path)
    assert "step 4 of 6" in caught.value.got
    assert str(tmp_path) in caught.value.todo
    kept = checkpoint.newest(tmp_path)
    assert kept is not None
    assert kept.step == 3
    assert all(bool(tensor.isfinite().all()) for tensor in kept.tensors.values())


class NanGradient(Objective):
    """A finite loss whose gradient is not, from the third batch on."""

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        loss = super().total(terms)
        self.scheduler.calls = getattr(self.scheduler, "calls", 0) + 1
        return loss + (0.0 * loss).sqrt() if self.scheduler.calls >= 3 else loss


def test_a_gradient_that_is_not_finite_stops_before_it_reaches_a_checkpoint(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    with pytest.raises(DpctlError, match="not finite"):
        fit(make_tiny(), NanGradient(scheduler), images, recipe(checkpoint_every=1), folder=tmp_path)
    kept = checkpoint.newest(tmp_path)
    assert kept is not None
    assert kept.step == 2
    assert all(bool(tensor.isfinite().all()) for tensor in kept.tensors.values())


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
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    # AdamW's first step moves every weight with a gradient by the learning rate.
    unet = make_tiny()
    before = weights(unet)
    wanted = recipe(steps=1, warmup_steps=10, weight_decay=0.0)
    fit(unet, Objective(scheduler), images, wanted, folder=tmp_path)
    moved = max(float((after - before[name]).abs().max()) for name, after in weights(unet).items())
    assert moved == pytest.approx(loop.learning_rate(0, wanted), rel=0.01)


def test_a_fourier_embedding_is_never_asked_for_the_logarithm_of_zero(
    tmp_path: Path, make_tiny: Callable[..., Any], images: TrainingSet
) -> None:
    unet = make_tiny(time_embedding_type="fourier")
    losses = fit(unet, Objective(DDPMScheduler(num_train_timesteps=2)), images, RECIPE, folder=tmp_path)
    assert all(math.isfinite(loss) for loss in losses)
