"""Write a precision into a graph: strongly typed, so that what it says is what runs.

An operator runs low, or stays in float32 for a reason that is named; casts stand between the two, and the network's
inputs and outputs stay float32. TensorRT 11 and TensorRT-RTX take precision from nowhere else.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir

from dpctl.errors import DpctlError
from dpctl.signature import CLOCKS

FLOAT = ir.DataType.FLOAT


@dataclass(frozen=True)
class Precision:
    """A precision of the graph: ONNX's type, numpy's, and the first opset whose operators all take it."""

    dtype: ir.DataType
    numpy: Any
    opset: int


PRECISIONS = {
    "fp32": Precision(FLOAT, np.float32, 18),
    "fp16": Precision(ir.DataType.FLOAT16, np.float16, 18),
    "bf16": Precision(ir.DataType.BFLOAT16, ml_dtypes.bfloat16, 22),  # Conv takes it since then
}

# The layers that hold the weights and do the work.
WEIGHTY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# What is computed low.
LOW = WEIGHTY | {
    *("Add", "Sub", "Mul", "Div", "Neg", "Max", "Min", "Clip", "Where"),
    *("Sigmoid", "Tanh", "Relu", "LeakyRelu", "Erf", "Gelu", "HardSwish", "Swish", "Softplus", "Mish"),
    *("Resize", "AveragePool", "MaxPool"),
}
# What only moves values: in float32 among operators in float32, else low.
MOVING = frozenset(
    {
        *("Reshape", "Transpose", "Slice", "Split", "Squeeze", "Unsqueeze", "Concat", "Expand", "Gather", "Identity"),
        *("Flatten", "Pad", "Tile", "DepthToSpace", "SpaceToDepth"),
    }
)
# What stays in float32, and why. A stash_type would keep a normalization's statistics there among low values, but
# TensorRT-RTX makes a layer of it that is low throughout: only types are sure. BatchNormalization is the scale and
# shift that ends a GroupNorm (export.simplify): between the statistics and the cast, it rounds once less.
STATISTICS, AFFINE, SOFTMAX = "normalization statistics", "normalization scale and shift", "softmax"
TIMES, RANGE = "timesteps", "range of values"
FP32 = {
    **dict.fromkeys(("InstanceNormalization", "LayerNormalization", "GroupNormalization"), STATISTICS),
    **dict.fromkeys(("RMSNormalization", "LpNormalization", "ReduceMean", "ReduceSum", "ReduceL2"), STATISTICS),
    "BatchNormalization": AFFINE,
    **dict.fromkeys(("Softmax", "LogSoftmax"), SOFTMAX),
    **dict.fromkeys(("Sin", "Cos"), TIMES),
    **dict.fromkeys(("Exp", "Log", "Pow", "Sqrt", "Reciprocal"), RANGE),
    "Cast": "change of type",
}
WEIGHTS, UNTYPED, UNKNOWN = "weights out of range", "not in this type", "unknown operator"
AMONG = "moves values in float32"
# These tell of a value's shape, whatever its type.
SHAPES = frozenset({"Shape", "Size"})

Reasons = dict[ir.Node, str]


@dataclass(frozen=True)
class Lowered:
    """A graph with its precision written in, and what a manifest says of it, as plain JSON values."""

    model: ir.Model
    report: dict[str, Any]


def lower(model: ir.Model, precision: str) -> Lowered:
    """Write `precision` into `model`, a graph in float32 without subgraphs; it is changed in place.

    The report counts tensors by type, names the nodes that stay in float32 under their reason (`fp32`), the
    convolutions and products among them (`not_lowered`), and counts what becomes of the constants (`weights`).
    """
    kind = PRECISIONS[precision]
    reasons: Reasons = {}
    weights = {"converted": 0, "to_zero": 0, "subnormal": 0}
    if kind.dtype != FLOAT:
        _prepare(model, kind)
        reasons = policy(model.graph, kind)
        weights = _Writer(model.graph, kind, precision, reasons).write()
    named: dict[str, list[str]] = {}
    for node, reason in reasons.items():
        named.setdefault(reason, []).append(str(node.name))
    report = {
        "precision": precision,
        "tensors": tensor_types(model),
        "fp32": dict(sorted(named.items())),
        "not_lowered": {str(node.name): reason for node, reason in reasons.items() if node.op_type in WEIGHTY},
        "weights": weights,
    }
    return Lowered(model, report)


def tensor_types(model: ir.Model) -> dict[str, int]:
    """Count the tensors of a graph, constants too, by type."""
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    values += [value for node in model.graph for value in node.outputs]
    return dict(sorted(Counter(_name(value.dtype) for value in values if value.dtype is not None).items()))


def _name(dtype: ir.DataType) -> str:
    return "float32" if dtype == FLOAT else dtype.name.lower()


def policy(graph: ir.Graph, kind: Precision) -> Reasons:
    """Return the nodes that stay in float32 with the reason, in the order of the graph."""
    timed = _timed(graph)
    touched = [node for node in graph if _has_floats(node) and node.op_type not in SHAPES]
    moving = {node for node in touched if node.op_type in MOVING and any(_lowered(node, kind)[0])}
    reasons = {node: _reason(node, timed, kind) for node in touched if node not in moving}
    fp32 = {node: reason for node, reason in reasons.items() if reason}
    among = _among([node for node in touched if node in moving], fp32, kind)
    return {node: fp32.get(node, AMONG) for node in touched if node in fp32 or node in among}


def _prepare(model: ir.Model, kind: Precision) -> None:
    """Raise the opset to where the operators take the type; a DpctlError for subgraphs, whose values are not seen."""
    from onnxscript.version_converter import convert_version

    graphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
    nested = [node for node in model.graph if any(a.type in graphs for a in node.attributes.values())]
    if nested or model.functions:
        got = ", ".join(str(node.name) for node in nested) or "functions"
        raise DpctlError("a graph with subgraphs cannot be lowered", got, "export it in fp32")
    if model.opset_imports[""] < kind.opset:
        convert_version(model, kind.opset)


def _has_floats(node: ir.Node) -> bool:
    return any(value is not None and value.dtype == FLOAT for value in (*node.inputs, *node.outputs))


def _timed(graph: ir.Graph) -> set[ir.Value]:
    """Return the values that depend on a clock and constants alone, up to where it becomes a sinusoid."""
    timed = {value for value in graph.inputs if value.name in CLOCKS}
    constant = set(graph.initializers.values())
    for node in graph:
        floats = [value for value in node.inputs if value is not None and value.dtype == FLOAT]
        if all(value in constant for value in floats):
            constant.update(node.outputs)
        elif FP32.get(node.op_type) != TIMES and all(value in timed or value in constant for value in floats):
            timed.update(node.outputs)
    return timed


def _reason(node: ir.Node, timed: set[ir.Value], kind: Precision) -> str | None:
    """Return why a node that computes stays in float32, or None."""
    if any(value in timed for value in node.inputs):
        return TIMES
    if node.op_type in FP32:
        return FP32[node.op_type]
    if node.op_type not in LOW:
        return UNKNOWN
    inputs, _ = _lowered(node, kind)
    if not any(inputs):
        return UNTYPED
    constants = [v.const_value for v, low in zip(node.inputs, inputs, strict=True) if low and v is not None]
    return WEIGHTS if any(_too_large(c.numpy(), kind) for c in constants if c is not None) else None


def _too_large(values: Any, kind: Precision) -> bool:
    """Tell whether a number becomes infinite in the low type."""
    finite = np.abs(values[np.isfinite(values)])
    return bool(finite.size and finite.max() > float(ml_dtypes.finfo(kind.numpy).max))


def _lowered(node: ir.Node, kind: Precision) -> tuple[list[bool], list[bool]]:
    """Return which inputs and outputs of a node in float32 the standard allows to be of the low type."""
    assert node.graph is not None
    low, version = f"tensor({_name(kind.dtype)})", node.graph.opset_imports[node.domain]
    try:
        schema = onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return [False] * len(node.inputs), [False] * len(node.outputs)
    free = {c.type_param_str for c in schema.type_constraints if low in c.allowed_type_strs}

    def variables(values: Any, formal: Any) -> list[str]:
        """Return the type variable of every value that holds floats; the last formal one may stand for many."""
        types = [formal[min(number, len(formal) - 1)].type_str for number in range(len(values))]
        return [t if v is not None and v.dtype == FLOAT else "" for v, t in zip(values, types, strict=True)]

    inputs, outputs = variables(node.inputs, schema.inputs), variables(node.outputs, schema.outputs)
    return [name in free for name in inputs], [name in free for name in outputs]


def _among(moving: list[ir.Node], fp32: dict[ir.Node, str], kind: Precision) -> set[ir.Node]:
    """Return the moving nodes that get their values from operators in float32 alone, and give them to such alone."""
    low = dict.fromkeys(moving, False)

    def is_low(node: ir.Node | None) -> bool:
        return node is not None and low.get(node, node not in fp32)

    for node in moving:
        low[node] = any(is_low(value.producer()) for value in node.inputs if value is not None and value.dtype == FLOAT)
    for node in reversed(moving):
        uses = [use for value in node.outputs for use in value.uses() if use.node.op_type not in SHAPES]
        low[node] |= any(is_low(use.node) and _lowered(use.node, kind)[0][use.idx] for use in uses)
    return {node for node in moving if not low[node]}


class _Writer:
    """Rewrites a graph by a policy: constants converted, casts where the type changes, once for each value."""

    def __init__(self, graph: ir.Graph, kind: Precision, label: str, reasons: Reasons) -> None:
        self.graph, self.kind, self.label, self.reasons = graph, kind, label, reasons
        self.weights = {"converted": 0, "to_zero": 0, "subnormal": 0}
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def write(self) -> dict[str, int]:
        """Rewrite the graph and return what became of the constants."""
        nodes = [node for node in self.graph if _has_floats(node) and node.op_type not in SHAPES]
        none = [False] * max((max(len(n.inputs), len(n.outputs)) for n in nodes), default=0)
        wanted = {node: (none, none) if node in self.reasons else _lowered(node, self.kind) for node in nodes}
        for value in list(self.graph.initializers.values()):
            if value.dtype == FLOAT:
                low = [use for use in value.uses() if use.node in wanted and wanted[use.node][0][use.idx]]
                self._convert(value, low)
        for node in nodes:
            inputs, outputs = wanted[node]
            for number, given in enumerate(node.inputs):
                if given is not None and not given.is_initializer() and given.dtype in (FLOAT, self.kind.dtype):
                    node.replace_input_with(number, self._cast(given, self.kind.dtype if inputs[number] else FLOAT))
            for output, is_low in zip(node.outputs, outputs, strict=False):
                if is_low:
                    output.type = ir.TensorType(self.kind.dtype)
        for number, value in enumerate(self.graph.outputs):
            if value.dtype == self.kind.dtype:
                self._give(number, value)
        return self.weights

    def _convert(self, value: ir.Value, low: list[Any]) -> None:
        """Convert a constant for its uses in the low type; where there are others, the original stays beside it."""
        if not low:
            return
        values = value.const_value.numpy()  # type: ignore[union-attr]
        array = values.astype(self.kind.numpy)
        magnitude = np.abs(array.astype(np.float32))
        self.weights["converted"] += array.size
        self.weights["to_zero"] += int(((magnitude == 0) & (values != 0)).sum())
        smallest = float(ml_dtypes.finfo(self.kind.numpy).smallest_normal)
        self.weights["subnormal"] += int(((magnitude > 0) & (magnitude < smallest)).sum())
        if len(low) == len(value.uses()):
            value.const_value = ir.tensor(array, dtype=self.kind.dtype, name=value.name)
            value.type = ir.TensorType(self.kind.dtype)
            return
        tensor = ir.tensor(array, dtype=self.kind.dtype, name=f"{value.name}.{self.label}")
        copy = ir.Value(name=tensor.name, const_value=tensor, shape=value.shape, type=ir.TensorType(self.kind.dtype))
        self.graph.register_initializer(copy)
        for use in low:
            use.node.replace_input_with(use.idx, copy)

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Return `value` in a type: itself, or its one cast, right behind the node that gives it."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._casts:
            name = f"{value.name}.{self.label if dtype == self.kind.dtype else 'fp32'}"
            node = _cast_node(value, dtype, name)
            producer = value.producer()
            if producer is None:
                self.graph.insert_before(self.graph[0], node)
            else:
                self.graph.insert_after(producer, node)
            self._casts[value, dtype] = node.outputs[0]
        return self._casts[value, dtype]

    def _give(self, number: int, value: ir.Value) -> None:
        """Give an output of the network, computed low, in float32 under its own name."""
        name = str(value.name)
        value.name = f"{name}.{self.label}"
        node = _cast_node(value, FLOAT, name)
        self.graph.append(node)
        self.graph.outputs[number] = node.outputs[0]


def _cast_node(value: ir.Value, dtype: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], attributes={"to": dtype}, name=name)
    node.outputs[0].name, node.outputs[0].shape, node.outputs[0].type = name, value.shape, ir.TensorType(dtype)
    return node


def emulated(model: ir.Model) -> ir.Model:
    """Return `model` for a processor, changed in place: every low operator computes in float32 and rounds its result.

    ONNX Runtime's own processor kernels leave most roundings of float16 out and do not know bfloat16. This shows the
    graph's rounding, and overflow where a value is stored; not that within a GPU's sums.
    """
    low = {kind.dtype for kind in PRECISIONS.values()} - {FLOAT}
    for value in model.graph.initializers.values():
        if value.dtype in low:
            array = value.const_value.numpy().astype(np.float32)  # type: ignore[union-attr]
            value.const_value, value.type = ir.tensor(array, name=value.name), ir.TensorType(FLOAT)
    for node in list(model.graph):
        for value in node.outputs:
            if value.dtype in low:
                _round(model.graph, node, value)
    return model


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let the users of a low value have it in float32, rounded."""
    dtype = value.dtype
    assert dtype is not None
    rounded = value
    if node.op_type != "Cast":
        value.type = ir.TensorType(FLOAT)
        if node.op_type in MOVING:
            return
        cast = _cast_node(value, dtype, f"{value.name}.low")
        graph.insert_after(node, cast)
        node, rounded = cast, cast.outputs[0]
    back = _cast_node(rounded, FLOAT, f"{value.name}.rounded")
    graph.insert_after(node, back)
    for use in list(value.uses()):
        if use.node is not node and use.node is not back:
            use.node.replace_input_with(use.idx, back.outputs[0])
