"""Engines in an exported directory: one is built from the graph that lies there, and the manifest says so."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

from dpctl import artifact, progress, recorded
from dpctl.artifact import MANIFEST, Manifest
from dpctl.models import resolve
from dpctl.recipe import EngineRecipe, ExportRecipe, to_dict
from dpctl.signature import Signature
from export import to_tensorrt
from runtime.backends.ort import exported, refuse_failed
from runtime.engine import NAMES, EngineManifest, layers, sidecar


def chosen(recipe: ExportRecipe) -> ExportRecipe:
    """Return the recipe with the flavor of its engine chosen; a DpctlError where it cannot be built here."""
    if recipe.engine is None:
        return recipe
    return dataclasses.replace(recipe, engine=to_tensorrt.check(recipe.engine, recipe.precision))


def is_exported(model: str) -> bool:
    """Tell whether a model is an exported directory."""
    manifest = artifact.read_manifest(resolve(model))
    return manifest is not None and manifest.kind == "exported"


def export_engine(
    source: Path, out: Path, recipe: EngineRecipe, *, force: bool = False, bar: progress.Bar = progress.no_bar
) -> Manifest:
    """Write `out`: the exported directory `source` and an engine built from its graph; the two may be the same.

    An earlier engine of the same name is replaced, damaged or not. Raises a DpctlError for a directory that was not
    exported or has changed since, and for an engine that cannot be built; `out` is as it was then.
    """
    manifest = exported(source, "trt")
    refuse_failed(source, manifest)
    precision = recorded.precision_of(manifest, source)
    recipe = to_tensorrt.check(recipe, precision)
    earlier = to_tensorrt.engine_path(source / "unet", recipe, precision)
    replaced = {path.relative_to(source).as_posix() for path in (earlier, sidecar(earlier), layers(earlier))}
    kept = {name: sha256 for name, sha256 in manifest.files.items() if name not in replaced}
    artifact.verify_files(source, dataclasses.replace(manifest, files=kept))
    with artifact.writing(out, force=force) as directory, bar("engine", 1) as advance:
        shutil.copytree(source, directory, dirs_exist_ok=True)
        return add_engine(directory, manifest, recipe, advance)


def add_engine(
    directory: Path, manifest: Manifest, recipe: EngineRecipe, advance: progress.Advance = progress.silent
) -> Manifest:
    """Build an engine in an exported directory that is being written; return its manifest, written anew.

    `recipe` has its flavor chosen.
    """
    advance(0, engine=told(recipe))
    precision = manifest.recipe["precision"]
    graph = directory / "unet" / f"model.{precision}.onnx"
    engine, about = to_tensorrt.build(graph, Signature.from_json(manifest.signature), recipe, precision)
    advance(1, engine=told(recipe))
    return record(directory, manifest, engine, about)


def record(directory: Path, manifest: Manifest, engine: Path, about: EngineManifest) -> Manifest:
    """Write `dpctl.json` anew with an engine that was put into its directory; return the manifest."""
    written = [engine, sidecar(engine), layers(engine), engine.with_suffix(to_tensorrt.CACHE)]
    files = {path.relative_to(directory).as_posix(): artifact.hash_file(path) for path in written if path.is_file()}
    manifest = dataclasses.replace(
        manifest,
        files=dict(sorted((manifest.files | files).items())),
        recipe=manifest.recipe | {"engine": to_dict(about.engine_recipe)},
        stats=manifest.stats | {"engines": manifest.stats.get("engines", {}) | {engine.name: summary(about)}},
    )
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def summary(about: EngineManifest) -> dict[str, Any]:
    """Return what the directory's own manifest repeats of an engine."""
    names = ("flavor", "version", "targets", "precision", "size_bytes", "weights_bytes", "activation_bytes", "build_s")
    return {name: getattr(about, name) for name in names}


def told(recipe: EngineRecipe) -> str:
    """Return who builds an engine and for what, in words."""
    version = to_tensorrt.require(recipe.flavor).__version__
    return f"{NAMES[recipe.flavor]} {version} for compute capability {', '.join(to_tensorrt.targets_of(recipe))}"
