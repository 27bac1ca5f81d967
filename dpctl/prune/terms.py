"""What planning trades: the widths that groups may take with their worth, and what layers cost at them."""

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dpctl.prune.plan import Layer, Side


@dataclass(frozen=True)
class Term:
    """What one layer costs: base + per_input * a + per_output * b + per_product * a * b.

    a and b are the widths of its two sides, each rounded up to multiples of its step: kernels work in blocks of
    channels. A layer with a side of width 0 is gone and costs nothing. No coefficient is negative: wider is never
    cheaper. A layer may have several terms.
    """

    name: str
    inputs: Side
    outputs: Side
    base: float = 0.0
    per_input: float = 0.0
    per_output: float = 0.0
    per_product: float = 0.0
    steps: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        if not all(0.0 <= value < math.inf for value in self.coefficients) or min(self.steps) < 1:
            raise ValueError(f"{self.name}: coefficients {self.coefficients}, steps {self.steps}")

    def cost(self, widths: Mapping[str, int]) -> float:
        """Return what the layer costs at these widths."""
        sides = zip((self.inputs, self.outputs), self.steps, strict=True)
        a, b = (rounded(side.width(widths), step) for side, step in sides)
        return self.base + self.per_input * a + self.per_output * b + self.per_product * a * b if a and b else 0.0

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        """The four coefficients, in the order of the fields."""
        return self.base, self.per_input, self.per_output, self.per_product


def rounded(width: Any, step: int) -> Any:
    """Return a width, or an array of them, rounded up to a multiple of `step`."""
    return -(-width // step) * step


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


def gated(term: Term, layer: Layer) -> Term:
    """Return the term of a layer with a fixed input as one that is gone with the branch that it is in.

    Its input becomes the branch's own width, of which only counts whether there is any: the price at the fixed input
    goes over into the other coefficients.
    """
    branches = [name for name in layer.needs if name not in term.outputs.repeats]
    if not branches or term.inputs.repeats:
        return term
    a = rounded(term.inputs.fixed, term.steps[0])
    base, per_output = term.base + term.per_input * a, term.per_output + term.per_product * a
    gate = Side(0, {branches[-1]: 1})
    return replace(term, inputs=gate, base=base, per_output=per_output, per_input=0.0, per_product=0.0)
