"""What TensorRT's profiler tells, and which modules its layers come from: the engine's file of layers says that."""

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from runtime.layers import JOINED, LayerTime, modules_of

# How the builder notes the nodes of the graph that a layer computes.
NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")


def profiler_of(library: ModuleType) -> Any:
    """Return a profiler of a library, which keeps what it is told: `told` lists (layer, milliseconds)."""

    class Profiler(library.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            library.IProfiler.__init__(self)
            self.told: list[tuple[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            self.told.append((layer_name, ms))

    return Profiler()


def read_layers(path: Path | None) -> dict[str, Mapping[str, Any]]:
    """Return the rows of an engine's file of layers by name; of an engine without one, none."""
    if path is None or not path.is_file():
        return {}
    told = json.loads(path.read_text(encoding="utf-8"))
    rows = [row for row in told.get("Layers") or told.get("layers") or [] if isinstance(row, dict)]
    return {str(row.get("Name") or row.get("name")): row for row in rows}


def named(told: Iterable[tuple[str, float]], layers: Mapping[str, Mapping[str, Any]]) -> list[LayerTime]:
    """Return what the profiler told under the modules' names: joined where a layer computes several of them."""
    found = []
    for layer, milliseconds in told:
        row = layers.get(layer, {})
        nodes = NODE.findall(str(row.get("Metadata", ""))) or layer.split(JOINED)
        kind = row.get("LayerType") or row.get("type") or "kernel"
        found.append(LayerTime(modules_of(nodes), str(kind), milliseconds / 1000))
    return found
