"""Names a reader knows: a node is called after the module it belongs to, `down_blocks.0.resnets.0.conv1/Conv`.

The exporter's own (`node_conv2d_3`, `val_138`) say nothing in a parser's error, a profile or an engine's layers.
"""

import ast
import re
from collections import Counter

import onnx_ir as ir

SCOPES = "pkg.torch.onnx.name_scopes"
# The wrapper's name for the network inside it.
PREFIX = re.compile(r"^(unet|vae|text_encoder)(\.|$)")


def name_after_modules(model: ir.Model) -> None:
    """Name every node, value and constant after its module; inputs, outputs and the model's parameters keep theirs.

    Needs the exporter's metadata, so it comes before they are cleared.
    """
    graph = model.graph
    kept = {value.name for value in (*graph.inputs, *graph.outputs)}
    taken: Counter[str] = Counter()
    for node in graph:
        name = _unique(f"{_module(node)}/{node.op_type}".lstrip("/"), taken)
        node.name = name
        for number, value in enumerate(node.outputs):
            if value.name not in kept:
                value.name = name if number == 0 else f"{name}:{number}"
    _name_constants(graph, taken)


def _module(node: ir.Node) -> str:
    """Return the path of the module that a node belongs to, empty where it is the network itself."""
    scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
    # The last scope is the operation's own name; some nodes have a remark in a module's place.
    modules = [scope for scope in scopes[:-1] if PREFIX.match(scope)]
    return PREFIX.sub("", modules[-1]) if modules else ""


def _name_constants(graph: ir.Graph, taken: Counter[str]) -> None:
    """Name the parameters by their path in the UNet, and what the exporter folded after the node that reads it."""
    for value in list(graph.initializers.values()):
        uses = list(value.uses())
        if PREFIX.match(str(value.name)):
            name = PREFIX.sub("", str(value.name))
        elif uses:
            name = f"{uses[0].node.name}.{uses[0].idx}"
        else:
            continue
        value.name = _unique(name, taken)


def _unique(name: str, taken: Counter[str]) -> str:
    taken[name] += 1
    return name if taken[name] == 1 else _unique(f"{name}_{taken[name]}", taken)
