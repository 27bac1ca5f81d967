"""New weights into an engine that was built for it, instead of building it again."""

import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpctl import artifact, progress
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError
from dpctl.models import load_model, resolve
from dpctl.recipe import ExportRecipe, from_dict
from export import engines as exported_engines
from export import to_tensorrt
from export.to_onnx import export_model
from runtime import engine as engines
from runtime.backends.ort import exported, refuse_failed
from runtime.backends.trt import capability_of, require
from runtime.engine import NAMES, EngineManifest


def refit(
    engine: Path,
    model: str,
    out: Path | None = None,
    *,
    force: bool = False,
    bar: progress.Bar = progress.no_bar,
) -> Manifest:
    """Put the weights of `model` into `engine`; write both, graph and engine, as the exported directory `out`.

    `model` is exported as the engine's directory was, with its parity check, or is an exported directory already.
    Without `out` the engine's own directory is replaced. Raises a DpctlError, and changes nothing, for an engine that
    was not built for it, a model of another shape, and a machine that cannot load the engine.
    """
    if force and out is None:
        todo = "leave it out: without --out the engine's own directory is replaced"
        raise DpctlError("--force is for another directory", "no --out", todo)
    if not engine.is_file():
        got = f"{engine}, a directory" if engine.is_dir() else str(engine)
        raise DpctlError("no such engine", got, "give the file that ends with .engine, in unet/ of its directory")
    engine = engine.resolve()  # its directory is two above, wherever one stands
    source = engine.parent.parent
    manifest = exported(source, "trt")
    about = _refittable(engine)
    if out is None:
        _refuse_other_engines(engine, manifest)
    _loadable(engine, about)
    graph = next(name for name in about.onnx if name.endswith(".onnx"))
    with _exported_like(manifest, model, bar) as new, bar("refit", 1) as advance:
        require_same_shape(engine.with_name(graph), new / "unet" / graph)
        with artifact.writing(out or source, force=force or out is None) as directory:
            shutil.copytree(new, directory, dirs_exist_ok=True)
            written = _write(engine, about, directory, directory / "unet" / graph)
        advance(1, engine=NAMES[about.flavor])
        return written


def _refittable(engine: Path) -> EngineManifest:
    """Return the manifest of an engine that takes new weights; a DpctlError for any other."""
    about = engines.read(engine)
    recipe = about.engine_recipe
    if not recipe.refit:
        todo = f"build it once more: {engines.rebuild(engine, dataclasses.replace(recipe, refit=True))}"
        raise DpctlError("the engine was not built to be refitted", str(engine), todo)
    return about


def _refuse_other_engines(engine: Path, manifest: Manifest) -> None:
    others = [name for name in manifest.files if name.endswith(".engine") and name != f"unet/{engine.name}"]
    if others:
        todo = "give another directory with --out, which will hold the refitted one alone"
        raise DpctlError("other engines of this directory would keep the old weights", ", ".join(others), todo)


def _loadable(engine: Path, about: EngineManifest) -> None:
    """Raise a DpctlError unless this machine can load the engine: before the model is exported, and before any byte."""
    library, device = require(about.flavor), _gpu()
    if device is None:
        got = f"{engine.name}, and no GPU that torch can use"
        todo = "refit it on the machine that runs it; an exported directory will do for the model"
        raise DpctlError("an engine is refitted on the GPU that it is for", got, todo)
    here = {"capability": capability_of(device), "gpu": torch.cuda.get_device_name(device)}
    engines.check(engine, about, version=library.__version__, **here)


def _gpu() -> torch.device | None:
    return torch.device("cuda") if torch.cuda.is_available() else None


@contextmanager
def _exported_like(manifest: Manifest, model: str, bar: progress.Bar) -> Iterator[Path]:
    """Give an exported directory of the model, with the precision and the ranges of an earlier export."""
    if exported_engines.is_exported(model):
        given = resolve(model)
        found = exported(given)
        refuse_failed(given, found)
        artifact.verify_files(given, found)
        _require_same_signature(manifest, found)
        yield given
        return
    values = {name: value for name, value in manifest.recipe.items() if name != "engine"}
    with tempfile.TemporaryDirectory(prefix="dpctl-refit-") as scratch:
        recipe = from_dict(ExportRecipe, values, "the recipe of the export")
        found = export_model(load_model(model), Path(scratch) / "exported", recipe, bar=bar)
        _require_same_signature(manifest, found)
        yield Path(scratch) / "exported"


def _require_same_signature(manifest: Manifest, found: Manifest) -> None:
    old, new = ((each.recipe.get("precision"), each.signature) for each in (manifest, found))
    if old != new:
        got = f"precision {new[0]} against {old[0]}" if old[0] != new[0] else "other inputs, outputs or ranges"
        raise DpctlError("the model does not fit the engine", got, "give a model of the same shape, or build an engine")


def require_same_shape(old: Path, new: Path) -> None:
    """Raise a DpctlError unless two ONNX graphs differ in nothing but the values of their weights."""
    (weights, nodes), (new_weights, new_nodes) = (_shape(path) for path in (old, new))
    odd = next((name for name in {**weights, **new_weights} if weights.get(name) != new_weights.get(name)), None)
    if odd is not None:
        got = f"{odd}: {_told(new_weights.get(odd))} against {_told(weights.get(odd))} in the engine"
    elif nodes != new_nodes:
        pairs = zip(nodes, new_nodes, strict=False)
        got = next((f"the operation {b[0]} against {a[0]}" for a, b in pairs if a != b), "more or fewer operations")
    else:
        return
    todo = "give a model of the same architecture and widths, or build a new engine with `dpctl export --trt`"
    raise DpctlError("the model is not of the engine's shape", got, todo)


def _shape(path: Path) -> tuple[dict[str, tuple[Any, ...]], list[tuple[str, bytes]]]:
    """Return what two graphs of one architecture have in common: weights as type and dims, constants, operations."""
    import onnx

    graph = onnx.load(path, load_external_data=False).graph
    floats = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
    weights: dict[str, tuple[Any, ...]] = {}
    for tensor in graph.initializer:
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        # Of whole numbers, which are shapes and axes, the values count too.
        values = () if tensor.data_type in floats else tuple(onnx.numpy_helper.to_array(tensor).ravel().tolist())
        weights[tensor.name] = (kind, tuple(tensor.dims), values)
    return weights, [(node.name, node.SerializeToString(deterministic=True)) for node in graph.node]


def _told(weight: tuple[Any, ...] | None) -> str:
    if weight is None:
        return "none"
    kind, dims, values = weight
    return f"{kind} {list(dims)}" + (f" = {list(values)}" if values else "")


def _write(engine: Path, about: EngineManifest, directory: Path, graph: Path) -> Manifest:
    """Write the refitted engine into an exported directory that is being written; return its manifest."""
    written = directory / "unet" / engine.name
    written.write_bytes(to_tensorrt.refitted(engine, about, graph))
    about = dataclasses.replace(
        about,
        sha256=artifact.hash_file(written),
        size_bytes=written.stat().st_size,
        onnx=engines.graph_digests(graph),
    )
    engines.sidecar(written).write_text(about.to_json(), encoding="utf-8")
    shutil.copyfile(engines.layers(engine), engines.layers(written))
    manifest = artifact.read_manifest(directory)
    assert manifest is not None  # it was exported a moment ago
    return exported_engines.record(directory, manifest, written, about)
