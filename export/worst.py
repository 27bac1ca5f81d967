"""Which layer of a graph is off the most: torch's layers against the tensors that bear their names."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# What a rounding written into the graph adds to a tensor's name.
ROUNDED = ".rounded"
LAYERS = (nn.Conv2d, nn.Linear, nn.GroupNorm, nn.LayerNorm)


def worst_tensor(network: nn.Module, graph: Path, inputs: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Return the tensor of the graph that is off the most, with its relative L2; None where no names fit.

    `inputs` is one row of the golden grid. Layers that torch runs more than once in a pass are left out.
    """
    expected = _layer_outputs(network, inputs)
    found = _graph_outputs(graph, set(expected), inputs)
    errors = {}
    for tensor, (layer, values) in found.items():
        wanted = expected[layer]
        if values.shape == wanted.shape:
            difference = (values.double() - wanted.double()).norm() / wanted.double().norm().clamp_min(1e-30)
            errors[tensor] = float(difference) if values.isfinite().all() else float("inf")
    if not errors:
        return None
    name = max(errors, key=errors.__getitem__)
    return {"tensor": name.removesuffix(ROUNDED), "tensor_relative_l2": errors[name]}


def _layer_outputs(network: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    twice: set[str] = set()

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            if name in outputs:
                twice.add(name)
            outputs[name] = output.detach()

        return hook

    hooks = [
        module.register_forward_hook(keep(name.removeprefix("unet.")))
        for name, module in network.named_modules()
        if isinstance(module, LAYERS)
    ]
    try:
        with torch.inference_mode():
            network(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: value for name, value in outputs.items() if name not in twice}


def _graph_outputs(graph: Path, layers: set[str], inputs: Mapping[str, Tensor]) -> dict[str, tuple[str, Tensor]]:
    """Run the graph with the last tensor of every layer as an output; return tensor -> (layer, values)."""
    import onnx

    from runtime.backends.ort import run_graph

    model = onnx.load(graph, load_external_data=False)
    last = {node.name.rpartition("/")[0]: node.output[0] for node in model.graph.node}
    given = {value.name for value in model.graph.output}
    wanted = {tensor: layer for layer, tensor in last.items() if layer in layers}
    model.graph.output.extend(onnx.ValueInfoProto(name=tensor) for tensor in wanted if tensor not in given)
    # Beside the graph: weights in a file of their own are looked for there.
    with tempfile.NamedTemporaryFile(dir=graph.parent, suffix=".onnx") as file:
        file.write(model.SerializeToString())
        file.flush()
        outputs = run_graph(Path(file.name), {name: value.numpy() for name, value in inputs.items()}, list(wanted))
    return {
        tensor: (layer, torch.from_numpy(values).float())
        for (tensor, layer), values in zip(wanted.items(), outputs, strict=True)
    }
