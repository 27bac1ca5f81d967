"""What several tests of pruning share."""

from collections.abc import Callable

import pytest

from dpctl.prune.plan import Network, Side
from dpctl.prune.terms import Term, gated


@pytest.fixture(scope="session")
def terms_of() -> Callable[[Network, str], list[Term]]:
    """Return what gives a network's ``"macs"`` or ``"params"`` as terms: costs that are known otherwise, too."""
    return _terms_of


def _terms_of(network: Network, measure: str) -> list[Term]:
    """Return the network's ``"macs"`` or ``"params"`` as terms; layers that cost nothing of it are left out."""
    terms = []
    for layer in network.layers:
        product = layer.kernel * (layer.positions if measure == "macs" else 1)
        vectors = layer.vectors if measure == "params" else 0
        # A norm, or a layer that is all vectors, has no inputs of its own.
        inputs = layer.inputs if product and (layer.inputs.fixed or layer.inputs.repeats) else Side(1)
        product = product if inputs is layer.inputs else 0
        if product or vectors:
            terms.append(gated(Term(layer.name, inputs, layer.outputs, per_output=vectors, per_product=product), layer))
    return terms
