"""Rewrite an ONNX graph into fewer nodes that compute the same values; the parity gate runs on what comes out.

Both passes are there because ONNX Runtime measures faster with them: a small UNet spends as much time between its
convolutions as inside them. The graph stays standard ONNX of the same opset.
"""

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass, ShapeInferencePass


def simplify(model: ir.Model) -> ir.Model:
    """Return `model` with static reshapes and with each per-channel affine map as one node."""
    # With data propagation, which follows a shape through Shape, Slice and Concat.
    model = ShapeInferencePass(data_prop=True)(model).model
    _static_reshapes(model.graph)
    _channel_affines(model.graph)
    RemoveUnusedNodesPass()(model)
    return model


def _static_reshapes(graph: ir.Graph) -> None:
    """Give a Reshape of one dynamic axis a constant shape with -1 in its place.

    What computed the shape (Shape, Slice, Concat: a third of the nodes of a small UNet) is then used by nobody.
    """
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        axes = list(node.outputs[0].shape or ())
        dynamic = [axis for axis in axes if not isinstance(axis, int)]
        # Beside a -1, a 0 is no size of its own.
        if not axes or len(dynamic) > 1 or 0 in axes:
            continue
        sizes = np.array([axis if isinstance(axis, int) else -1 for axis in axes], dtype=np.int64)
        node.replace_input_with(1, _constant(graph, f"{node.outputs[0].name}.shape", sizes))


def _channel_affines(graph: ir.Graph) -> None:
    """Turn x * scale + shift, constants per channel, as a GroupNorm ends, into one pass over x.

    BatchNormalization with mean 0 and variance 1 is that map; it is the standard's only operator for it.
    """
    for add in list(graph):
        mul = add.inputs[0].producer() if add.op_type == "Add" and add.inputs[0] is not None else None
        if mul is None or mul.op_type != "Mul" or len(mul.outputs[0].uses()) != 1 or mul.outputs[0].is_graph_output():
            continue
        data, (scale, shift) = mul.inputs[0], (_per_channel(node) for node in (mul, add))
        if data is None or scale is None or shift is None or scale.shape != shift.shape:
            continue
        name = str(add.outputs[0].name)
        values = {"scale": scale, "shift": shift, "mean": np.zeros_like(scale), "variance": np.ones_like(scale)}
        inputs = [data, *(_constant(graph, f"{name}.{key}", value) for key, value in values.items())]
        node = ir.node("BatchNormalization", inputs, attributes={"epsilon": 0.0}, name=add.name)
        node.metadata_props.update(add.metadata_props)
        node.outputs[0].shape, node.outputs[0].type = add.outputs[0].shape, add.outputs[0].type
        ir.convenience.replace_nodes_and_values(graph, add, [mul, add], [node], [add.outputs[0]], [node.outputs[0]])


def _per_channel(node: ir.Node) -> Any:
    """Return a node's second input as an array [C] where it is one constant per channel of its first, or None."""
    data, constant = node.inputs
    if data is None or constant is None or constant.const_value is None or data.shape is None:
        return None
    values, rank = constant.const_value.numpy(), data.shape.rank()
    wanted = (data.shape[1], *[1] * (rank - 2)) if rank > 2 else None
    return values.reshape(-1) if values.shape == wanted else None


def _constant(graph: ir.Graph, name: str, values: Any) -> ir.Value:
    tensor = ir.tensor(values, name=name)
    value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype))
    graph.register_initializer(value)
    return value
