"""UNet -> ONNX by signature, published only when it gives what torch gives."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpctl import artifact, cost, progress
from dpctl.artifact import MANIFEST, Manifest
from dpctl.errors import DpctlError, GateError
from dpctl.models import Model, copy_components, read_config
from dpctl.recipe import ExportRecipe, to_dict
from dpctl.signature import Signature, Sizes, check_batch, of_unet
from export import engines, golden, verify
from export.graph import OPSET, write_graph
from export.worst import worst_tensor
from runtime.backends.eager import EagerDenoiser
from runtime.backends.ort import open_denoiser, require
from runtime.network import Network

PRECISIONS = ("fp32",)


def export_model(
    model: Model,
    out: Path,
    recipe: ExportRecipe | None = None,
    *,
    force: bool = False,
    keep_failed: bool = False,
    bar: progress.Bar = progress.no_bar,
) -> Manifest:
    """Export `model` to the directory `out`: ONNX graph, golden values, signature and parity.

    Raises a DpctlError for what cannot be exported and a GateError where the graph and torch disagree; `out` is not
    written then, unless a failed one is to be kept.
    """
    recipe = recipe or ExportRecipe()
    check(recipe)
    recipe = engines.chosen(recipe)
    require()
    signature = of_unet({**model.unet.config, "_class_name": type(model.unet).__name__}, recipe.batch, recipe.size)
    network = Network(model.unet).eval()
    failure: GateError | None = None
    with artifact.writing(out, force=force) as directory, bar("export", 4 if recipe.engine else 3) as advance:
        write_components(model, directory)
        graph = directory / "unet" / f"model.{recipe.precision}.onnx"
        write_graph(network, signature, graph, {"parent_digest": model.digest})
        advance(1)
        made = golden.make(network, EagerDenoiser(model.unet), model.scheduler, signature)
        golden.store(directory, made)
        manifest = artifact.write_manifest(
            directory,
            kind="exported",
            recipe=to_dict(recipe),
            stats=(model.manifest.stats if model.manifest is not None else {})
            | cost.stats(model.unet)
            | {"bytes": cost.file_bytes(directory)},
            signature=signature.to_json(),
            parity={"verdict": verify.NOT_RUN, "precision": recipe.precision, "opset": OPSET},
            **artifact.descent(model.manifest, model.digest, model.source),
        )
        advance(1)
        manifest = _checked(directory, manifest, model, network)
        advance(1)
        try:
            verify.gate(manifest.parity or {}, out)
        except GateError as problem:
            if not keep_failed:
                raise
            failure = problem
        if recipe.engine is not None and failure is None:
            manifest = engines.add_engine(directory, manifest, recipe.engine, advance)
    if failure is not None:
        raise failure
    return manifest


def check(recipe: ExportRecipe) -> None:
    """Raise a DpctlError for an unknown precision, an impossible range and an engine that cannot be built here."""
    if recipe.precision not in PRECISIONS:
        raise DpctlError("unknown precision", repr(recipe.precision), f"choose one of: {', '.join(PRECISIONS)}")
    check_batch(recipe.batch)
    if recipe.size is not None:
        Sizes(recipe.size)
    engines.chosen(recipe)


def write_components(model: Model, directory: Path) -> None:
    """Write everything of a runnable pipeline but the graph: the other components and the network's config."""
    copy_components(model.directory, directory)
    (directory / "unet").mkdir()
    # With the defaults that a hand-written config leaves out: the runtime reads it without building the network.
    defaults = {name: value for name, value in model.unet.config.items() if not name.startswith("_")}
    _write_json(directory / "unet" / "config.json", defaults | read_config(model.directory))
    if not (directory / "scheduler").is_dir():
        model.scheduler.save_pretrained(directory / "scheduler")
    index = directory / "model_index.json"
    if not index.is_file():  # it was a bare UNet
        components = {"unet": model.unet, "scheduler": model.scheduler}
        named = {name: ["diffusers", type(component).__name__] for name, component in components.items()}
        _write_json(index, {"_class_name": "DDPMPipeline", **named})


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _checked(directory: Path, manifest: Manifest, model: Model, network: Network) -> Manifest:
    """Run the graph as the runtime will, from the directory; record the parity in the manifest, passed or failed."""
    signature = Signature.from_json(manifest.signature)
    # From the file: what a later machine will read is what is checked here.
    read = golden.load(directory, signature)
    with open_denoiser(directory, failed=True) as denoiser:
        measured = verify.measure(denoiser, read, signature, model.scheduler.config)
    worst = measured["worst"]
    row = [entry["timestep"] for entry in measured["timesteps"]].index(worst["timestep"])
    inputs = {tensor.name: read.grid[tensor.name][row : row + 1] for tensor in signature.inputs}
    graph = directory / "unet" / f"model.{manifest.recipe['precision']}.onnx"
    worst |= worst_tensor(network, graph, inputs) or {}
    manifest = dataclasses.replace(manifest, parity={**(manifest.parity or {}), **measured})
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest
