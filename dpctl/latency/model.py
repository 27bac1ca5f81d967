"""What a network of any widths would take, learnt from the layers' times of a few that were run: no torch, no model.

A layer costs base + per_input * a + per_output * b + per_product * a * b, with the widths a and b of its sides rounded
up to the block of channels that the backend's kernels work in, and where that shows, per_tile * a * b more with b
rounded up to a tile: outputs that are computed together, of which an incomplete one takes as long as a whole one. What
no layer of the network accounts for (activations, concatenation, resampling, changes of layout) follows the volume of
what the layers put out. A profiler costs time itself, so the sum is scaled to what the whole network took.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import nnls
from scipy.stats import spearmanr

from dpctl.prune.plan import Layer, Network, Side
from dpctl.prune.terms import Term, gated, rounded

# Blocks of channels that kernels of processors and tensor cores work in, and outputs that they compute together.
STEPS, TILES = (1, 4, 8, 16, 32), (32, 64, 128)
# A tile is believed in where it leaves less than this part of the squares: with one more coefficient some go anyway.
SHOWS = 0.95
# So many networks have an order that can be compared.
RANKED = 3


@dataclass(frozen=True)
class Sample:
    """A network that was run: the width of every group, and the time of a whole call.

    `layers` has the time of every module by the backend's profiler; what no module asked for has the name "".
    """

    widths: Mapping[str, int]
    layers: Mapping[str, float]
    latency_s: float


@dataclass(frozen=True)
class LatencyModel:
    """The terms of all layers, and the constant part; seconds of one call. `tile` is 0 where none shows."""

    terms: tuple[Term, ...]
    constant_s: float
    step: int
    tile: int

    def predict(self, widths: Mapping[str, int]) -> float:
        """Return what a network of these widths takes, in seconds."""
        return float(self.constant_s + sum(term.cost(widths) for term in self.terms))

    def holding(self, widths: Mapping[str, int]) -> "LatencyModel":
        """Return the model of the same network with these groups fixed at these widths: what is planned are others."""
        terms = (
            replace(term, inputs=_holding(term.inputs, widths), outputs=_holding(term.outputs, widths))
            for term in self.terms
        )
        return replace(self, terms=tuple(terms))


@dataclass(frozen=True)
class Accuracy:
    """How far predictions are from what networks took that the model has not seen."""

    rank_correlation: float | None
    median_error: float
    worst_error: float
    pairs: tuple[tuple[float, float], ...]


def fit(network: Network, samples: Sequence[Sample]) -> LatencyModel:
    """Learn what networks of other widths take; step and tile are those whose predictions fit the layers' times best.

    Errors count relative to a network's latency: a small one is to be known as well as a large one.
    """
    weights = np.array([1.0 / sample.latency_s for sample in samples])
    plain = [(*_layers(network, samples, weights, step, 0), step, 0) for step in STEPS]
    tiled = [
        (*_layers(network, samples, weights, step, tile), step, tile) for step in STEPS for tile in TILES if tile > step
    ]
    found, other = (min(each, key=lambda fitted: fitted[1]) for each in (plain, tiled))
    terms, _, step, tile = other if other[1] < SHOWS * found[1] else found
    known = {layer.name for layer in network.layers}
    rest = np.array([sum(t for name, t in sample.layers.items() if name not in known) for sample in samples])
    volumes = np.array([[1.0, _volume(network, sample.widths)] for sample in samples])
    base, per_value = _nonnegative(volumes, rest, weights)[0]
    every = [
        gated(_with_output(term, layer, per_value if term is of_layer[0] else 0.0), layer)
        for of_layer, layer in zip(terms, network.layers, strict=True)
        for term in of_layer
    ]
    return _calibrated(LatencyModel(tuple(every), base, step, tile), samples, weights)


def _calibrated(model: LatencyModel, samples: Sequence[Sample], weights: np.ndarray) -> LatencyModel:
    """Scale a model of what the profiler says to what whole calls took.

    A profiler takes a constant time for every kernel, so that the line through both has a negative offset: it is taken
    from the constant parts of the layers.
    """
    sums = np.array([model.predict(sample.widths) for sample in samples])
    line = np.stack([sums, np.ones_like(sums)], 1) * weights[:, None]
    (scale, offset), *_ = np.linalg.lstsq(line, np.array([sample.latency_s for sample in samples]) * weights)
    constant = scale * (model.constant_s + sum(term.base for term in model.terms))
    left = max(0.0, 1.0 + offset / constant) if offset < 0 < constant else 1.0
    terms = tuple(_scaled(term, scale, scale * left) for term in model.terms)
    return LatencyModel(terms, float(scale * left * model.constant_s + max(0.0, offset)), model.step, model.tile)


def _layers(
    network: Network, samples: Sequence[Sample], weights: np.ndarray, step: int, tile: int
) -> tuple[list[list[Term]], float]:
    """Return the terms of every layer, a second one for its tiles, and the sum of squares left of their times."""
    terms, left = [], 0.0
    for layer in network.layers:
        sides = [[side.width(s.widths) for s in samples] for side in (layer.inputs, layer.outputs)]
        a, b = (np.array(side, dtype=float) for side in sides)
        there = np.array([not layer.is_gone(sample.widths) for sample in samples]) & (b > 0)
        if layer.positions:
            there &= a > 0
        else:  # a norm
            a = np.zeros_like(b)
        times = np.array([sample.layers.get(layer.name, 0.0) for sample in samples])
        a, whole, b = rounded(a, step), rounded(b, tile) if tile else np.zeros_like(b), rounded(b, step)
        # A layer of a branch that is gone takes no time, whatever a profiler puts down to it.
        features = np.stack([np.ones_like(a), a, b, a * b, a * whole], 1) * there[:, None]
        (base, *per_side, per_product, per_tile), residual = _nonnegative(features, times * there, weights)
        inputs = layer.inputs if layer.positions else Side(1)
        first = Term(layer.name, inputs, layer.outputs, base, per_side[0], per_side[1], per_product, (step, step))
        terms.append([first])
        if per_tile:
            more = Term(layer.name, inputs, layer.outputs, per_product=per_tile, steps=(step, tile))
            terms[-1].append(more)
        left += residual**2
    return terms, left


def _nonnegative(features: np.ndarray, times: np.ndarray, weights: np.ndarray) -> tuple[list[float], float]:
    """Return the coefficients, none negative, by weighted least squares, and the norm of what is left."""
    scale = np.maximum(features.max(0), 1.0)
    found, residual = nnls(features / scale * weights[:, None], times * weights)
    return [float(value) for value in found / scale], float(residual)


def _volume(network: Network, widths: Mapping[str, int]) -> float:
    there = [layer for layer in network.layers if not layer.is_gone(widths) and layer.inputs.width(widths)]
    return float(sum(layer.positions * layer.outputs.width(widths) for layer in there))


def _holding(side: Side, widths: Mapping[str, int]) -> Side:
    held = sum(times * widths[name] for name, times in side.repeats.items() if name in widths)
    return Side(side.fixed + held, {name: times for name, times in side.repeats.items() if name not in widths})


def _with_output(term: Term, layer: Layer, per_value: float) -> Term:
    """Charge a layer for what is done with its outputs, value by value."""
    return replace(term, per_output=term.per_output + per_value * layer.positions)


def _scaled(term: Term, scale: float, constant: float) -> Term:
    parts = {name: getattr(term, name) * scale for name in ("per_input", "per_output", "per_product")}
    return replace(term, base=term.base * constant, **parts)


def accuracy(model: LatencyModel, samples: Sequence[Sample]) -> Accuracy:
    """Compare predictions with what networks took that were not fitted on."""
    pairs = [(model.predict(sample.widths), sample.latency_s) for sample in samples]
    predicted, measured = np.array(pairs).T
    errors = np.abs(predicted / measured - 1.0)
    # Two or fewer have no order to speak of.
    rank = float(spearmanr(predicted, measured).statistic) if len(pairs) >= RANKED else None
    return Accuracy(rank, float(np.median(errors)), float(errors.max()), tuple(pairs))
