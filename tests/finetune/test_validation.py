"""The loss on images held out: its buckets against the denoising loss, its place in a run, and the early stop."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dpctl.data import TrainingSet
from dpctl.diffusion import denoising_loss, noise_for
from dpctl.errors import DpctlError
from dpctl.finetune import checkpoint, loop, train
from dpctl.finetune.loss import Objective
from dpctl.finetune.processes import open_accelerator
from dpctl.finetune.validation import BUCKETS, Validation, has_stalled, is_best
from dpctl.recipe import LoopRecipe, TrainRecipe


def entries(*losses: float) -> list[dict[str, Any]]:
    return [{"loss": loss} for loss in losses]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_bucket_is_the_denoising_loss_at_its_timesteps(
    make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet, batch_size: int
) -> None:
    unet, positions = make_tiny(), [5, 9, 2, 40, 11]
    validate = Validation(images, positions, scheduler, 0, batch_size, seed=3)
    found = validate(unet, "cpu")
    clean = images.plain(positions).clean
    for bucket in range(BUCKETS):
        timesteps = torch.tensor([validate.timestep(row, bucket) for row in range(5)])
        assert all(bucket * 100 // BUCKETS <= t <= (bucket + 1) * 100 // BUCKETS for t in timesteps.tolist())
        noise = noise_for(3 + bucket, range(5), clean.shape[1:], "validate")
        with torch.no_grad():
            expected = denoising_loss(unet.eval(), scheduler, clean, noise, timesteps).mean()
        assert float(found[bucket]) == pytest.approx(float(expected), rel=1e-5)


def test_validating_changes_nothing_of_the_training(
    tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    found = []
    for every in (1, 100):
        recipe = LoopRecipe(steps=5, batch_size=4, validation=6, validate_every=every)
        unet = make_tiny()
        state = loop.train(
            unet,
            Objective(scheduler),
            images,
            recipe,
            accelerator=open_accelerator(recipe),
            folder=tmp_path / str(every),
        )
        found.append((state, unet.state_dict()))
    (often, one), (once, other) = found
    assert [each["step"] for each in often.validated] == [1, 2, 3, 4, 5]
    assert [each["step"] for each in once.validated] == [5]  # the end is always judged
    assert often.validated[-1] == once.validated[-1]
    assert often.losses == once.losses
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_resumed_run_knows_what_was_validated(
    tmp_path: Path, training: Callable[..., TrainRecipe], stopping: Any
) -> None:
    recipe = training(steps=6, validation=8, validate_every=2, checkpoint_every=1, patience=9)
    whole = train(tmp_path / "whole", recipe)
    with stopping(5) as bar:
        train(tmp_path / "out", recipe, bar=bar)
    kept = checkpoint.newest(tmp_path / "out.checkpoints")
    assert kept is not None
    assert [each["step"] for each in kept.validated] == [2, 4]
    resumed = train(tmp_path / "out", recipe, resume=True)
    assert whole is not None
    assert resumed is not None
    assert resumed.stats["validated"] == whole.stats["validated"]
    assert resumed.files == whole.files


def test_a_training_that_gets_no_better_ends_at_its_best(tmp_path: Path, training: Callable[..., TrainRecipe]) -> None:
    # Steps far too large: the held-out loss rises sooner or later, long before the end.
    values = {"batch_size": 4, "learning_rate": 3e-2, "warmup_steps": 1, "ema_decay": 0.0, "checkpoint_every": 1000}
    recipe = training(**values, steps=400, validation=8, validate_every=2, patience=3)
    manifest = train(tmp_path / "out", recipe)
    assert manifest is not None
    validated = manifest.stats["validated"]
    losses = [each["loss"] for each in validated]
    assert manifest.stats["steps"] < 400
    best = losses.index(min(losses))
    assert best == len(losses) - 4
    # The weights are those of the best validation: as those of a run that ended there.
    at_best = loss_of(tmp_path / "out", recipe)
    assert at_best == pytest.approx(losses[best], rel=1e-5)


def loss_of(directory: Path, recipe: TrainRecipe) -> float:
    """Return the validation loss of what a run left, with the run's held-out images."""
    from dpctl.data import Pixels, open_data
    from dpctl.finetune.draws import Draws
    from dpctl.models import load_model

    model = load_model(directory)
    examples = Pixels(open_data(recipe.data, channels=1, size=(8, 8)), flip=recipe.flip)
    held_out = Draws(examples, recipe).held_out()
    return float(Validation(examples, held_out, model.scheduler, 0, 4, recipe.seed)(model.unet, "cpu").mean())


@pytest.mark.parametrize(
    ("losses", "patience", "stalled"),
    [
        ((3.0, 2.0, 1.0), 2, False),
        ((1.0, 2.0, 3.0), 2, True),
        ((1.0, 2.0, 3.0), 3, False),
        ((1.0, 2.0, 0.9), 2, False),
        ((1.0, 1.0, 1.0), 2, True),
        ((1.0, 2.0, 3.0), 0, False),
        ((), 1, False),
    ],
)
def test_it_has_stalled_when_none_of_the_last_is_lower(losses: Any, patience: int, stalled: bool) -> None:
    assert has_stalled(entries(*losses), patience) is stalled


def test_the_best_is_lower_than_all_before() -> None:
    assert is_best(entries(2.0))
    assert is_best(entries(2.0, 1.0))
    assert not is_best(entries(1.0, 1.0))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"validation": 48}, "nothing is left to train on"),
        ({"patience": 2}, "needs images to judge by"),
        ({"validation": -1}, "validation is out of range"),
        ({"validate_every": 0}, "a count is below 1"),
    ],
)
def test_what_cannot_be_validated_is_refused(
    tmp_path: Path, training: Callable[..., TrainRecipe], changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(DpctlError, match=message):
        train(tmp_path / "out", training(**changed))
    assert list(tmp_path.iterdir()) == []
