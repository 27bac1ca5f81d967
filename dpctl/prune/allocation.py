"""Widths that keep the most importance within a budget. Pure: numpy, no torch.

What a layer costs is a product of the widths of its two sides, so this is no plain knapsack. Maximise
worth - price * cost instead (generalized Lagrange multipliers: Everett, Operations Research 11(3), 1963): what is best
at a price is best for what it costs. Two such solutions, one within the budget and one beyond it, give the next price,
the slope of the line between them, until none lies above that line.

Were the groups of two kinds, with layers between those only, a minimum cut would solve this inner problem; but a
shortcut makes a triangle of its block's groups. Coordinate ascent from both solutions (iterated conditional modes:
Besag, JRSS B 48(3), 1986) stops where two or three groups would have to change at once, which cost `reference` up to
0.15 % of the worth. So elimination.py goes on from there with all groups together: exactly where there are few widths.

What of the budget is left then goes by changes of one group or two from either solution; looked at are those of least
Lagrangian loss (the core of a knapsack: Balas and Zemel, Operations Research 28(5), 1980).

The result is monotone in the budget: each step finds points from the two that enclose the budget alone, takes only
what lies between them in worth, and lets the budget say no more than which neighbours to go on with. The price of that
is that an exchange is left where it would beat what was found for a larger budget: on entangled networks, some
1e-8 of the worth.
"""

import math
from collections.abc import Sequence

import numpy as np

from dpctl.errors import OutOfReach
from dpctl.prune.space import Point, Space
from dpctl.prune.terms import Choice, Term

# So many changes of one group are looked at in pairs: half a million of these take some 20 ms.
CORE = 1000
# Where networks are small, so many pairs of changes are looked at after a first one each.
PAIRS = 4_000_000


def allocate(choices: Sequence[Choice], terms: Sequence[Term], budget: float) -> dict[str, int]:
    """Return the width of every group: together worth the most that was found for a cost of at most `budget`.

    Everything whole where the budget allows that. A larger budget is never worth less; neither the order nor the units
    of choices and terms matter. Raises OutOfReach where no widths are within the budget.
    """
    choices = sorted(choices, key=lambda choice: choice.name)
    space = Space(choices, terms)
    widest = {choice.name: choice.widths[choice.widest] for choice in choices}
    whole = space.cost_of(np.array(list(widest.values()), float))
    if whole <= budget:
        return widest
    least, most = space.point(np.zeros_like(space.last)), space.point(space.last)
    if not least.cost <= budget:
        raise OutOfReach(
            "the budget cannot be met",
            f"{budget} of {whole}; the floor, the least that any widths cost, is {least.cost}",
            "allow the floor or more, or narrower widths",
            least.cost,
        )
    found = most if most.cost <= budget else _close_in(space, least, most, budget)
    return {choice.name: choice.widths[choice.records[i]] for choice, i in zip(choices, found.at, strict=True)}


# Two points closer to the budget than those before, within it and beyond it, where there are such.
Found = tuple[Point | None, Point | None]


def _close_in(space: Space, low: Point, high: Point, budget: float) -> Point:
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


def _climbed(space: Space, low: Point, high: Point, price: float, budget: float) -> Found:
    """Return the point closer to the budget that ascent finds: alone from both, and together from the better one."""
    points = [space.point(space.climb_alone(start.at, price)) for start in (low, high)]
    better = max(points, key=lambda point: point.worth - price * point.cost)
    return _choose([space.point(space.climb_together(better.at, price))], space.same, low, high, budget)


def _changed(space: Space, low: Point, high: Point, price: float, budget: float) -> Found:
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

    def __init__(self, space: Space, start: Point, low: Point, high: Point, price: float) -> None:
        self.start, self.moves = start, space.moves(start, price, CORE)
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


def _choose(points: Sequence[Point], same: float, low: Point, high: Point, budget: float) -> Found:
    """Return the two of these points that are next to the budget and closer to it than `low` and `high`."""
    cost, worth = (np.array([getattr(point, name) for point in points]) for name in ("cost", "worth"))
    below, above = _around(cost, worth, same, low, high, budget)
    return None if below is None else points[below], None if above is None else points[above]


def _around(
    cost: np.ndarray, worth: np.ndarray, same: float, low: Point, high: Point, budget: float
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
