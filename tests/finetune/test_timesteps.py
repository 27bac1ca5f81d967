"""Timesteps: by seed and global index alone, over the whole schedule, and weighted so that the mean stays the same."""

from collections import Counter

import pytest
import torch
from torch import Tensor

from dpctl.errors import DpctlError
from dpctl.finetune.timesteps import HISTORY, SAMPLINGS, UNIFORM, Importance, make_timesteps
from dpctl.recipe import TIMESTEP_SAMPLINGS

NAMES = tuple(SAMPLINGS)
MANY = range(40_000)


def loss_at(timesteps: Tensor) -> Tensor:
    """Return a loss that falls steeply, as that of a network which predicts the noise."""
    return 2.0 / (1.0 + timesteps.double())


def seen(found: Importance, steps: int = 40, batch: int = 64, seed: int = 7) -> Importance:
    """Let a sampling see `steps` batches of its own."""
    for step in range(steps):
        timesteps, _ = found.draw(seed, range(step * batch, (step + 1) * batch))
        found.observe(timesteps, loss_at(timesteps))
    return found


def is_warm(found: Importance) -> bool:
    return len(set(found.probabilities().tolist())) > 1


def test_the_recipe_knows_them_all() -> None:
    assert NAMES == TIMESTEP_SAMPLINGS


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("first", "total"), [(0, 1000), (1, 1000), (0, 2), (1, 2), (1, 97), (0, 1)])
def test_they_are_drawn_from_the_whole_schedule_alike(name: str, first: int, total: int) -> None:
    timesteps, weights = make_timesteps(name, first, total).draw(0, MANY)
    assert timesteps.dtype == torch.int64
    assert weights.tolist() == [1.0] * len(MANY)
    counts, expected = Counter(timesteps.tolist()), len(MANY) / (total - first)
    assert set(counts) == set(range(first, total))
    assert max(abs(count - expected) for count in counts.values()) < 6 * expected**0.5 + 1  # six deviations


@pytest.mark.parametrize("name", NAMES)
def test_a_draw_depends_on_the_seed_and_the_index_alone(name: str) -> None:
    whole, _ = make_timesteps(name, 0, 1000).draw(3, range(64))
    other = make_timesteps(name, 0, 1000)
    parts = [other.draw(3, rows)[0] for rows in (range(40, 64), range(9), range(9, 40))]
    assert torch.equal(torch.cat([parts[1], parts[2], parts[0]]), whole)
    assert not torch.equal(make_timesteps(name, 0, 1000).draw(4, range(64))[0], whole)
    assert make_timesteps(name, 0, 1000).draw(3, [])[0].shape == (0,)


@pytest.mark.parametrize("first", [0, 1])
def test_antithetic_pairs_are_mirror_images(first: int) -> None:
    timesteps, _ = make_timesteps("antithetic", first, 1000).draw(0, range(4096))
    assert set((timesteps[0::2] + timesteps[1::2]).tolist()) == {first + 999}
    assert len(set(timesteps.tolist())) > 900
    odd_first, _ = make_timesteps("antithetic", first, 1000).draw(0, range(1, 4096))
    assert torch.equal(odd_first, timesteps[1:])


# --- importance -----------------------------------------------------------------------------------------------------


def test_all_are_alike_until_every_part_of_the_schedule_has_its_history() -> None:
    found = Importance(0, 1000)
    timesteps = torch.arange(5, 1000, 10).repeat(HISTORY)  # one of every hundredth part
    found.observe(timesteps[:-1], loss_at(timesteps[:-1]))
    assert not is_warm(found)
    found.observe(timesteps[-1:], loss_at(timesteps[-1:]))
    assert is_warm(found)


@pytest.mark.parametrize(("first", "total"), [(0, 1000), (1, 1000), (1, 97), (0, 150)])
def test_the_probability_is_the_root_of_the_mean_squared_loss(first: int, total: int) -> None:
    found = Importance(first, total)
    losses = torch.rand(total, generator=torch.Generator().manual_seed(0)).double() + 0.1
    for scale in (9.0, *(1.0 + 0.1 * n for n in range(HISTORY))):  # the first is forgotten
        for t in range(first, total):
            found.observe(torch.tensor([t]), scale * losses[[t]])
    probabilities = found.probabilities()
    assert float(probabilities.sum()) == pytest.approx(1.0)
    if total - first <= 100:  # one part for every timestep
        expected = losses[first:] / losses[first:].sum()
        assert torch.allclose(probabilities, (1 - UNIFORM) * expected + UNIFORM / (total - first))
    assert float(probabilities.min()) >= UNIFORM / (total - first)


@pytest.mark.parametrize(("first", "total"), [(0, 1000), (1, 97)])
def test_the_weighted_loss_has_the_uniform_mean_and_varies_less(first: int, total: int) -> None:
    found = seen(Importance(first, total), steps=80)
    assert is_warm(found)
    timesteps, weights = found.draw(11, MANY)
    weighted, every = weights.double() * loss_at(timesteps), loss_at(torch.arange(first, total))
    error = float(weighted.std()) / len(MANY) ** 0.5
    assert abs(float(weighted.mean() - every.mean())) < 4 * error
    assert float(weighted.std()) < 0.5 * float(every.std())
    # And exactly: the sum over t of p(t) / (p(t) T) L(t).
    probabilities = found.probabilities()
    drawn_at = {int(t): float(w) for t, w in zip(timesteps, weights, strict=True)}
    assert all(
        weight == pytest.approx(1 / (float(probabilities[t - first]) * (total - first)), rel=1e-6)
        for t, weight in drawn_at.items()
    )


def test_timesteps_are_drawn_as_often_as_they_are_likely() -> None:
    found = seen(Importance(1, 41), steps=40)
    assert is_warm(found)
    timesteps, _ = found.draw(5, MANY)
    expected = found.probabilities() * len(MANY)
    counts = torch.bincount(timesteps, minlength=41)[1:]
    assert float(((counts - expected).abs() / expected.sqrt()).max()) < 5


def test_a_part_that_loses_nothing_is_not_forgotten() -> None:
    found = Importance(0, 10)
    for _ in range(HISTORY):
        found.observe(torch.arange(10), torch.tensor([1.0] * 9 + [0.0]))
    assert float(found.probabilities()[9]) == pytest.approx(UNIFORM / 10)
    assert 9 in found.draw(0, MANY)[0].tolist()
    nothing = Importance(0, 10)
    for _ in range(HISTORY):
        nothing.observe(torch.arange(10), torch.zeros(10))
    assert nothing.probabilities().tolist() == pytest.approx([0.1] * 10)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stop", [3, 50])
def test_restored_it_draws_what_it_would_have_drawn(name: str, stop: int) -> None:
    whole, stopped, resumed = (make_timesteps(name, 0, 1000) for _ in range(3))

    def run(found: object, steps: range) -> list[Tensor]:
        drawn = []
        for step in steps:
            timesteps, weights = found.draw(0, range(64 * step, 64 * step + 64))  # type: ignore[attr-defined]
            found.observe(timesteps, loss_at(timesteps))  # type: ignore[attr-defined]
            drawn += [timesteps, weights]
        return drawn

    expected = run(whole, range(stop + 40))
    assert len({float(weight) for weight in expected[-1]}) > 1 or name != "importance"
    run(stopped, range(stop))
    state = {key: value.clone() for key, value in stopped.state().items()}
    held = stopped.state()
    run(stopped, range(stop, stop + 5))  # what was handed out does not change any more
    assert all(torch.equal(held[key], state[key]) for key in state)
    resumed.restore(held)
    assert all(map(torch.equal, run(resumed, range(stop, stop + 40)), expected[2 * stop :]))
    assert all(torch.equal(held[key], state[key]) for key in state)


def test_an_unknown_sampling_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(DpctlError, match="unknown timestep sampling") as caught:
        make_timesteps("antithetical", 0, 1000)
    assert caught.value.got == "'antithetical'"
    assert caught.value.todo == "did you mean antithetic? choose one of: uniform, antithetic, importance"
