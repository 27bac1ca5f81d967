"""Choices and terms as arrays: what widths cost and are worth, and the best of them at a price. Pure: no torch."""

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from dpctl.prune.elimination import Table, find_order, maximise
from dpctl.prune.plan import Side
from dpctl.prune.terms import Choice, Term

# Worth that differs by less than this part of the whole's is the same: rounding.
SAME = 1e-12
# So many groups are in one table when all are chosen together; one with more neighbours left is held.
TABLE = 5
# Then so many widths of each group are looked at, as far as the entries of all tables go: some 10 ms.
OPTIONS = (16, 12, 8, 6, 4, 3)
ENTRIES = 1_000_000


class Point(NamedTuple):
    """A width for every group, `at` their indices [G], with what they cost and are worth."""

    cost: float
    worth: float
    at: np.ndarray


class Moves(NamedTuple):
    """Changes of one group each [M], ordered by group: to which width, by index, and what cost and worth gain by it."""

    group: np.ndarray
    to: np.ndarray
    cost: np.ndarray
    worth: np.ndarray


class Space:
    """G groups of at most K widths, T terms, and R rows: a group and a term that it is in."""

    def __init__(self, choices: Sequence[Choice], terms: Sequence[Term]) -> None:
        index = {choice.name: g for g, choice in enumerate(choices)}
        if len(index) < len(choices):
            raise ValueError("two choices have one name")
        # [G, K]; beyond a group's last width that again, and never worth anything.
        self.groups = np.arange(len(choices))
        self.last = np.array([len(choice.records) - 1 for choice in choices], int)
        shape = (len(choices), int(self.last.max(initial=0)) + 1)
        self.widths, self.worth = np.empty(shape), np.full(shape, -math.inf)
        for g, choice in enumerate(choices):
            self.widths[g] = choice.widths[choice.records[-1]]
            self.widths[g, : self.last[g] + 1] = [choice.widths[i] for i in choice.records]
            self.worth[g, : self.last[g] + 1] = [choice.worth[i] for i in choice.records]
        self.same = SAME * float((self.worth[self.groups, self.last] - self.worth[:, 0]).sum())
        self._read_terms(index, terms)
        self._find_classes()

    def _read_terms(self, index: dict[str, int], terms: Sequence[Term]) -> None:
        terms = sorted(terms, key=lambda term: (term.name, term.coefficients, term.steps))
        # A term without cost for every group, so that every group is in one.
        terms += [Term(name, Side(0, {name: 1}), Side(1)) for name in index]
        self.coefficients = np.array([term.coefficients for term in terms], float).reshape(-1, 4)
        # [2, T] and [2, R]: of inputs and outputs.
        self.steps = np.array([term.steps for term in terms], float).reshape(-1, 2).T
        sides = [[term.inputs for term in terms], [term.outputs for term in terms]]
        names = [
            (name, t)
            for t, pair in enumerate(zip(*sides, strict=True))
            for name in {**pair[0].repeats, **pair[1].repeats}
        ]
        names.sort(key=lambda pair: (index[pair[0]], pair[1]))
        self.group, self.term = np.array([(index[name], t) for name, t in names], int).reshape(-1, 2).T
        self.fixed = np.array([[side.fixed for side in each] for each in sides], float)
        self.repeats = np.array([[each[t].repeats.get(name, 0) for name, t in names] for each in sides], float)

    def _find_classes(self) -> None:
        rows: list[list[int]] = [[] for _ in self.coefficients]
        for row, term in enumerate(self.term.tolist()):
            rows[term].append(row)
        # [2, S]: the pairs of rows of one term.
        joined = [pair for members in rows for pair in itertools.combinations(members, 2)]
        self.joined = np.array(joined, int).reshape(-1, 2).T
        near: list[set[int]] = [set() for _ in self.groups]
        for one, other in self.group[self.joined].T.tolist():
            near[one].add(other)
            near[other].add(one)
        # Classes of groups that no term joins, the groups with the most neighbours first.
        classes = dict[int, int]()
        for g in sorted(range(len(near)), key=lambda g: -len(near[g])):
            taken = {classes.get(other) for other in near[g]}
            classes[g] = next(number for number in itertools.count() if number not in taken)
        numbers = np.array([classes[g] for g in range(len(near))], int)
        self.classes = [np.flatnonzero(numbers == number) for number in range(numbers.max(initial=-1) + 1)]
        # An order to choose all groups together in, and the terms of 1, 2, ... of them with the rows of these.
        self.order = find_order(near, TABLE - 1)
        self.held = np.isin(self.group, list(self.order.held))
        free = [[row for row in members if not self.held[row]] for members in rows]
        self.joint = [
            (np.array([t for t, _ in found], int), np.array([members for _, members in found], int).T)
            for number in range(1, TABLE + 1)
            if (found := [(t, members) for t, members in enumerate(free) if len(members) == number])
        ]
        sizes = (size for size in OPTIONS if self.order.entries(size) <= ENTRIES)
        self.options = min(next(sizes, OPTIONS[-1]), self.widths.shape[1])
        strides = itertools.takewhile(
            lambda n: n == 1 or n * self.options < 2 * self.widths.shape[1], (2**n for n in range(99))
        )
        self.strides = sorted(strides, reverse=True)

    def point(self, at: np.ndarray) -> Point:
        """Return the point of these indices [G]."""
        worth = math.fsum(self.worth[self.groups, at].tolist())
        return Point(self.cost_of(self.widths[self.groups, at]), worth, at)

    def cost_of(self, widths: np.ndarray) -> float:
        """Return what any widths [G] cost together."""
        return math.fsum(self._price(np.arange(len(self.coefficients)), self._sides(widths)).tolist())

    def _sides(self, widths: np.ndarray) -> np.ndarray:
        """Return the widths of all inputs and outputs [2, T]."""
        held = self.repeats * widths[self.group]
        return self.fixed + np.array([np.bincount(self.term, side, len(self.coefficients)) for side in held])

    def _price(self, terms: np.ndarray, sides: np.ndarray) -> np.ndarray:
        """Return what terms [N] cost at widths of their sides [2, N, ...]."""
        shape = (-1, *[1] * (sides.ndim - 2))
        base, per_input, per_output, per_product = self.coefficients[terms].T.reshape(4, *shape)
        steps = self.steps[:, terms].reshape(2, *shape)
        a, b = np.ceil(sides / steps) * steps
        return np.where((a > 0) & (b > 0), base + per_input * a + (per_output + per_product * a) * b, 0.0)

    def costs(self, groups: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Return what the terms of each group [N] cost at each of its widths [N, K], all other groups as they are."""
        first, end = np.searchsorted(self.group, groups), np.searchsorted(self.group, groups, "right")
        starts = np.cumsum(end - first) - (end - first)
        rows = np.repeat(first - starts, end - first) + np.arange((end - first).sum())
        widths = self.widths[self.groups, at]
        change = self.widths[self.group[rows]] - widths[self.group[rows], None]
        sides = self._sides(widths)[:, self.term[rows], None] + self.repeats[:, rows, None] * change
        return np.add.reduceat(self._price(self.term[rows], sides), starts, axis=0)

    def climb_alone(self, at: np.ndarray, price: float) -> np.ndarray:
        """Return the indices from `at` on at which no other width of one group gains worth - price * cost."""
        at, moved = at.copy(), True
        while moved:
            moved = False
            for groups in self.classes:
                value = self.worth[groups] - price * self.costs(groups, at)
                best = value.argmax(axis=1)
                gain = np.take_along_axis(value, np.stack([at[groups], best], 1), 1) @ [-1.0, 1.0]
                if (better := gain > self.same).any():
                    at[groups[better]], moved = best[better], True
        return at

    def climb_together(self, at: np.ndarray, price: float) -> np.ndarray:
        """Return the indices from `at` on where all groups but those held have taken what is best for them together.

        Of widths far apart first, then of closer ones; all of them at once where there are few.
        """
        for stride in self.strides:
            at = self.climb_alone(self._best_together(at, price, stride), price)
        return at

    def _best_together(self, at: np.ndarray, price: float, stride: int) -> np.ndarray:
        """Return the best of all indices that are near `at`, multiples of `stride` from it: exactly, at this price."""
        number = (self.last - at % stride) // stride + 1
        first = np.clip(at // stride - self.options // 2, 0, np.maximum(number - self.options, 0))
        place = first[:, None] + np.arange(self.options)
        options = np.where(place < number[:, None], (at % stride)[:, None] + place * stride, at[:, None])
        worth = np.where(place < number[:, None], np.take_along_axis(self.worth, options, 1), -math.inf)
        widths = np.take_along_axis(self.widths, options, 1)
        tables = [Table((g,), worth[g]) for g, _ in self.order.eliminated]
        fixed = self._sides(np.where(np.isin(self.groups, list(self.order.held)), self.widths[self.groups, at], 0.0))
        for terms, rows in self.joint:
            sides = fixed[:, terms].reshape(2, -1, *[1] * len(rows))
            for axis, row in enumerate(rows):
                shape = [self.options if other == axis else 1 for other in range(len(rows))]
                added = self.repeats[:, row, None] * widths[self.group[row]]
                sides = sides + added.reshape(2, -1, *shape)
            values = -price * self._price(terms, sides)
            tables += [Table(tuple(of), table) for of, table in zip(self.group[rows].T.tolist(), values, strict=True)]
        at = at.copy()
        for g, option in maximise(tables, self.order).items():
            at[g] = options[g, option]
        return at

    def moves(self, point: Point, price: float, most: int) -> Moves:
        """Return the changes of one group that lose least worth - price * cost, at most so many."""
        costs = self.costs(self.groups, point.at)
        cost = costs - costs[self.groups, point.at][:, None]
        worth = self.worth - self.worth[self.groups, point.at][:, None]
        loss = price * cost - worth
        loss[self.groups, point.at] = math.inf
        flat = np.sort(np.argsort(loss, axis=None, kind="stable")[: min(most, int(self.last.sum()))])
        group, to = np.unravel_index(flat, loss.shape)
        return Moves(group, to, cost[group, to], worth[group, to])

    def together(self, point: Point, moves: Moves) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pairs of moves [P] whose groups share a term, and what both cost there beyond the sum of the two."""
        first, end = np.searchsorted(moves.group, self.groups), np.searchsorted(moves.group, self.groups, "right")
        number = end - first
        one, other = self.group[self.joined]
        pairs = number[one] * number[other]
        which = np.repeat(np.arange(len(pairs)), pairs)
        place = np.arange(len(which)) - np.repeat(np.cumsum(pairs) - pairs, pairs)
        i = first[one[which]] + place // number[other[which]]
        j = first[other[which]] + place % number[other[which]]
        # [2, P]: what either move adds to the two sides of the term that both are in.
        widths = self.widths[self.groups, point.at]
        added = [
            self.repeats[:, rows[which]] * (self.widths[moves.group[m], moves.to[m]] - widths[moves.group[m]])
            for rows, m in zip(self.joined, (i, j), strict=True)
        ]
        terms = self.term[self.joined[0][which]]
        now = self._sides(widths)[:, terms]
        both = self._price(terms, now + added[0] + added[1]) + self._price(terms, now)
        return i, j, both - self._price(terms, now + added[0]) - self._price(terms, now + added[1])
