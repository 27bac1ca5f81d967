"""The rewritten graph: fewer nodes, the same values; what only looks alike is left as it is."""

from collections import Counter
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from export.simplify import simplify


def graph(nodes: list[Any], shape: list[Any], constants: dict[str, Any]) -> ir.Model:
    """Return a model of opset 18 from x, float32 of `shape`, to y."""
    made = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * len(shape))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return ir.serde.deserialize_model(
        helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    )


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    data = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def kinds(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def simplified(model: ir.Model, x: np.ndarray) -> Counter[str]:
    """Simplify `model`, require the very same output and return how many nodes of each kind are left."""
    before = run(model, x)
    after = simplify(model)
    np.testing.assert_array_equal(run(after, x), before)
    return kinds(after)


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def group_norm(scale: Any, shift: Any) -> list[Any]:
    """Return the nodes that the exporter writes for a GroupNorm of two groups."""
    return [
        helper.make_node("Reshape", ["x", "grouped"], ["groups"]),
        helper.make_node("InstanceNormalization", ["groups", "ones", "zeros"], ["normal"]),
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Reshape", ["normal", "shape"], ["back"]),
        helper.make_node("Mul", ["back", scale], ["scaled"]),
        helper.make_node("Add", ["scaled", shift], ["y"]),
    ]


NORM = {
    "grouped": np.array([0, 2, -1]),
    "ones": np.ones(2, np.float32),
    "zeros": np.zeros(2, np.float32),
    "scale": noise(6, 1, 1),
    "shift": noise(6, 1, 1),
}


@pytest.mark.parametrize("batch", [1, 3])
def test_a_group_norm_ends_in_one_affine_node_and_asks_for_no_shape(batch: int) -> None:
    model = graph(group_norm("scale", "shift"), ["batch", 6, 4, 4], NORM)
    assert simplified(model, noise(batch, 6, 4, 4)) == {
        "Reshape": 2,
        "InstanceNormalization": 1,
        "BatchNormalization": 1,
    }


def test_a_sequence_of_channels_is_an_affine_map_too() -> None:
    nodes = [helper.make_node("Mul", ["x", "scale"], ["m"]), helper.make_node("Add", ["m", "shift"], ["y"])]
    constants = {"scale": noise(6, 1), "shift": noise(6, 1)}
    assert simplified(graph(nodes, ["batch", 6, 5], constants), noise(2, 6, 5)) == {"BatchNormalization": 1}


@pytest.mark.parametrize(
    ("scale", "shift"),
    [
        (noise(1), noise(1)),  # one for all
        (noise(5), noise(5)),  # along the last axis
        (noise(6, 1), noise(5)),
        (noise(4, 6, 1), noise(4, 6, 1)),  # one for each sample
    ],
)
def test_what_is_no_map_per_channel_stays(scale: np.ndarray, shift: np.ndarray) -> None:
    nodes = [helper.make_node("Mul", ["x", "scale"], ["m"]), helper.make_node("Add", ["m", "shift"], ["y"])]
    model = graph(nodes, ["batch", 6, 5], {"scale": scale, "shift": shift})
    assert simplified(model, noise(4, 6, 5)) == {"Mul": 1, "Add": 1}


def test_a_product_that_is_used_twice_stays() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["m"]),
        helper.make_node("Add", ["m", "shift"], ["a"]),
        helper.make_node("Sub", ["a", "m"], ["y"]),
    ]
    model = graph(nodes, ["batch", 6, 5], {"scale": noise(6, 1), "shift": noise(6, 1)})
    assert simplified(model, noise(2, 6, 5)) == {"Mul": 1, "Add": 1, "Sub": 1}


def test_a_reshape_of_two_dynamic_axes_keeps_its_computed_shape() -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Reshape", ["r", "shape"], ["y"]),
    ]
    assert simplified(graph(nodes, ["batch", 3, "height"], {}), noise(2, 3, 4)) == {"Shape": 1, "Relu": 1, "Reshape": 1}


def test_a_real_network_asks_for_no_shape_beyond_its_batch(plain_exported: Any) -> None:
    found = kinds(ir.load(plain_exported / "unet/model.fp32.onnx"))
    assert found["BatchNormalization"] == found["InstanceNormalization"] > 0
    # The one that spreads the timestep over the batch.
    assert found["Shape"] <= 1
