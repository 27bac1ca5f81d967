"""Branches that a slim network has no more, taken out of the graph of its base: their constant is added instead."""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass
from torch import nn

from dpctl.pruned_unet import Removed
from export.shapes import underivable

# What may stand between a branch's last layer and the sum that it ends in: other orders of the same values.
BETWEEN = ("Reshape", "Transpose", "Cast")


def take_out(model: ir.Model, unet: nn.Module) -> set[str]:
    """Let the graph add a constant, named as the network's tensor, where `unet` has no branch any more, in place.

    Returns the modules that nothing is left of: those of the branches, and what only they read. The constants are zeros
    of the graph's own widths. A branch that the graph does not have either is no matter. Raises a DpctlError for one
    that does not end in a sum.
    """
    layers = _by_module(model.graph)
    removed = {name: module for name, module in unet.named_modules() if isinstance(module, Removed)}
    for name, module in removed.items():
        nodes = layers.get(f"{name}.{module.last}")
        if nodes:
            _replace(model.graph, nodes, name, module)
    RemoveUnusedNodesPass()(model)
    return layers.keys() - _by_module(model.graph).keys()


def _by_module(graph: ir.Graph) -> dict[str, list[ir.Node]]:
    """Return module -> its nodes, in their order."""
    found: dict[str, list[ir.Node]] = {}
    for node in graph:
        found.setdefault(str(node.name).rpartition("/")[0], []).append(node)
    return found


def _replace(graph: ir.Graph, nodes: list[ir.Node], name: str, module: Removed) -> None:
    """Put a constant in the place of what the last of a branch's `nodes` gives to the sum behind it."""
    given, width = nodes[-1].outputs[0], _width(nodes)
    while (user := _only(use.node for use in given.uses())) is not None and user.op_type in BETWEEN:
        given = user.outputs[0]
    if user is None or user.op_type != "Add" or width is None:
        raise underivable(nodes[-1], "the branch does not end in a sum")
    at = next(number for number, value in enumerate(user.inputs) if value is given)
    zeros = np.zeros((width,) + (1,) * (module.bias.ndim - 1))
    dtype = given.dtype if given.dtype is not None else ir.DataType.FLOAT
    tensor = ir.tensor(zeros.astype(dtype.numpy()), dtype=dtype, name=f"{name}.bias")
    value = ir.Value(name=tensor.name, const_value=tensor, shape=ir.Shape(zeros.shape), type=ir.TensorType(dtype))
    graph.register_initializer(value)
    user.replace_input_with(at, value)


def _width(nodes: list[ir.Node]) -> int | None:
    """Return the width of a layer in the graph: the length of its bias."""
    values = [value for node in nodes for value in node.inputs if value is not None and value.const_value is not None]
    vectors = [
        value.const_value.size
        for value in values
        if value.const_value is not None and len(value.const_value.shape) == 1
    ]
    return int(vectors[-1]) if vectors else None


def _only(nodes: Iterable[ir.Node]) -> ir.Node | None:
    """Return the one node that there is; None of several."""
    found = set(nodes)
    return found.pop() if len(found) == 1 else None
