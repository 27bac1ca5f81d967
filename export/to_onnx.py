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
from dpctl.signature import Signature, Sizes, check_batch, of_unet, rows_of
from export import engines, golden, verify, yardstick
from export.components import export_components, load_components
from export.graph import write_graph
from export.memory import release
from export.precision import PRECISIONS
from export.worst import worst_tensor
from runtime.backends.eager import EagerDenoiser
from runtime.backends.ort import require
from runtime.network import Network


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
    with artifact.writing(out, force=force) as directory, bar("export", 4 if recipe.engine else 3) as advance:
        manifest, failure = fill(directory, model, out, recipe, advance)
        if failure is not None and not keep_failed:
            raise failure
        if recipe.engine is not None and failure is None:
            del model  # a builder needs memory for itself
            release()
            manifest = engines.add_engine(directory, manifest, recipe.engine, advance)
    if failure is not None:
        raise failure
    return manifest


def fill(
    directory: Path, model: Model, out: Path, recipe: ExportRecipe, advance: progress.Advance = progress.silent
) -> tuple[Manifest, GateError | None]:
    """Export `model` into an empty directory that is to become `out`; return its manifest and what the gate says.

    `recipe` is checked and has the flavor of its engine chosen, which is not built here. Raises a DpctlError for what
    cannot be exported.
    """
    require()
    config = {**model.unet.config, "_class_name": type(model.unet).__name__}
    signature = of_unet(config, rows_of(config, recipe.batch), recipe.size)
    network = Network(model.unet).eval()
    # Loaded first: what is wrong with them costs no export.
    others = load_components(model, signature, recipe.batch) if recipe.components else []
    write_components(model, directory)
    graph = directory / "unet" / f"model.{recipe.precision}.onnx"
    told = write_graph(network, signature, graph, {"parent_digest": model.digest}, recipe.precision)
    parts = export_components(others, model.digest, directory)
    release()
    advance(1)
    made = golden.make(network, EagerDenoiser(model.unet), model.scheduler, signature)
    golden.store(directory, made)
    manifest = _recorded(directory, model, recipe, signature, told, parts)
    advance(1)
    manifest = _checked(directory, manifest, model, network)
    advance(1)
    return manifest, _breach(manifest, out)


def _recorded(
    directory: Path,
    model: Model,
    recipe: ExportRecipe,
    signature: Signature,
    told: dict[str, Any],
    components: dict[str, Any],
) -> Manifest:
    """Write the manifest of what was exported, before anything of it has run; `told` is of the graph's precision."""
    parity = {"verdict": verify.NOT_RUN, "precision": recipe.precision, "opset": PRECISIONS[recipe.precision].opset}
    return artifact.write_manifest(
        directory,
        kind="exported",
        recipe=to_dict(recipe),
        stats=(model.manifest.stats if model.manifest is not None else {})
        | cost.stats(model.unet)
        | {"bytes": cost.file_bytes(directory), "precision": told},
        signature=signature.to_json(),
        parity=parity | ({"components": components} if components else {}),
        **artifact.descent(model.manifest, model.digest, model.source),
    )


def _breach(manifest: Manifest, out: Path) -> GateError | None:
    """Return what the gate says against an export, if anything."""
    try:
        verify.gate(manifest.parity or {}, out)
    except GateError as problem:
        return problem
    return None


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
    """Run the graph from the directory as a later machine will; record the parity in the manifest, passed or failed."""
    signature, precision = Signature.from_json(manifest.signature), manifest.recipe["precision"]
    # From the file: what a later machine will read is what is checked here.
    read, scheduler = golden.load(directory, signature), model.scheduler.config
    own: dict[str, Any] = {}
    if precision != verify.FP32:
        own = {"yardstick": yardstick.of_torch(model.unet, precision, read, signature, scheduler)}
        own["checks"] = {"torch at this precision": yardstick.verdict(own["yardstick"])}
    with verify.opened(directory) as (denoiser, _):
        measured = verify.measure(denoiser, read, signature, scheduler, own.get("yardstick"))
        measured["checks"] |= own.pop("checks", {}) | verify.on_device(precision, "ort", denoiser.device)
    release()
    components = (manifest.parity or {}).get("components", {})
    measured["verdict"] = verify.overall(measured["checks"] | components)
    measured["worst"] |= _worst_tensor(directory, manifest, network, read, measured)
    manifest = dataclasses.replace(manifest, parity={**(manifest.parity or {}), **own, **measured})
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def _worst_tensor(
    directory: Path, manifest: Manifest, network: Network, read: golden.Golden, measured: dict[str, Any]
) -> dict[str, Any]:
    """Return the layer that is off the most at the worst timestep, with its error; nothing where no names fit."""
    row = [entry["timestep"] for entry in measured["timesteps"]].index(measured["worst"]["timestep"])
    inputs = {
        tensor["name"]: read.grid[tensor["name"]][row : row + 1] for tensor in (manifest.signature or {})["inputs"]
    }
    with verify.checkable(directory, manifest) as graph:
        return worst_tensor(network, graph, inputs) or {}
