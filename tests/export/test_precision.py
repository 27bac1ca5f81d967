"""A graph with a precision written in: what runs low, what stays in float32, and that it is well typed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from dpctl.errors import DpctlError
from export.precision import PRECISIONS, Lowered, emulated, lower

LOW = ("fp16", "bf16")
TYPES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}


def model(nodes: list[Any], constants: dict[str, Any], inputs: dict[str, list[Any]] | None = None) -> ir.Model:
    """Return a graph of opset 18, typed, from float32 inputs ([batch, 4] `x` unless told) to `y`."""
    made = helper.make_graph(
        nodes,
        "graph",
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
            for name, shape in (inputs or {"x": ["batch", 4]}).items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    proto = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return ir.serde.deserialize_model(onnx.shape_inference.infer_shapes(proto))


def node(kind: str, inputs: list[str], output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs, [output], name=f"{output}/{kind}", **attributes)


def run(graph: ir.Model, **inputs: Any) -> np.ndarray:
    data = ir.serde.serialize_model(graph).SerializeToString()
    return onnxruntime.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def checked(graph: ir.Model) -> ir.Model:
    """Require that ONNX's own checker and its strict inference agree with every type and shape of a graph."""
    proto = ir.serde.serialize_model(graph)
    onnx.checker.check_model(proto, full_check=True)
    onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True)
    return graph


def named(graph: ir.Model) -> dict[str, ir.Node]:
    return {str(found.name): found for found in graph.graph}


def kinds(found: ir.Node) -> list[str]:
    return [value.dtype.name for value in found.inputs if value is not None and value.dtype is not None]


MATMUL = [node("MatMul", ["x", "w"], "a"), node("Softmax", ["a"], "s"), node("MatMul", ["s", "w"], "y")]


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("precision", LOW)
def test_products_run_low_and_softmax_in_float32(precision: str) -> None:
    lowered = lower(model(MATMUL, {"w": weights(4, 4)}), precision)
    kind = PRECISIONS[precision].dtype.name
    graph = named(checked(lowered.model))
    assert kinds(graph["a/MatMul"]) == kinds(graph["y/MatMul"]) == [kind, kind]
    assert kinds(graph["s/Softmax"]) == ["FLOAT"]
    assert [value.dtype.name for value in (*lowered.model.graph.inputs, *lowered.model.graph.outputs)] == ["FLOAT"] * 2
    assert lowered.report == {
        "precision": precision,
        "tensors": {TYPES[precision].name: 5, "float32": 4},
        "fp32": {"softmax": ["s/Softmax"]},
        "not_lowered": {},
        "weights": {"converted": 16, "to_zero": 0, "subnormal": 0},
    }


def test_float32_is_left_as_it_is_and_never_called_otherwise() -> None:
    before = model(MATMUL, {"w": weights(4, 4)})
    data = ir.serde.serialize_model(before).SerializeToString()
    lowered = lower(before, "fp32")
    assert ir.serde.serialize_model(lowered.model).SerializeToString() == data
    assert (lowered.report["precision"], lowered.report["tensors"]) == ("fp32", {"float32": 5})


@pytest.mark.parametrize("large", [65504.0, 65505.0, -1e6])
def test_a_weight_out_of_range_keeps_its_layer_and_is_named(large: float) -> None:
    wide = weights(4, 4)
    wide[1, 2] = large
    nodes = [node("MatMul", ["x", "w"], "a"), node("MatMul", ["a", "wide"], "b"), node("MatMul", ["b", "w"], "y")]
    for precision, fits in (("fp16", abs(large) <= 65504), ("bf16", True)):
        lowered = lower(model(nodes, {"w": weights(4, 4), "wide": wide}), precision)
        told = {} if fits else {"b/MatMul": "weights out of range"}
        assert lowered.report["not_lowered"] == told
        kind = PRECISIONS[precision].dtype.name if fits else "FLOAT"
        assert kinds(named(checked(lowered.model))["b/MatMul"]) == [kind, kind]


def test_an_infinity_is_one_in_every_type() -> None:
    mask = np.float32([0, -np.inf, 0, -np.inf])
    lowered = lower(model([node("Add", ["x", "mask"], "y")], {"mask": mask}), "fp16")
    assert lowered.report["fp32"] == {}
    np.testing.assert_array_equal(run(lowered.model, x=np.ones((1, 4), np.float32)), [1 + mask])


def test_rounding_to_zero_and_to_subnormal_numbers_is_counted() -> None:
    small = np.array([1e-9, -1e-9, 1e-6, -1e-5, 6.2e-5, 1.0, 0.0, 2.0], np.float32).reshape(4, 2)
    found = lower(model([node("MatMul", ["x", "w"], "y")], {"w": small}), "fp16").report["weights"]
    assert found == {"converted": 8, "to_zero": 2, "subnormal": 2}


def test_a_constant_of_both_is_there_twice_and_a_cast_once() -> None:
    nodes = [
        node("Add", ["x", "c"], "a"),
        node("Softmax", ["a"], "s"),
        node("ReduceMean", ["a"], "m", keepdims=0),
        node("Pow", ["s", "c"], "p"),
        node("Add", ["p", "m"], "q"),
        node("Add", ["a", "q"], "y"),
    ]
    lowered = lower(model(nodes, {"c": np.float32(2.5)}), "fp16")
    graph = checked(lowered.model).graph
    assert {name: value.dtype.name for name, value in graph.initializers.items()} == {"c": "FLOAT", "c.fp16": "FLOAT16"}
    casts = [str(found.name) for found in graph if found.op_type == "Cast"]
    assert casts == ["x.fp16", "a.fp32", "m.fp16", "p.fp16", "y"]
    assert set(lowered.report["fp32"]) == {"softmax", "normalization statistics", "range of values"}


def test_what_is_not_known_stays_in_float32_and_is_named() -> None:
    nodes = [node("Mul", ["x", "x"], "a"), node("Einsum", ["a"], "b", equation="ij->ji"), node("Mul", ["b", "b"], "y")]
    lowered = lower(model(nodes, {}), "fp16")
    assert lowered.report["fp32"] == {"unknown operator": ["b/Einsum"]}
    assert kinds(named(checked(lowered.model))["b/Einsum"]) == ["FLOAT"]


def test_what_moves_values_follows_what_is_around_it() -> None:
    nodes = [
        node("Softmax", ["x"], "s"),
        node("Transpose", ["s"], "between"),
        node("Softmax", ["between"], "t"),
        node("Transpose", ["t"], "behind"),
        node("Mul", ["behind", "behind"], "m"),
        node("Transpose", ["m"], "before"),
        node("Softmax", ["before"], "y"),
    ]
    lowered = lower(model(nodes, {}), "fp16")
    graph = named(checked(lowered.model))
    assert [kinds(graph[f"{name}/Transpose"])[0] for name in ("between", "behind", "before")] == [
        "FLOAT",
        "FLOAT16",
        "FLOAT16",
    ]
    assert lowered.report["fp32"]["moves values in float32"] == ["between/Transpose"]


def test_the_timestep_stays_in_float32_up_to_its_sinusoid_and_where_it_divides() -> None:
    nodes = [
        node("Mul", ["timestep", "frequencies"], "angle"),
        node("Sin", ["angle"], "sin"),
        node("Concat", ["sin", "sin"], "cat", axis=1),
        node("MatMul", ["cat", "w"], "embedding"),
        node("Div", ["embedding", "timestep"], "y"),
    ]
    constants = {"frequencies": np.float32([[1.0, 0.7]]), "w": weights(4, 4)}
    lowered = lower(model(nodes, constants, {"timestep": ["batch", 1]}), "fp16")
    checked(lowered.model)
    assert lowered.report["fp32"] == {"timesteps": ["angle/Mul", "sin/Sin", "y/Div"]}
    # 0.7 * 999.5 is no number of float16, and its sine would be another one.
    found = run(emulated(lowered.model), timestep=np.float32([[999.5]]))
    expected = np.sin(np.float32([[999.5, 999.5 * 0.7] * 2])) @ constants["w"] / 999.5
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=1e-6)


def test_scales_of_a_resize_are_float32_by_the_standard() -> None:
    nodes = [node("Resize", ["x", "", "scales"], "r", mode="nearest"), node("Mul", ["r", "r"], "y")]
    constants = {"scales": np.float32([1, 1, 2, 2])}
    for precision in LOW:
        lowered = lower(model(nodes, constants, {"x": ["batch", 2, 3, 3]}), precision)
        assert kinds(named(checked(lowered.model))["r/Resize"]) == [PRECISIONS[precision].dtype.name, "FLOAT"]


def test_what_tells_of_a_shape_takes_any_type() -> None:
    nodes = [
        node("Mul", ["x", "x"], "a"),
        node("Shape", ["a"], "shape"),
        node("Expand", ["one", "shape"], "ones"),
        node("Add", ["a", "ones"], "y"),
    ]
    lowered = lower(model(nodes, {"one": np.float32(1)}), "fp16")
    assert sum(found.op_type == "Cast" for found in checked(lowered.model).graph) == 2
    np.testing.assert_array_equal(run(lowered.model, x=np.float32([[2, 3, 0, 1]])), [[5, 10, 1, 2]])


def test_an_output_that_is_used_inside_is_there_in_both_types() -> None:
    made = model([node("Mul", ["x", "x"], "y"), node("Add", ["y", "y"], "z")], {})
    made.graph.outputs.append(named(made)["z/Add"].outputs[0])
    checked(lower(made, "fp16").model)
    assert [value.name for value in made.graph.outputs] == ["y", "z"]
    assert kinds(named(made)["z/Add"]) == ["FLOAT16", "FLOAT16"]


def test_a_graph_with_subgraphs_is_refused() -> None:
    branch = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["o"])], "b", [], [helper.make_tensor_value_info("o", 1, None)]
    )
    nodes = [helper.make_node("If", ["yes"], ["y"], name="choice", then_branch=branch, else_branch=branch)]
    with pytest.raises(DpctlError, match="choice"):
        lower(model(nodes, {"yes": np.array(True)}), "fp16")


def test_emulation_shows_the_overflow_and_rounding_that_processor_kernels_leave_out() -> None:
    nodes = [node("Mul", ["x", "x"], "a"), node("Mul", ["a", "small"], "y")]
    x = np.float32([[300, 1.2345678, 0.1, 2]])

    def made() -> ir.Model:
        return lower(model(nodes, {"small": np.float32(2**-8)}), "fp16").model

    assert np.isfinite(run(made(), x=x)).all()  # 300 * 300 is no float16
    narrow = x.astype(np.float16)
    with np.errstate(over="ignore"):
        expected = narrow * narrow * np.float16(2**-8)
    np.testing.assert_array_equal(run(checked(emulated(made())), x=x), expected.astype(np.float32))


# --------------------------------------------------------------------------------------------------- whole networks


@pytest.fixture(scope="module")
def plain_graph(plain_exported: Path) -> Callable[[str], Lowered]:
    return lambda precision: lower(ir.load(plain_exported / "unet/model.fp32.onnx"), precision)


@pytest.mark.parametrize("precision", LOW)
def test_every_layer_with_weights_runs_low_between_statistics_in_float32(precision: str, plain_graph: Any) -> None:
    lowered = plain_graph(precision)
    require_policy(lowered, precision)
    assert lowered.report["not_lowered"] == {}


def require_policy(lowered: Lowered, precision: str) -> None:
    """Check types, casts, names and shapes of a lowered network."""
    low = PRECISIONS[precision].dtype.name
    graph = checked(lowered.model).graph
    for found in graph:
        if found.op_type in ("Conv", "Gemm", "MatMul"):
            assert set(kinds(found)) == {low}, found.name
        if "Normalization" in found.op_type or found.op_type in ("Softmax", "Sin", "Cos"):
            assert set(kinds(found)) == {"FLOAT"}, found.name
        if found.op_type == "Cast":
            before = found.inputs[0].producer()
            assert before is None or before.op_type != "Cast", found.name
    casts = [(found.inputs[0], found.attributes["to"].as_int()) for found in graph if found.op_type == "Cast"]
    assert len(set(casts)) == len(casts)
    assert "unknown operator" not in lowered.report["fp32"]
    names = [found.name for found in graph]
    assert len(set(names)) == len(names)
    assert all(value.shape is not None and value.dtype is not None for found in graph for value in found.outputs)


def test_the_same_graph_gives_the_same_bytes(plain_graph: Any) -> None:
    one, other = (ir.serde.serialize_model(plain_graph("bf16").model).SerializeToString() for _ in range(2))
    assert one == other


def test_float16_takes_half_the_bytes(plain_exported: Path, plain_graph: Any) -> None:
    lowered = plain_graph("fp16")
    held = sum(value.const_value.nbytes for value in lowered.model.graph.initializers.values())
    whole = ir.load(plain_exported / "unet/model.fp32.onnx")
    assert held < 0.6 * sum(value.const_value.nbytes for value in whole.graph.initializers.values())


@pytest.mark.trt
@pytest.mark.parametrize("precision", LOW)
def test_tensorrt_rtx_builds_it_strongly_typed(precision: str, plain_graph: Any, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    graph = plain_graph(precision).model
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse(ir.serde.serialize_model(graph).SerializeToString())
    assert parsed, [parser.get_error(number).desc() for number in range(parser.num_errors)]
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for number in range(network.num_inputs):
        value = network.get_input(number)
        assert value.dtype == trt.float32
        profile.set_shape(value.name, *([size, *value.shape[1:]] for size in (1, 2, 4)))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    assert network.get_output(0).dtype == trt.float32
    assert builder.build_serialized_network(network, config) is not None
