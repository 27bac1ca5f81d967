"""The UNet as an ONNX graph: by its signature, with the names of its modules, the same bytes for the same model."""

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dpctl import environment
from dpctl.signature import BATCH, HEIGHT, WIDTH, Signature
from export.names import name_after_modules
from export.precision import lower
from export.simplify import simplify

OPSET = 18
# A protobuf ends at 2 GiB; beyond, the weights lie in a file beside the graph.
LARGEST_GRAPH = 1_900_000_000
DTYPES = {"float32": torch.float32, "int64": torch.int64}


def write_graph(
    network: nn.Module, signature: Signature, path: Path, properties: dict[str, str], precision: str = "fp32"
) -> dict[str, Any]:
    """Write the ONNX graph of `network`: dynamic axes named by the signature, checked by ONNX's own checker.

    Returns what runs in which precision, see `export.precision.lower`.

    The graph carries the signature, our version and `properties`, but nothing of this machine: the exporter's notes
    (stack traces with paths) are removed, so that the same model gives the same file.
    """
    import onnx

    with quiet(), torch.no_grad():
        program = torch.onnx.export(
            network,
            kwargs=example(signature),
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in signature.inputs],
            output_names=[tensor.name for tensor in signature.outputs],
            dynamic_shapes=dynamic_shapes(signature),
        )
        assert program is not None  # as it is with dynamo
        _declare(program.model, signature)
        program.model = simplify(program.model)
        name_after_modules(program.model)
        clear_notes(program)
        lowered = lower(program.model, precision)
        version = environment.version("dpctl-diffusion") or "unknown"
        told = {
            "dpctl_version": version,
            "precision": precision,
            "signature": json.dumps(signature.to_json()),
            **properties,
        }
        program.model.metadata_props.update(told)
        size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
        program.save(path, external_data=size > LARGEST_GRAPH)
        let_go(program.model)
    onnx.checker.check_model(path, full_check=True)
    return lowered.report


def example(signature: Signature) -> dict[str, torch.Tensor]:
    """Return inputs by name, of batch 2: torch.export would take 1 for a constant."""
    return {
        tensor.name: torch.zeros(signature.shape(tensor, 2, _smallest(signature)), dtype=DTYPES[tensor.dtype])
        for tensor in signature.inputs
    }


def _smallest(signature: Signature) -> tuple[int, int] | None:
    """Return a size to trace at, small and of two different sides, so that none is taken for the other."""
    if signature.sizes is None:
        return None
    step = signature.sizes.step
    return 2 * step, 3 * step


def dynamic_shapes(signature: Signature) -> dict[str, dict[int, Any]]:
    """Return the dynamic axes of every input as torch.export wants them."""
    step = signature.sizes.step if signature.sizes else 1
    axes = {BATCH: torch.export.Dim(BATCH, min=1)}
    axes |= {name: step * torch.export.Dim(f"_{name}", min=1) for name in (HEIGHT, WIDTH)}
    return {
        tensor.name: {number: axes[axis] for number, axis in enumerate(tensor.shape) if isinstance(axis, str)}
        for tensor in signature.inputs
    }


def _declare(model: Any, signature: Signature) -> None:
    """Give the graph's inputs and outputs the axes of the signature; the exporter calls a height 8*_height."""
    import onnx_ir as ir

    declared = {tensor.name: tensor for tensor in (*signature.inputs, *signature.outputs)}
    for value in (*model.graph.inputs, *model.graph.outputs):
        value.shape = ir.Shape(declared[value.name].shape)


def clear_notes(program: Any) -> None:
    """Remove the exporter's notes from an ONNX program: stack traces with the paths of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program.model)


def let_go(model: Any) -> None:
    """Drop a graph's weights: the rewriter keeps the last graph that its rules matched, for as long as Python runs."""
    for value in model.graph.initializers.values():
        value.const_value = None


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporter: its notes are for its own authors."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
