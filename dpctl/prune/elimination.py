"""Maximise a sum of tables of few variables each, exactly. Pure: numpy, no torch.

Nonserial dynamic programming (Bertelè and Brioschi, Academic Press, 1972): one variable after another is maximised out
of the sum of the tables that it is in, which leaves one table of its neighbours. A UNet's skip connections and
shortcuts make cycles, but its groups can be taken in an order in which no table has more than five variables.
"""

from collections.abc import Iterable, Sequence
from functools import reduce
from typing import NamedTuple

import numpy as np


class Table(NamedTuple):
    """Values [N, ...] over variables, an axis each."""

    variables: tuple[int, ...]
    values: np.ndarray


class Order(NamedTuple):
    """Variables in the order they are eliminated in, each with the neighbours it has left by then, and the others.

    Those are too entangled: they are held at a value.
    """

    eliminated: tuple[tuple[int, tuple[int, ...]], ...]
    held: frozenset[int]

    def entries(self, size: int) -> int:
        """Return how many entries all tables have where each variable takes so many values."""
        return sum(size ** (1 + len(others)) for _, others in self.eliminated)


def find_order(neighbours: Sequence[Iterable[int]], width: int) -> Order:
    """Return an order in which no variable has more than `width` neighbours left: the least entangled first."""
    left = {v: set(others) for v, others in enumerate(neighbours)}
    eliminated: list[tuple[int, set[int]]] = []
    held: set[int] = set()
    while left:
        v = min(left, key=lambda v: len(left[v]))
        if len(left[v]) > width:
            v = max(left, key=lambda v: len(left[v]))
            held.add(v)
        else:
            eliminated.append((v, left[v]))
            for other in left[v]:
                left[other] |= left[v] - {other}
        for other in left[v]:
            left[other].discard(v)
        del left[v]
    return Order(tuple((v, tuple(sorted(others - held))) for v, others in eliminated), frozenset(held))


def maximise(tables: Iterable[Table], order: Order) -> dict[int, int]:
    """Return the value of every eliminated variable, by index, at which the sum of the tables is largest.

    Every variable is in a table, and no table has variables that are held. Ties go to the lower index.
    """
    turn = {v: number for number, (v, _) in enumerate(order.eliminated)}
    buckets: list[list[Table]] = [[] for _ in turn]
    for table in tables:
        buckets[min(turn[v] for v in table.variables)].append(table)
    best: list[np.ndarray] = []
    for (v, others), bucket in zip(order.eliminated, buckets, strict=True):
        total = reduce(np.add, (_spread(table, (*others, v)) for table in bucket))
        best.append(total.argmax(axis=-1))
        if others:
            buckets[min(turn[other] for other in others)].append(Table(others, total.max(axis=-1)))
    chosen: dict[int, int] = {}
    for (v, others), found in zip(reversed(order.eliminated), reversed(best), strict=True):
        # An axis of length 1 says that the neighbour does not matter.
        at = tuple(chosen[other] if size > 1 else 0 for other, size in zip(others, found.shape, strict=True))
        chosen[v] = int(found[at])
    return chosen


def _spread(table: Table, variables: Sequence[int]) -> np.ndarray:
    """Return the values with an axis for each of these variables, of length 1 where the table lacks it."""
    axes = sorted(range(len(table.variables)), key=lambda axis: variables.index(table.variables[axis]))
    values = table.values.transpose(axes)
    lengths = iter(values.shape)
    return values.reshape([next(lengths) if v in table.variables else 1 for v in variables])
