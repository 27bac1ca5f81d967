"""What a step sees: the same samples however the batch is divided, in an order of its own for every epoch."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dpctl.data import Images, Pixels, TrainingSet
from dpctl.errors import DpctlError
from dpctl.finetune.draws import Draws, Part, Split, shuffled_position
from dpctl.finetune.timesteps import make_timesteps
from dpctl.recipe import LoopRecipe

RECIPE = LoopRecipe(steps=6, batch_size=12)


def draws(examples: TrainingSet, **changed: Any) -> Draws:
    return Draws(examples, dataclasses.replace(RECIPE, **changed))


def drawn(found: Draws, steps: int = 1) -> tuple[Tensor, Tensor]:
    """Return the clean samples and the noise of the first steps, in one process."""
    (part,) = Split(found.recipe.batch_size).parts()
    rows = [found.draw(step, part) for step in range(steps)]
    return torch.cat([batch.clean for batch, _ in rows]), torch.cat([noise for _, noise in rows])


@pytest.mark.parametrize(("processes", "accumulation"), [(1, 12), (1, 5), (2, 1), (3, 2), (5, 2)])
def test_a_step_is_the_same_however_it_is_divided(images: TrainingSet, processes: int, accumulation: int) -> None:
    found = draws(images)
    whole = found.draw(3, Part(0, 12, last=True))
    rows: list[tuple[Tensor, Tensor]] = []
    for rank in range(processes):
        parts = Split(12, accumulation, rank, processes).parts()
        assert [part.last for part in parts] == [False] * (accumulation - 1) + [True]
        rows += [(batch.clean, noise) for batch, noise in (found.draw(3, part) for part in parts)]
    assert torch.equal(torch.cat([clean for clean, _ in rows]), whole[0].clean)
    assert torch.equal(torch.cat([noise for _, noise in rows]), whole[1])
    assert {len(clean) for clean, _ in rows} <= {12 // len(rows), -(-12 // len(rows))}


@given(st.integers(1, 9), st.integers(1, 5), st.integers(0, 50))
def test_parts_cover_the_batch_without_overlap(processes: int, accumulation: int, more: int) -> None:
    size = processes * accumulation + more
    splits = [Split(size, accumulation, rank, processes) for rank in range(processes)]
    parts = [part for split in splits for part in split.parts()]
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(size))
    assert all(part.stop > part.start for part in parts)
    for split in splits:
        split.check()


def test_a_batch_smaller_than_its_parts_is_refused() -> None:
    with pytest.raises(DpctlError, match="smaller than its parts") as caught:
        Split(7, 4, 0, 2).check()
    assert "7 images for 2 process(es) with 4 part(s)" in caught.value.got


@pytest.mark.parametrize(("batch_size", "steps"), [(4, 6), (8, 3), (24, 1)])
def test_a_step_takes_the_samples_after_those_of_the_step_before(
    images: TrainingSet, batch_size: int, steps: int
) -> None:
    one, other = drawn(draws(images, batch_size=24)), drawn(draws(images, batch_size=batch_size), steps)
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1], other[1])


def test_what_is_drawn_ahead_is_what_is_drawn(images: TrainingSet) -> None:
    found = draws(images, steps=4)
    parts = Split(12, 2).parts()
    with found.ahead(1, parts) as stream:
        seen = list(stream)
    expected = [found.draw(step, part) for step in (1, 2, 3) for part in parts]
    assert len(seen) == len(expected) == 6
    for (batch, noise), (wanted, wanted_noise) in zip(seen, expected, strict=True):
        assert torch.equal(batch.clean, wanted.clean)
        assert torch.equal(noise, wanted_noise)


def test_what_fails_while_drawing_ahead_reaches_the_caller(plain_images: Images) -> None:
    class Broken(Pixels):
        def batch(self, positions: Sequence[int], generators: Sequence[torch.Generator]) -> Any:
            raise DpctlError("an image cannot be read", "7.png", "repair it")

    with (
        pytest.raises(DpctlError, match="cannot be read"),
        draws(Broken(plain_images)).ahead(0, Split(12).parts()) as stream,
    ):
        next(stream)


def test_noise_and_timesteps_are_what_ddpm_draws(images: TrainingSet) -> None:
    _, noise = drawn(draws(images, batch_size=2000))
    timesteps, weights = make_timesteps("uniform", 0, 100).draw(0, range(2000))
    assert (int(timesteps.min()), int(timesteps.max())) == (0, 99)
    assert float(timesteps.float().mean()) == pytest.approx(49.5, abs=2.0)
    assert set(weights.tolist()) == {1.0}
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.01)
    assert float(noise.std()) == pytest.approx(1.0, abs=0.01)
    # Timestep and noise are independent, and so are neighbours.
    assert abs(float(torch.corrcoef(torch.stack([timesteps.float(), noise[:, 0, 0, 0]]))[0, 1])) < 0.1
    assert abs(float(torch.corrcoef(torch.stack([noise[:-1].flatten(), noise[1:].flatten()]))[0, 1])) < 0.02


def test_about_half_of_the_images_are_flipped_and_none_without_flip(plain_images: Images) -> None:
    plain, flipped = (drawn(draws(Pixels(plain_images, flip=flip), batch_size=480)) for flip in (False, True))
    upright = [torch.equal(a, b) for a, b in zip(plain[0], flipped[0], strict=True)]
    mirrored = [torch.equal(a.flip(-1), b) for a, b in zip(plain[0], flipped[0], strict=True)]
    assert all(one or other for one, other in zip(upright, mirrored, strict=True))
    assert 0.4 < sum(mirrored) / 480 < 0.6
    assert torch.equal(plain[1], flipped[1])


def test_what_is_held_out_is_never_trained_on(plain_images: Images) -> None:
    found = draws(Pixels(plain_images, flip=False), validation=10, batch_size=38)
    held_out = plain_images.batch(found.held_out())
    assert len(held_out) == 10
    seen, _ = drawn(found, steps=3)
    for image in seen:
        assert not any(torch.equal(image, other) for other in held_out)
    rest = [place for place in range(48) if place not in found.held_out()]
    epochs = [seen[first : first + 38] for first in (0, 38, 76)]
    for epoch in epochs:  # each of the others once
        assert sorted(float(image.sum()) for image in epoch) == sorted(
            float(image.sum()) for image in plain_images.batch(rest)
        )
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(epochs, 2))


@given(st.integers(0, 2**40), st.integers(1, 200), st.integers(0, 20))
def test_every_epoch_is_a_permutation(seed: int, size: int, epoch: int) -> None:
    places = [shuffled_position(seed, epoch * size + place, size) for place in range(size)]
    assert sorted(places) == list(range(size))


def test_epochs_and_seeds_have_permutations_of_their_own() -> None:
    orders = {
        tuple(shuffled_position(seed, epoch * 50 + place, 50) for place in range(50))
        for seed in (0, 1)
        for epoch in (0, 1, 2)
    }
    assert len(orders) == 6


def test_the_order_does_not_depend_on_what_was_asked_before() -> None:
    forward = [shuffled_position(3, index, 7) for index in range(70)]
    backward = [shuffled_position(3, index, 7) for index in reversed(range(70))]
    assert forward == backward[::-1]
