"""UNet -> ONNX by signature, published only when it gives what torch gives."""

import dataclasses
import json
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from dpctl import artifact, cost, environment, progress
from dpctl.artifact import MANIFEST, Manifest
from dpctl.errors import DpctlError
from dpctl.models import Model, copy_components, read_config
from dpctl.recipe import ExportRecipe, to_dict
from dpctl.signature import BATCH, Signature, check_batch, of_unet
from export import verify
from export.simplify import simplify
from runtime.backends.ort import open_denoiser, require
from runtime.network import Network

PRECISIONS = ("fp32",)
OPSET = 18
# A protobuf ends at 2 GiB; beyond, the weights lie in a file beside the graph.
LARGEST_GRAPH = 1_900_000_000


def export_model(
    model: Model,
    out: Path,
    *,
    precision: str = "fp32",
    batch: tuple[int, int, int] = (1, 8, 64),
    force: bool = False,
    bar: progress.Bar = progress.no_bar,
) -> Manifest:
    """Export `model` to the directory `out`: ONNX graph, golden outputs, signature and parity.

    Raises a DpctlError for what cannot be exported and a GateError where the graph and torch disagree; `out` is not
    written then.
    """
    recipe = ExportRecipe(precision=precision, batch=batch)
    check(recipe)
    require()
    if model.unet.config.get("cross_attention_dim") is not None:
        kind = type(model.unet).__name__
        raise DpctlError("this kind of network cannot be exported yet", kind, "bring one without text: a UNet2DModel")
    signature = of_unet({**model.unet.config, "_class_name": type(model.unet).__name__}, batch)
    network = Network(model.unet).eval()
    with artifact.writing(out, force=force) as directory, bar("export", 3) as advance:
        write_components(model, directory)
        write_graph(network, signature, directory / "unet" / f"model.{precision}.onnx", {"parent_digest": model.digest})
        advance(1)
        verify.save_golden(directory, golden_of(model, network, signature))
        manifest = artifact.write_manifest(
            directory,
            kind="exported",
            recipe=to_dict(recipe),
            stats=(model.manifest.stats if model.manifest is not None else {})
            | cost.stats(model.unet)
            | {"bytes": cost.file_bytes(directory)},
            signature=signature.to_json(),
            parity={"verdict": verify.NOT_RUN, "tolerance": verify.TOLERANCES[precision], "opset": OPSET},
            **artifact.descent(model.manifest, model.digest, model.source),
        )
        advance(1)
        manifest = _checked(directory, manifest)
        advance(1)
        return manifest


def check(recipe: ExportRecipe) -> None:
    """Raise a DpctlError for an unknown precision or an impossible batch range."""
    if recipe.precision not in PRECISIONS:
        raise DpctlError("unknown precision", repr(recipe.precision), f"choose one of: {', '.join(PRECISIONS)}")
    check_batch(recipe.batch)


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


def write_graph(network: Network, signature: Signature, path: Path, properties: dict[str, str]) -> None:
    """Write the ONNX graph of `network`: batch dynamic, named by the signature, checked by ONNX's own checker.

    The graph carries the signature, our version and `properties`, but nothing of this machine: the exporter's notes
    (stack traces with paths) are removed, so that the same model gives the same file.
    """
    import onnx

    # An example of batch 2: torch.export would take 1 for a constant.
    dtypes = {"float32": torch.float32, "int64": torch.int64}
    example = tuple(torch.zeros(tensor.at(2), dtype=dtypes[tensor.dtype]) for tensor in signature.inputs)
    axis = torch.export.Dim(BATCH, min=1)
    with _quiet(), torch.no_grad():
        program = torch.onnx.export(
            network,
            example,
            dynamo=True,
            verbose=False,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in signature.inputs],
            output_names=[tensor.name for tensor in signature.outputs],
            dynamic_shapes=tuple({0: axis} for _ in signature.inputs),
        )
        assert program is not None  # as it is with dynamo
        clear_notes(program)
        program.model = simplify(program.model)
        version = environment.version("dpctl-diffusion") or "unknown"
        told = {"dpctl_version": version, "signature": json.dumps(signature.to_json()), **properties}
        program.model.metadata_props.update(told)
        size = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
        program.save(path, external_data=size > LARGEST_GRAPH)
    onnx.checker.check_model(path, full_check=True)


def clear_notes(program: Any) -> None:
    """Remove the exporter's notes from an ONNX program: stack traces with the paths of this machine."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    ClearMetadataAndDocStringPass()(program.model)


def golden_of(model: Model, network: Network, signature: Signature) -> dict[str, Any]:
    """Return the golden inputs over the grid of the model's own timesteps, with torch's outputs."""
    grid = verify.timestep_grid(model.scheduler)
    return verify.make_golden(network, verify.golden_inputs(signature, grid, model.unet.config.num_class_embeds))


def _checked(directory: Path, manifest: Manifest) -> Manifest:
    """Run the graph as the runtime will, from the directory; pass the gate and record the parity in the manifest."""
    recorded = manifest.parity or {}
    signature = Signature.from_json(manifest.signature)
    with open_denoiser(directory) as denoiser:
        golden = verify.load_golden(directory, signature)
        parity = {**recorded, **verify.measure(denoiser, golden, signature, recorded["tolerance"])}
    verify.gate(parity, directory)
    manifest = dataclasses.replace(manifest, parity=parity)
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


@contextmanager
def _quiet() -> Iterator[None]:
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
