"""The allocation: against every combination where there are few, and what must hold where there are many."""

import itertools
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest

from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.prune.allocation import allocate
from dpctl.prune.elimination import Table, find_order, maximise
from dpctl.prune.plan import Layer, Network, Side, Span, best, widths_for_target
from dpctl.prune.target import trace
from dpctl.prune.terms import Choice, Term
from dpctl.recipe import PruneRecipe

Problem = tuple[list[Choice], list[Term]]
TermsOf = Callable[[Network, str], list[Term]]


def cost_of(terms: Sequence[Term], widths: Mapping[str, int]) -> float:
    """The cost by the words of Term's docstring."""
    total = 0.0
    for term in terms:
        a, b = term.inputs.width(widths), term.outputs.width(widths)
        if a and b:
            a, b = (math.ceil(width / step) * step for width, step in zip((a, b), term.steps, strict=True))
            total += term.base + term.per_input * a + term.per_output * b + term.per_product * a * b
    return total


def worth_of(choices: Sequence[Choice], widths: Mapping[str, int]) -> float:
    return math.fsum(choice.worth[choice.widths.index(widths[choice.name])] for choice in choices)


def every(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Cost and worth of every combination."""
    choices, terms = problem
    names = [choice.name for choice in choices]
    found = [dict(zip(names, widths, strict=True)) for widths in itertools.product(*(c.widths for c in choices))]
    return np.array([cost_of(terms, w) for w in found]), np.array([worth_of(choices, w) for w in found])


def small(seed: int) -> tuple[Problem, float]:
    """3 to 6 groups of 2 to 5 widths, 0 among some, terms of any kind between any sides, and how much is allowed."""
    draw = random.Random(seed)
    choices = []
    for g in range(draw.randint(3, 6)):
        widths = sorted(draw.sample(range(0 if draw.random() < 0.3 else 1, 17), draw.randint(2, 5)))
        gains = (draw.random() ** draw.choice([1, 3]) for _ in widths)
        choices.append(Choice(f"g{g}", tuple(widths), tuple(itertools.accumulate(gains))))

    def side() -> Side:
        if draw.random() < 0.1:
            return Side(3)
        repeats: dict[str, int] = {}
        for _ in range(draw.choice([1, 1, 1, 2, 3])):
            name = draw.choice(choices).name
            repeats[name] = repeats.get(name, 0) + 1
        return Side(draw.choice([0, 0, 0, 3]), repeats)

    def coefficients() -> list[int]:
        return [*(draw.choice([0, draw.randint(0, 20)]) for _ in range(3)), draw.randint(0, 9)]

    number = draw.randint(len(choices), 3 * len(choices))
    steps = (1, 1, 4, 8)
    terms = [
        Term(f"t{t}", side(), side(), *coefficients(), (draw.choice(steps), draw.choice(steps))) for t in range(number)
    ]
    return (choices, terms), draw.random()


def large(seed: int, groups: int = 1000) -> Problem:
    """Groups of 2 to 32 widths in which each layer joins groups that are near one another, three layers a group."""
    draw = random.Random(seed)
    choices = []
    for g in range(groups):
        number, step = draw.randint(2, 32), 8 * draw.randint(1, 4)
        scores = sorted((draw.random() ** 3 * draw.choice([0.3, 1.0, 2.0]) for _ in range(number)), reverse=True)
        widths = tuple(step * (i + 1) for i in range(number))
        choices.append(Choice(f"g{g:04d}", widths, tuple(itertools.accumulate(scores))))
    terms = []
    for t in range(3 * groups):
        middle = draw.randrange(groups)
        near = [choices[min(groups - 1, max(0, middle + draw.randint(-10, 10)))].name for _ in range(3)]
        inputs = Side(0, dict.fromkeys(near[: draw.choice([1, 1, 1, 2])], 1))
        product = draw.choice([1, 9]) * draw.choice([1, 4, 16])
        outputs, vectors, step = Side(0, {near[2]: 1}), draw.randint(0, 500), draw.choice([1, 8, 16])
        terms.append(Term(f"t{t:04d}", inputs, outputs, per_output=vectors, per_product=product, steps=(step, step)))
    return choices, terms


# --- against every combination -----------------------------------------------------------------------------------


def test_few_groups_get_what_is_best_of_all_combinations() -> None:
    shares = []
    for seed in range(200):
        problem, allowed = small(seed)
        costs, worths = every(problem)
        budget = math.floor(costs.min() + allowed * (costs.max() - costs.min()))
        widths = allocate(*problem, budget)
        assert cost_of(problem[1], widths) <= budget
        shares.append(worth_of(problem[0], widths) / worths[costs <= budget].max())
    print(f"optimal: {np.mean(np.array(shares) > 1 - 1e-9):.1%} of {len(shares)}, least share {min(shares):.4f}")
    # All of these 200 are; of the first 2,000 seeds 1,999, and 0.998 of the worth in the one that is left.
    assert np.mean(np.array(shares) > 1 - 1e-9) >= 0.995
    assert min(shares) > 0.998


@pytest.mark.parametrize("seed", range(4))
def test_a_larger_budget_is_never_worth_less(seed: int) -> None:
    problem, _ = small(seed)
    costs = np.unique(every(problem)[0])
    budgets = sorted({*costs[:: max(1, len(costs) // 40)], *np.linspace(costs[0], costs[-1], 40)})
    worths = [worth_of(problem[0], allocate(*problem, budget)) for budget in budgets]
    assert worths == sorted(worths)
    assert worths[0] < worths[-1]


def test_a_larger_budget_is_never_worth_less_in_a_network_of_many() -> None:
    problem = large(3, groups=40)
    whole = cost_of(problem[1], {choice.name: choice.widths[-1] for choice in problem[0]})
    worths = [worth_of(problem[0], allocate(*problem, (0.3 + 0.001 * i) * whole)) for i in range(12)]
    assert worths == sorted(worths)
    assert worths[0] < worths[-1]


# --- what makes no difference ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(10, 20))
def test_neither_order_nor_units_make_a_difference(seed: int) -> None:
    (choices, terms), allowed = small(seed)
    costs, _ = every((choices, terms))
    budget = math.floor(costs.min() + allowed * (costs.max() - costs.min()))
    widths = allocate(choices, terms, budget)
    assert allocate(choices, terms, budget) == widths
    assert allocate(choices[::-1], terms[::-1], budget) == widths
    # Powers of two round nothing; other factors may turn a tie.
    coefficients = ("base", "per_input", "per_output", "per_product")
    for factor in (2.0**-40, 2.0**20):
        dearer = [replace(term, **{name: factor * getattr(term, name) for name in coefficients}) for term in terms]
        dear = [replace(choice, worth=tuple(factor * value for value in choice.worth)) for choice in choices]
        assert allocate(choices, dearer, factor * budget) == widths
        assert allocate(dear, terms, budget) == widths
    for factor in (1e-9, 3.7):
        dear = [replace(choice, worth=tuple(factor * value for value in choice.worth)) for choice in choices]
        assert worth_of(choices, allocate(dear, terms, budget)) == pytest.approx(worth_of(choices, widths), rel=1e-9)
    # Other names are another order inside: the optimum has the same worth.
    turned = {choice.name: f"g{9 - i}" for i, choice in enumerate(choices)}

    def named(side: Side) -> Side:
        return Side(side.fixed, {turned[name]: times for name, times in side.repeats.items()})

    renamed = [replace(choice, name=turned[choice.name]) for choice in choices]
    joined = [replace(term, inputs=named(term.inputs), outputs=named(term.outputs)) for term in terms]
    found = allocate(renamed, joined, budget)
    assert worth_of(renamed, found) == pytest.approx(worth_of(choices, widths), rel=1e-12)


# --- a network of many groups ------------------------------------------------------------------------------------


def test_a_thousand_groups_are_left_where_no_step_and_no_exchange_gains() -> None:
    problem = choices, terms = large(0)
    full = {choice.name: choice.widths[-1] for choice in choices}
    budget = 0.4 * cost_of(terms, full)
    widths = allocate(*problem, budget)
    cost, worth, whole = cost_of(terms, widths), worth_of(choices, widths), worth_of(choices, full)
    assert 0.999 * budget < cost <= budget
    by_name = {choice.name: choice for choice in choices}
    touched: dict[str, set[int]] = {}
    for t, term in enumerate(terms):
        for name in (*term.inputs.repeats, *term.outputs.repeats):
            touched.setdefault(name, set()).add(t)

    def gain(steps: Mapping[str, int]) -> float:
        """What these steps of single groups gain in worth; nothing where there are none, or they break the budget."""
        changed = dict(widths)
        for name, step in steps.items():
            choice = by_name[name]
            place = choice.widths.index(widths[name]) + step
            if not 0 <= place < len(choice.widths):
                return 0.0
            changed[name] = choice.widths[place]
        met = [terms[t] for t in set().union(*(touched.get(name, set()) for name in steps))]
        added = cost_of(met, changed) - cost_of(met, widths)
        some = [by_name[name] for name in steps]
        return worth_of(some, changed) - worth_of(some, widths) if cost + added <= budget else 0.0

    draw = random.Random(1)
    near = [[*term.inputs.repeats, *term.outputs.repeats] for term in terms]
    pairs = [draw.sample(list(full), 2) for _ in range(3000)]
    pairs += [pair for pair in (draw.sample(names, 2) for names in near) if pair[0] != pair[1]]
    assert max(gain({name: 1}) for name in full) <= 0
    assert max(gain({up: 1, down: -1}) for up, down in pairs) <= 1e-7 * whole
    # Many exchanges are within the budget and lose: the sample is no empty one.
    assert sum(gain({up: 1, down: -1}) < 0 for up, down in pairs) > 500
    assert worth > 0.98 * whole


# --- the rules, one by one ---------------------------------------------------------------------------------------

A, B = Side(0, {"a": 1}), Side(0, {"b": 1})


def test_everything_is_whole_where_the_budget_allows_it() -> None:
    # Even what is worth nothing; but no more of it than is worth most.
    choices = [Choice("a", (1, 2, 3), (0.0, 1.0, 1.0)), Choice("b", (0, 8), (0.0, 0.0))]
    term = Term("t", A, B, per_product=1.0)
    assert allocate(choices, [term], 24.0) == {"a": 3, "b": 8}
    assert allocate(choices, [term], 23.0) == {"a": 2, "b": 0}
    assert allocate([Choice("a", (1, 2, 3), (0.0, 2.0, 1.0))], [Term("t", A, A, per_product=1.0)], 9.0) == {"a": 2}
    assert allocate([], [], 0.0) == {}


def test_a_budget_below_the_floor_is_refused_with_the_floor() -> None:
    choices = [Choice("a", (2, 4), (1.0, 2.0)), Choice("b", (3, 6), (1.0, 2.0))]
    terms = [Term("t", A, B, base=5.0, per_input=1.0, per_output=1.0, per_product=2.0)]
    assert allocate(choices, terms, 22.0) == {"a": 2, "b": 3}
    with pytest.raises(DpctlError, match=r"cannot be met\n.*21.9 of 63.0; the floor.* is 22.0\n.*allow the floor"):
        allocate(choices, terms, 21.9)
    with pytest.raises(DpctlError, match="cannot be met"):
        allocate(choices, terms, math.nan)


def test_a_layer_without_a_side_costs_nothing() -> None:
    choices = [Choice("a", (0, 4), (0.0, 3.0)), Choice("b", (1, 4), (0.0, 1.0))]
    terms = [Term("t", A, B, base=100.0, per_output=10.0, per_product=1.0)]
    assert allocate(choices, terms, 0.0) == {"a": 0, "b": 4}
    assert allocate(choices, terms, 114.0) == {"a": 4, "b": 1}


def test_widths_that_cost_alike_are_taken_whole() -> None:
    choices = [Choice("a", (1, 7, 8, 9), (1.0, 7.0, 8.0, 9.0))]
    assert allocate(choices, [Term("t", A, Side(1), per_input=1.0, steps=(8, 8))], 15.0) == {"a": 8}


def test_a_group_pays_in_every_layer_and_as_often_as_a_side_holds_it() -> None:
    choices = [Choice("a", (1, 2), (1.0, 2.0)), Choice("b", (1, 2), (1.0, 1.9))]
    one = Term("t", Side(0, {"a": 1, "b": 1}), Side(1), per_input=1.0)
    assert allocate(choices, [one], 3.0) == {"a": 2, "b": 1}
    assert allocate(choices, [one, Term("u", A, Side(1), per_input=1.0)], 4.0) == {"a": 1, "b": 2}
    assert allocate(choices, [replace(one, inputs=Side(0, {"a": 2, "b": 1}))], 4.0) == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Choice("a", (), ()),
        lambda: Choice("a", (2, 1), (0.0, 1.0)),
        lambda: Choice("a", (1, 2), (0.0,)),
        lambda: Choice("a", (-1, 2), (0.0, 1.0)),
        lambda: Choice("a", (1, 2), (0.0, math.nan)),
        lambda: Term("t", A, B, base=-1.0),
        lambda: Term("t", A, B, per_product=math.inf),
        lambda: Term("t", A, B, steps=(1, 0)),
        lambda: allocate([Choice("a", (1,), (0.0,))] * 2, [], 1.0),
    ],
)
def test_what_makes_no_sense_is_a_bug_of_the_caller(make: object) -> None:
    with pytest.raises(ValueError, match=r"a: |t: |two choices"):
        make()  # type: ignore[operator]


# --- elimination -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_elimination_finds_the_largest_sum(seed: int) -> None:
    draw = np.random.default_rng(seed)
    sizes = [2, 3, 4, 2, 3, 4]
    scopes = [(v,) for v in range(6)] + [(0, 1), (2, 1), (3, 2), (4, 5, 0), (5, 3)]
    tables = [Table(scope, draw.normal(size=[sizes[v] for v in scope])) for scope in scopes]
    near = [{u for scope in scopes if v in scope for u in scope} - {v} for v in range(6)]
    order = find_order(near, 4)
    found = maximise(tables, order)

    def value(at: Sequence[int]) -> float:
        return sum(float(values[tuple(at[v] for v in scope)]) for scope, values in tables)

    assert order.held == frozenset()
    every_value = [value(at) for at in itertools.product(*(range(size) for size in sizes))]
    assert value([found[v] for v in range(6)]) == pytest.approx(max(every_value))


def test_what_is_too_entangled_is_held() -> None:
    order = find_order([set(range(6)) - {v} for v in range(6)], 3)
    assert len(order.held) == 2
    assert all(not order.held & {v, *others} and len(others) <= 3 for v, others in order.eliminated)
    assert len(order.eliminated) == 4


# --- a real network ----------------------------------------------------------------------------------------------


def choices_of(network: Network, scores: Mapping[str, Sequence[float]], align: int) -> list[Choice]:
    def widths(span: Span) -> tuple[int, ...]:
        return (*range(span.step(align), span.width, span.step(align)), span.width)

    def kept(span: Span, width: int) -> float:
        return math.fsum(scores[span.name][channel] for channel in best(span, scores[span.name], width))

    return [Choice(s.name, widths(s), tuple(kept(s, width) for width in widths(s))) for s in network.spans]


def test_terms_cost_what_the_network_costs(terms_of: TermsOf) -> None:
    _, network, _ = trace(load_model("reference"), PruneRecipe(target_macs=0.5))
    draw = random.Random(0)
    some = {span.name: draw.randrange(1, span.width) for span in network.spans}
    for measure in ("macs", "params"):
        for widths in (network.full(), some):
            assert cost_of(terms_of(network, measure), widths) == network.cost(measure, widths)


def test_terms_of_norms_and_of_layers_of_an_unknown_kind(terms_of: TermsOf) -> None:
    layers = (
        Layer("norm", 0, 0, Side(0), A, 2),
        Layer("unknown", 7, 1, Side(12), Side(1), 3),
        Layer("bare", 7, 1, Side(0), Side(1), 3),
        Layer("conv", 7, 9, A, Side(0, {"a": 2}), 1),
    )
    network = Network((Span("a", 8, 1),), layers)
    for measure, number in (("macs", 2), ("params", 4)):
        terms = terms_of(network, measure)
        assert len(terms) == number
        for width in (1, 5, 8):
            assert cost_of(terms, {"a": width}) == network.cost(measure, {"a": width})


@pytest.mark.parametrize(("measure", "align"), [("macs", 16), ("macs", 1), ("params", 16)])
def test_the_reference_keeps_no_less_than_by_the_greedy_order(terms_of: TermsOf, measure: str, align: int) -> None:
    """By magnitude, as there it takes no data; the steps of align 16 come in 16 widths, so all are chosen together."""
    from dpctl.prune.criteria import magnitude
    from dpctl.prune.importance import Scoring

    source, recipe = load_model("reference"), PruneRecipe(criterion="magnitude", target_macs=0.5)
    groups, network, _ = trace(source, recipe)
    scoring = Scoring(source.unet, groups.prunable, None, None, recipe)
    scores = {name: values.tolist() for name, values in magnitude.score(scoring).items()}
    choices, terms = choices_of(network, scores, align), terms_of(network, measure)
    whole = math.fsum(choice.worth[-1] for choice in choices)
    for target in (0.3, 0.5, 0.7):
        budget = target * network.cost(measure, network.full())
        greedy = widths_for_target(network, scores, measure, budget, align)
        found = allocate(choices, terms, budget)
        assert network.cost(measure, found) <= budget
        kept = [worth_of(choices, widths) / whole for widths in (greedy, found)]
        print(f"{measure} {target}, align {align}: greedy {kept[0]:.4f}, allocate {kept[1]:.4f}")
        assert kept[1] >= kept[0] - 1e-12
