"""Widths that keep the most importance within a budget. Pure: numpy, no torch.

What a layer costs is a product of the widths of its two sides, so this is no plain knapsack. Maximise
worth - price * cost instead (generalized Lagrange multipliers: Everett, Operations Research 11(3), 1963): what is best
at a price is best for what it costs. Two such solutions, one within the budget and one beyond it, give the next price,
the slope of the line between them, until none lies above that line. Were the neighbours of every group of a second
kind, a minimum cut would solve this inner problem; but a shortcut makes a triangle of its block's groups. It is solved
by coordinate ascent (iterated conditional modes: Besag, JRSS B 48(3), 1986) from both solutions, all groups at once
that no layer joins. What of the budget is left then goes by changes of one group or two from either solution; looked
at are those of least Lagrangian loss (the core of a knapsack: Balas and Zemel, Operations Research 28(5), 1980).

The result is monotone in the budget: each step finds points from the two that enclose the budget alone, takes only
what lies between them in cost and in worth, and lets the budget say no more than which neighbours to go on with.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from dpctl.errors import DpctlError
from dpctl.prune.plan import Network, Side

# So many changes of one group are looked at in pairs: 2 million pairs, a tenth of a second.
CORE = 2000
# Where networks are small, so many pairs of changes are looked at after a first one each.
PAIRS = 4_000_000
# Worth that differs by less than this part of the whole's is the same: rounding.
SAME = 1e-12


@dataclass(frozen=True)
class Term:
    """What one layer costs: base + per_input * a + per_output * b + per_product * a * b.

    a and b are the widths of its two sides, rounded up to multiples of `step`: kernels work in blocks of channels. A
    layer with a side of width 0 is gone and costs nothing. No coefficient is negative: wider is never cheaper.
    """

    name: str
    inputs: Side
    outputs: Side
    base: float = 0.0
    per_input: float = 0.0
    per_output: float = 0.0
    per_product: float = 0.0
    step: int = 1

    def __post_init__(self) -> None:
        if not all(0.0 <= value < math.inf for value in self.coefficients) or self.step < 1:
            raise ValueError(f"{self.name}: coefficients {self.coefficients}, step {self.step}")

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """The four coefficients, in the order of the fields."""
        return self.base, self.per_input, self.per_output, self.per_product


@dataclass(frozen=True)
class Choice:
    """The widths that one group may take, ascending, and what each is worth: the importance kept.

    Worth need not be concave. 0 may be among the widths: a branch that goes altogether.
    """

    name: str
    widths: tuple[int, ...]
    worth: tuple[float, ...]

    def __post_init__(self) -> None:
        ascending = all(a < b for a, b in itertools.pairwise(self.widths))
        finite = all(math.isfinite(value) for value in self.worth)
        if not self.widths or self.widths[0] < 0 or len(self.widths) != len(self.worth) or not ascending or not finite:
            raise ValueError(f"{self.name}: widths {self.widths}, worth {self.worth}")

    @property
    def records(self) -> list[int]:
        """The widths, by index, that are worth more than every narrower one: only those can be best."""
        best = itertools.accumulate(self.worth, max, initial=-math.inf)
        return [i for i, (value, before) in enumerate(zip(self.worth, best, strict=False)) if value > before]

    @property
    def widest(self) -> int:
        """The widest of the widths, by index, that are worth most."""
        return max(range(len(self.widths)), key=lambda i: (self.worth[i], i))


def terms_of(network: Network, measure: str) -> list[Term]:
    """Return the network's ``"macs"`` or ``"params"`` as terms; layers that cost nothing of it are left out."""
    terms = []
    for layer in network.layers:
        product = layer.kernel * (layer.positions if measure == "macs" else 1)
        vectors = layer.vectors if measure == "params" else 0
        # The inputs of a norm, or of a layer that is all vectors, are no side of its own.
        inputs = layer.inputs if product and (layer.inputs.fixed or layer.inputs.repeats) else layer.outputs
        product = product if inputs is layer.inputs else 0
        if product or vectors:
            terms.append(Term(layer.name, inputs, layer.outputs, per_output=vectors, per_product=product))
    return terms


def allocate(choices: Sequence[Choice], terms: Sequence[Term], budget: float) -> dict[str, int]:
    """Return the width of every group: together worth the most that was found for a cost of at most `budget`.

    Everything whole where the budget allows that. A larger budget is never worth less; neither the order nor the units
    of choices and terms matter. Raises a DpctlError where no widths are within the budget.
    """
    choices = sorted(choices, key=lambda choice: choice.name)
    space = _Space(choices, terms)
    widest = {choice.name: choice.widths[choice.widest] for choice in choices}
    whole = space.cost_of(np.array(list(widest.values()), float))
    if whole <= budget:
        return widest
    least, most = space.point(np.zeros_like(space.last)), space.point(space.last)
    if not least.cost <= budget:
        raise DpctlError(
            "the budget cannot be met",
            f"{budget} of {whole}; the floor, the least that any widths cost, is {least.cost}",
            "allow the floor or more, or narrower widths",
        )
    found = most if most.cost <= budget else _close_in(space, least, most, budget)
    return {choice.name: choice.widths[choice.records[i]] for choice, i in zip(choices, found.at, strict=True)}


class _Point(NamedTuple):
    """A width for every group, `at` their indices [G], with what they cost and are worth."""

    cost: float
    worth: float
    at: np.ndarray


class _Moves(NamedTuple):
    """Changes of one group each [M], ordered by group: to which width, by index, and what cost and worth gain by it."""

    group: np.ndarray
    to: np.ndarray
    cost: np.ndarray
    worth: np.ndarray


class _Space:
    """Choices and terms as arrays: G groups of at most K widths, T terms, R pairs of a group and a term it is in."""

    def __init__(self, choices: Sequence[Choice], terms: Sequence[Term]) -> None:
        # [G, K]; beyond a group's last width that again, and never worth anything.
        self.last = np.array([len(choice.records) - 1 for choice in choices], int)
        shape = (len(choices), int(self.last.max(initial=0)) + 1)
        self.widths, self.worth = np.empty(shape), np.full(shape, -math.inf)
        for g, choice in enumerate(choices):
            self.widths[g] = choice.widths[choice.records[-1]]
            self.widths[g, : self.last[g] + 1] = [choice.widths[i] for i in choice.records]
            self.worth[g, : self.last[g] + 1] = [choice.worth[i] for i in choice.records]
        self.groups = np.arange(len(choices))
        self.same = SAME * float((self.worth[self.groups, self.last] - self.worth[:, 0]).sum())
        self._read_terms({choice.name: g for g, choice in enumerate(choices)}, terms)
        self._find_neighbours()

    def _read_terms(self, index: dict[str, int], terms: Sequence[Term]) -> None:
        if len(index) < len(self.groups):
            raise ValueError("two choices have one name")
        terms = sorted(terms, key=lambda term: (term.name, term.coefficients, term.step))
        # A term without cost for every group, so that every group is in one.
        terms += [Term(name, Side(0, {name: 1}), Side(1)) for name in index]
        self.coefficients = np.array([term.coefficients for term in terms], float).reshape(-1, 4)
        self.steps = np.array([term.step for term in terms], float)
        pairs = sorted(
            {(index[name], t) for t, term in enumerate(terms) for name in (*term.inputs.repeats, *term.outputs.repeats)}
        )
        names = list(index)
        self.group, self.term = np.array(pairs, int).reshape(-1, 2).T
        # [2, T] and [2, R]: inputs and outputs.
        both = [[term.inputs for term in terms], [term.outputs for term in terms]]
        self.fixed = np.array([[side.fixed for side in sides] for sides in both], float)
        self.repeats = np.array([[sides[t].repeats.get(names[g], 0) for g, t in pairs] for sides in both], float)

    def _find_neighbours(self) -> None:
        rows: dict[int, list[int]] = {}
        for row, term in enumerate(self.term.tolist()):
            rows.setdefault(term, []).append(row)
        # [2, S]: the pairs of rows of one term.
        joined = [pair for members in rows.values() for pair in itertools.combinations(members, 2)]
        self.joined = np.array(joined, int).reshape(-1, 2).T
        near: list[set[int]] = [set() for _ in self.groups]
        for one, other in self.group[self.joined].T.tolist():
            near[one].add(other)
            near[other].add(one)
        # Classes of groups without a common term, the groups with the most neighbours first.
        colour = dict[int, int]()
        for g in sorted(range(len(near)), key=lambda g: -len(near[g])):
            taken = {colour.get(other) for other in near[g]}
            colour[g] = next(c for c in itertools.count() if c not in taken)
        classes = [[g for g in colour if colour[g] == c] for c in range(len(set(colour.values())))]
        self.classes = [np.array(sorted(members), int) for members in classes]

    def point(self, at: np.ndarray) -> _Point:
        """Return the point of these indices [G]."""
        worth = math.fsum(self.worth[self.groups, at].tolist())
        return _Point(self.cost_of(self.widths[self.groups, at]), worth, at)

    def cost_of(self, widths: np.ndarray) -> float:
        """Return what widths [G] cost, of whatever value."""
        return math.fsum(self._price(np.arange(len(self.steps)), *self._both_sides(widths)).tolist())

    def _both_sides(self, widths: np.ndarray) -> np.ndarray:
        """Return the widths of all inputs and outputs [2, T]."""
        held = self.repeats * widths[self.group]
        return self.fixed + np.array([np.bincount(self.term, side, len(self.steps)) for side in held])

    def _price(self, terms: np.ndarray, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Return what terms [N] cost at widths of their sides [N, ...]."""
        shape = (-1, *[1] * (inputs.ndim - 1))
        base, per_input, per_output, per_product = self.coefficients[terms].T.reshape(4, *shape)
        step = self.steps[terms].reshape(shape)
        a, b = np.ceil(inputs / step) * step, np.ceil(outputs / step) * step
        return np.where((a > 0) & (b > 0), base + per_input * a + (per_output + per_product * a) * b, 0.0)

    def costs(self, groups: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Return what the terms of each group [N] cost at each of its widths [N, K], all other groups as they are."""
        first, end = np.searchsorted(self.group, groups), np.searchsorted(self.group, groups, "right")
        starts = np.cumsum(end - first) - (end - first)
        rows = np.repeat(first - starts, end - first) + np.arange((end - first).sum())
        widths = self.widths[self.groups, at]
        change = self.widths[self.group[rows]] - widths[self.group[rows], None]
        sides = self._both_sides(widths)[:, self.term[rows], None] + self.repeats[:, rows, None] * change
        return np.add.reduceat(self._price(self.term[rows], *sides), starts, axis=0)

    def climb(self, at: np.ndarray, price: float) -> np.ndarray:
        """Return the indices from `at` on at which no change of one group or two gains worth - price * cost."""
        at = self._climb_alone(at, price)
        while True:
            point = _Point(0.0, 0.0, at)
            moves = self.moves(point, price)
            i, j, extra = self.together(point, moves)
            gain = moves.worth - price * moves.cost
            gains = gain[i] + gain[j] - price * extra
            if not len(gains) or gains.max() <= self.same:
                return at
            at, pair = at.copy(), [m[gains.argmax()] for m in (i, j)]
            at[moves.group[pair]] = moves.to[pair]
            at = self._climb_alone(at, price)

    def _climb_alone(self, at: np.ndarray, price: float) -> np.ndarray:
        """Return the indices from `at` on at which no change of one group gains worth - price * cost."""
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

    def moves(self, point: _Point, price: float) -> _Moves:
        """Return the CORE changes of one group that lose least worth - price * cost."""
        costs = self.costs(self.groups, point.at)
        cost = costs - costs[self.groups, point.at][:, None]
        worth = self.worth - self.worth[self.groups, point.at][:, None]
        loss = price * cost - worth
        loss[self.groups, point.at] = math.inf
        flat = np.sort(np.argsort(loss, axis=None, kind="stable")[: min(CORE, int(self.last.sum()))])
        return _Moves(*np.unravel_index(flat, loss.shape), cost.flat[flat], worth.flat[flat])

    def together(self, point: _Point, moves: _Moves) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return pairs of moves [P] and what two at once cost more than the sum of the two, where they share terms."""
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
        now = self._both_sides(widths)[:, terms]
        both = self._price(terms, *(now + added[0] + added[1])) + self._price(terms, *now)
        return i, j, both - self._price(terms, *(now + added[0])) - self._price(terms, *(now + added[1]))


# Two points closer to the budget than those before, within it and beyond it, where there are such.
Found = tuple[_Point | None, _Point | None]


def _close_in(space: _Space, low: _Point, high: _Point, budget: float) -> _Point:
    """Return the best found for a budget between the costs of two points, of which `high` is worth more."""
    while True:
        price = (high.worth - low.worth) / (high.cost - low.cost)
        for closer in (_climbed, _changed):
            found = closer(space, low, high, price, budget)
            if found != (None, None):
                break
        else:
            return low
        low, high = found[0] or low, found[1] or high


def _climbed(space: _Space, low: _Point, high: _Point, price: float, budget: float) -> Found:
    """Return the points closer to the budget that coordinate ascent finds from both."""
    points = [space.point(space.climb(start.at, price)) for start in (low, high)]
    return _choose(points, space.same, low, high, budget)


def _changed(space: _Space, low: _Point, high: _Point, price: float, budget: float) -> Found:
    """Return the points closer to the budget that differ from either by the widths of one group or two.

    Where networks are small, of three: two after the first one, as many of these as `PAIRS` goes.
    """
    pools = []
    for point in (low, high):
        pools.append(_Pool(space, point, low, high, price))
        moves = pools[-1].moves
        for move in np.argsort(price * moves.cost - moves.worth, kind="stable")[: PAIRS // len(moves.to) ** 2]:
            at = point.at.copy()
            at[moves.group[move]] = moves.to[move]
            pools.append(_Pool(space, space.point(at), low, high, price))
    cost, worth = (np.concatenate([getattr(pool, name) for pool in pools]) for name in ("cost", "worth"))
    ends = np.cumsum([len(pool.cost) for pool in pools])
    points = []
    for place in _around(cost, worth, space.same, low, high, budget):
        if place is not None:
            pool = pools[which := int(np.searchsorted(ends, place, "right"))]
            points.append(space.point(pool.changed(place - int(ends[which]))))
    return _choose(points, space.same, low, high, budget)  # by what they cost without the rounding of sums


class _Pool:
    """The points between two others that differ from `start` by the widths of one group or two."""

    def __init__(self, space: _Space, start: _Point, low: _Point, high: _Point, price: float) -> None:
        self.start, self.moves = start, space.moves(start, price)
        # [1 + M]: the first move is none.
        group = np.concatenate([[-1], self.moves.group])
        cost, worth = np.concatenate([[0.0], self.moves.cost]), np.concatenate([[0.0], self.moves.worth])
        costs, worths = start.cost + cost[:, None] + cost, start.worth + worth[:, None] + worth
        i, j, extra = space.together(start, self.moves)
        np.add.at(costs, (i + 1, j + 1), extra)
        costs[group[:, None] >= group] = math.inf  # each pair once, and no group twice
        self.places = np.argwhere((costs < high.cost) & (low.worth < worths) & (worths < high.worth))
        self.cost, self.worth = costs[tuple(self.places.T)], worths[tuple(self.places.T)]

    def changed(self, number: int) -> np.ndarray:
        """Return the indices [G] of one of these points."""
        at = self.start.at.copy()
        moves = self.places[number][self.places[number] > 0] - 1
        at[self.moves.group[moves]] = self.moves.to[moves]
        return at


def _choose(points: Sequence[_Point], same: float, low: _Point, high: _Point, budget: float) -> Found:
    """Return the two of these points that are next to the budget and closer to it than `low` and `high`."""
    cost, worth = (np.array([getattr(point, name) for point in points]) for name in ("cost", "worth"))
    below, above = _around(cost, worth, same, low, high, budget)
    return None if below is None else points[below], None if above is None else points[above]


def _around(
    cost: np.ndarray, worth: np.ndarray, same: float, low: _Point, high: _Point, budget: float
) -> tuple[int | None, int | None]:
    """Return which of the candidates [N] are next to the budget, within it and beyond it.

    Candidates count that are worth more than `low` and less than `high`, and cheaper than that. Of those that no
    cheaper one matches in worth the two are neighbours.
    """
    inside = np.flatnonzero((cost < high.cost) & (low.worth + same < worth) & (worth + same < high.worth))
    cost, worth = cost[inside], worth[inside]
    within = np.flatnonzero(cost <= budget)
    below = within[np.lexsort((cost[within], -worth[within]))[:1]]
    least = worth[below].max(initial=low.worth)
    beyond = np.flatnonzero((cost > budget) & (worth > least + same))
    above = beyond[np.lexsort((-worth[beyond], cost[beyond]))[:1]]
    return int(inside[below[0]]) if len(below) else None, int(inside[above[0]]) if len(above) else None
