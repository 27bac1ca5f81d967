"""Which samples a step takes, and which of them this process: functions of the step and the global sample index.

A step takes the same images, flips, noise and timesteps however many processes and parts it is divided among, so a run
can move from one machine to several, and back.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from dpctl.data import Batch, TrainingSet
from dpctl.diffusion import noise_for, sample_generator
from dpctl.errors import DpctlError
from dpctl.recipe import LoopRecipe


@dataclass(frozen=True)
class Part:
    """What one forward and backward pass takes: rows `start` to `stop` of the step's batch."""

    start: int
    stop: int
    last: bool  # of this process in this step: the gradients are exchanged after it


@dataclass(frozen=True)
class Split:
    """How the batch of a step is divided: among processes first, then into parts one after the other."""

    batch_size: int
    accumulation: int = 1
    rank: int = 0
    processes: int = 1

    def check(self) -> None:
        """Raise a DpctlError where a part would be empty."""
        if self.batch_size < self.processes * self.accumulation:
            raise DpctlError(
                "the batch is smaller than its parts",
                f"{self.batch_size} images for {self.processes} process(es) with {self.accumulation} part(s) each",
                "give a larger --batch-size, which counts the images of all processes, or a lower --accumulation",
            )

    def parts(self) -> list[Part]:
        """Return the parts of this process, as equal as can be."""
        count, first = self.processes * self.accumulation, self.rank * self.accumulation
        bounds = [number * self.batch_size // count for number in range(count + 1)]
        ours = range(first, first + self.accumulation)
        return [Part(bounds[n], bounds[n + 1], last=n == ours[-1]) for n in ours]


@dataclass(frozen=True)
class Draws:
    """The data of every step: images in an order of their own for every epoch, `held_out` ones never."""

    examples: TrainingSet
    recipe: LoopRecipe

    @property
    def trained_on(self) -> int:
        """Return how many samples are not held out."""
        return len(self.examples) - self.recipe.validation

    def indices(self, step: int, part: Part) -> range:
        """Return the global sample indices of a part of a step."""
        first = step * self.recipe.batch_size
        return range(first + part.start, first + part.stop)

    def draw(self, step: int, part: Part) -> tuple[Batch, Tensor]:
        """Return the samples of a part of a step, and noise of their shape."""
        indices, seed = self.indices(step, part), self.recipe.seed
        order = _permutation(seed, -1, len(self.examples))  # those held out are its end
        positions = [int(order[shuffled_position(seed, index, self.trained_on)]) for index in indices]
        batch = self.examples.batch(positions, [sample_generator(seed, index, "data") for index in indices])
        return batch, noise_for(seed, indices, batch.clean.shape[1:], "train")

    def held_out(self) -> list[int]:
        """Return the positions of the samples that validation takes and training does not."""
        order: list[int] = _permutation(self.recipe.seed, -1, len(self.examples)).tolist()
        return order[self.trained_on :]

    @contextmanager
    def ahead(self, first: int, parts: Sequence[Part]) -> Iterator[Iterator[tuple[Batch, Tensor]]]:
        """Open the stream of draws from step `first` on; the next is drawn while the caller computes on this one."""
        wanted = ((step, part) for step in range(first, self.recipe.steps) for part in parts)
        with ThreadPoolExecutor(1, thread_name_prefix="data") as pool:

            def stream() -> Iterator[tuple[Batch, Tensor]]:
                coming: Future[tuple[Batch, Tensor]] | None = None
                for step, part in wanted:
                    found, coming = coming, pool.submit(self.draw, step, part)
                    if found is not None:
                        yield found.result()
                if coming is not None:
                    yield coming.result()

            yield stream()


def shuffled_position(seed: int, index: int, size: int) -> int:
    """Return the image that global sample `index` reads: every epoch is a permutation of its own."""
    epoch, place = divmod(index, size)
    return int(_permutation(seed, epoch, size)[place])


_last: dict[tuple[int, int, int], Tensor] = {}


def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    key = (seed, epoch, size)
    if key not in _last:
        # A batch can straddle two epochs, and epoch -1 is asked for beside: three permutations are worth keeping.
        for old in list(_last)[:-2]:
            _last.pop(old, None)
        _last[key] = torch.randperm(size, generator=sample_generator(seed, epoch, "epoch"))
    return _last[key]
