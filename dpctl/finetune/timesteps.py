"""Which timestep each sample of a step is noised to: a function of the seed, its global index and what was seen."""

import hashlib
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dpctl import registry

# Of importance sampling: parts of the schedule with one estimate each, losses that an estimate is made of (the paper's
# number), and the fraction that is drawn uniformly, so that no part is ever forgotten (the paper's code takes 0.001:
# there one sample can weigh as much as 1,000 others).
BUCKETS = 100
HISTORY = 10
UNIFORM = 0.01


class Timesteps(Protocol):
    """A way to draw timesteps. Its state is part of a checkpoint."""

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return the timesteps [B], int64, of global sample indices, and the weight [B] of each one's loss."""

    def observe(self, timesteps: Tensor, losses: Tensor) -> None:
        """Take in the loss [B] that each timestep [B] of a whole step had, over all processes."""

    def state(self) -> dict[str, Tensor]:
        """Return what a resumed run needs."""

    def restore(self, state: dict[str, Tensor]) -> None:
        """Go on from what `state` returned."""


class Uniform:
    """Every timestep from `first` on alike."""

    def __init__(self, first: int, total: int) -> None:
        self._first, self._total = first, total

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        timesteps = _evenly(_places(seed, indices), self._first, self._total)
        return torch.from_numpy(timesteps), torch.ones(len(timesteps))

    def observe(self, timesteps: Tensor, losses: Tensor) -> None:
        """Learn nothing."""

    def state(self) -> dict[str, Tensor]:
        return {}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Nothing to restore."""


class Antithetic(Uniform):
    """Samples 2k and 2k + 1 take t and its mirror image, T - 1 - t: every pair is spread over the schedule.

    As the training code of DDIM and Diff-Pruning does, which mirrors one half of a batch onto the other.
    """

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        timesteps = _evenly(_places(seed, [index // 2 for index in indices]), self._first, self._total)
        mirrored = self._first + self._total - 1 - timesteps
        odd = np.array([index % 2 for index in indices], dtype=bool)
        return torch.from_numpy(np.where(odd, mirrored, timesteps)), torch.ones(len(timesteps))


class Importance:
    """p(t) as the root of the mean squared loss there, p normalised; a sample's loss weighs 1 / (p T).

    Nichol and Dhariwal, *Improved DDPM* (arXiv 2102.09672, section 3.3): of all ways to draw t, the one whose weighted
    loss varies least; its mean is the uniform one's. The mean is of the last losses of each part of the
    schedule; until every part has its history, all timesteps are alike.
    """

    def __init__(self, first: int, total: int) -> None:
        self._first, self._total = first, total
        count = total - first
        buckets = min(BUCKETS, count)
        self._bucket = np.arange(count) * buckets // count  # of timestep first + i
        self._history = np.zeros((buckets, HISTORY))
        self._seen = np.zeros(buckets, dtype=np.int64)

    def probabilities(self) -> Tensor:
        """Return the probability of every timestep from the first on."""
        return torch.from_numpy(self._probabilities())

    def draw(self, seed: int, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        probabilities = self._probabilities()
        bounds = probabilities.cumsum()
        found = np.searchsorted(bounds, _places(seed, indices) * bounds[-1], side="right")
        found = found.clip(max=len(bounds) - 1)  # where the product is rounded up
        weights = 1.0 / (probabilities[found] * len(probabilities))
        return torch.from_numpy(found + self._first), torch.from_numpy(weights).float()

    def observe(self, timesteps: Tensor, losses: Tensor) -> None:
        buckets = self._bucket[timesteps.cpu().numpy() - self._first]
        for bucket, loss in zip(buckets.tolist(), losses.tolist(), strict=True):
            self._history[bucket, self._seen[bucket] % HISTORY] = loss
            self._seen[bucket] += 1

    def state(self) -> dict[str, Tensor]:
        return {"history": torch.from_numpy(self._history.copy()), "seen": torch.from_numpy(self._seen.copy())}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._history, self._seen = state["history"].numpy().copy(), state["seen"].numpy().copy()

    def _probabilities(self) -> np.ndarray:
        count = len(self._bucket)
        even = np.full(count, 1.0 / count)
        moments = np.sqrt((self._history**2).mean(1))[self._bucket]
        if self._seen.min() < HISTORY or moments.sum() == 0.0:
            return even
        return (1.0 - UNIFORM) * moments / moments.sum() + UNIFORM * even


def _places(seed: int, indices: Sequence[int]) -> np.ndarray:
    """Return a number in [0, 1) for each global sample index.

    A hash alone: what a generator needs to be set up is more than a timestep is worth.
    """
    digests = [hashlib.blake2b(f"timestep/{seed}/{index}".encode(), digest_size=8).digest() for index in indices]
    return (np.frombuffer(b"".join(digests), dtype="<u8") >> np.uint64(11)) * 2.0**-53


def _evenly(places: np.ndarray, first: int, total: int) -> np.ndarray:
    return first + (places * (total - first)).astype(np.int64)


SAMPLINGS: dict[str, Callable[[int, int], Timesteps]] = {
    "uniform": Uniform,
    "antithetic": Antithetic,
    "importance": Importance,
}


def make_timesteps(name: str, first: int, total: int) -> Timesteps:
    """Return the sampling of this name over the timesteps first ... total - 1; a DpctlError for an unknown name."""
    return SAMPLINGS[registry.choose(tuple(SAMPLINGS), name, "timestep sampling")](first, total)
