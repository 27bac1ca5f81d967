"""The shapes of a graph's values, followed node by node with ONNX's own inference, every axis a number."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator

from dpctl.errors import DpctlError

# Of a constant whose value may decide about a shape: as many numbers as a few axes need.
SMALL = 64


class NotNarrowed(DpctlError):
    """A graph that cannot be narrowed to a network; the caller may export that instead."""

    def __init__(self, got: str, failed: str = "the graph cannot be narrowed to this network") -> None:
        super().__init__(failed, got, "export the network itself")


def underivable(node: ir.Node, got: str) -> NotNarrowed:
    """Return the error for what the new widths do not determine."""
    return NotNarrowed(f"{node.name}: {got}")


def node_shapes(node: ir.Node) -> onnx.NodeProto:
    """Return a node for `Shapes.follow`: its inputs and outputs are called after their position."""
    proto = ir.serde.serialize_node(node)
    for names, letter in ((proto.input, "i"), (proto.output, "o")):
        names[:] = [f"{letter}{number}" if name else "" for number, name in enumerate(names)]
    return proto


def aimed_at(given: tuple[int, ...], target: Any) -> tuple[int, ...]:
    """Return the shape that a reshape to `target` makes of the shape `given`."""
    sizes = [given[axis] if size == 0 else int(size) for axis, size in enumerate(target.tolist())]
    rest = math.prod(given) // math.prod(size for size in sizes if size != -1)
    return tuple(rest if size == -1 else size for size in sizes)


class Shapes:
    """Shapes of values, and the numbers that shapes are computed from, at given lengths of the dynamic axes."""

    def __init__(self, graph: ir.Graph, axes: Mapping[str, int]) -> None:
        self._types: dict[ir.Value, onnx.TypeProto] = {}
        self._known: dict[ir.Value, Any] = {}
        self._opsets = [onnx.helper.make_opsetid(*entry) for entry in graph.opset_imports.items()]
        for value in graph.inputs:
            assert value.shape is not None
            assert value.dtype is not None
            shape = [axis if isinstance(axis, int) else axes[str(axis.value)] for axis in value.shape]
            self._types[value] = onnx.helper.make_tensor_type_proto(int(value.dtype), shape)

    def of(self, value: ir.Value) -> tuple[int, ...]:
        """Return the shape of a value that was followed."""
        return tuple(axis.dim_value for axis in self._types[value].tensor_type.shape.dim)

    def constant(self, value: ir.Value, array: Any) -> None:
        """Take a constant to be `array`."""
        assert value.dtype is not None
        self._types[value] = onnx.helper.make_tensor_type_proto(int(value.dtype), array.shape)
        if array.size <= SMALL and array.dtype.kind in "if":
            self._known[value] = array

    def known(self, value: ir.Value) -> Any:
        """Return the numbers that a value holds where shapes are computed from them, else None."""
        return self._known.get(value)

    def follow(self, proto: onnx.NodeProto, node: ir.Node, read: Sequence[ir.Value | None]) -> None:
        """Work out the outputs of a node that reads `read`; a DpctlError where they do not fit together."""
        inputs = {f"i{number}": value for number, value in enumerate(read) if value is not None}
        known = {name: self._known[value] for name, value in inputs.items() if value in self._known}
        version = next((each.version for each in self._opsets if each.domain == proto.domain), 0)
        try:
            schema = onnx.defs.get_schema(proto.op_type, version, proto.domain)
            types = {name: self._types[value] for name, value in inputs.items()}
            data = {name: onnx.numpy_helper.from_array(array) for name, array in known.items()}
            found = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=self._opsets)
        except (onnx.defs.SchemaError, onnx.shape_inference.InferenceError) as problem:
            raise underivable(node, str(problem).strip().splitlines()[0]) from None
        for number, value in enumerate(node.outputs):
            kind = found.get(f"o{number}")
            if kind is None or not all(axis.HasField("dim_value") for axis in kind.tensor_type.shape.dim):
                raise underivable(node, "an output whose shape is not known")
            self._types[value] = kind
        self._compute(proto, node, inputs, known)

    def _compute(
        self, proto: onnx.NodeProto, node: ir.Node, inputs: Mapping[str, ir.Value], known: dict[str, Any]
    ) -> None:
        """Keep the numbers that a node gives where shapes are computed of them: whole ones, from known ones."""
        whole = (onnx.TensorProto.INT64, onnx.TensorProto.INT32, onnx.TensorProto.BOOL)
        if any(self._types[value].tensor_type.elem_type not in whole for value in node.outputs):
            return
        if proto.op_type in ("Shape", "Size"):  # of a value of which nothing is known but its shape
            known = {"i0": np.broadcast_to(np.float32(0), self.of(inputs["i0"]))}
        if known.keys() == inputs.keys():
            results = ReferenceEvaluator(proto).run(None, known)
            self._known |= dict(zip(node.outputs, results, strict=True))
