"""`dpctl export`: in one process, or where an engine is wanted too, one process per step."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dpctl import artifact, options, progress
from dpctl.errors import DpctlError
from dpctl.printing import print_report
from dpctl.recipe import EngineRecipe, ExportRecipe, to_dict

EXPORT, ENGINE = ExportRecipe(), EngineRecipe()
REFUSED = 3  # the exit code of a gate that was not met


def export(
    context: typer.Context,
    model: options.ModelArgument,
    out: options.Out,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16, written into the graph.")] = EXPORT.precision,
    batch: Annotated[
        str, typer.Option(help="MIN,OPT,MAX of images at a time; guidance doubles the UNet's batch.")
    ] = "1,8,64",
    dynamic_size: options.DynamicSize = None,
    components: options.Components = False,
    keep_failed: options.KeepFailed = False,
    trt: options.Trt = False,
    trt_flavor: options.TrtFlavor = ENGINE.flavor,
    compute_capability: options.ComputeCapability = None,
    workspace: options.Workspace = None,
    optimization_level: options.OptimizationLevel = None,
    version_compatible: options.VersionCompatible = False,
    hardware_compatible: options.HardwareCompatible = False,
    refit: options.Refit = False,
    tf32: options.Tf32 = False,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Export a model to ONNX and check it against torch; a breach of tolerance exits 3 and leaves nothing."""
    engine = options.engine(
        trt,
        flavor=trt_flavor,
        compute_capability=compute_capability,
        workspace_gib=workspace,
        optimization_level=optimization_level,
        version_compatible=version_compatible,
        hardware_compatible=hardware_compatible,
        refit=refit,
        tf32=tf32,
    )
    recipe = ExportRecipe(
        precision=precision,
        batch=options.three(batch, "--batch"),
        size=options.three(dynamic_size, "--dynamic-size") if dynamic_size is not None else None,
        components=components,
        engine=engine,
    )
    if engine is not None and is_unexported(model):
        manifest = export_in_steps(model, out, recipe, force=force, keep_failed=keep_failed)
    else:
        manifest = _export_here(context, model, out, recipe, force, keep_failed)
    from dpctl import inspect

    print_report(inspect.report(manifest, out), json_)


def _export_here(
    context: typer.Context, model: str, out: Path, recipe: ExportRecipe, force: bool, keep_failed: bool
) -> Any:
    from dpctl.models import load_model, resolve
    from export.engines import export_engine, is_exported
    from export.to_onnx import export_model

    if recipe.engine is not None and is_exported(model):
        options.refuse_decided(context, model)
        return export_engine(resolve(model), out, recipe.engine, force=force, bar=progress.bar)
    return export_model(load_model(model), out, recipe, force=force, keep_failed=keep_failed, bar=progress.bar)


def is_unexported(model: str) -> bool:
    """Tell, without loading anything, whether a model lies here and is none that was exported."""
    if model != "reference" and not (model and Path(model).is_dir()):
        return False
    manifest = None if model == "reference" else artifact.read_manifest(Path(model))
    return manifest is None or manifest.kind != "exported"


def export_in_steps(
    model: str, out: Path, recipe: ExportRecipe, *, force: bool = False, keep_failed: bool = False
) -> Any:
    """Export a model and build its engine, each in a process that ends with it; return the manifest of `out`.

    A step that fails has said why: this process exits as it did, and nothing is left. Raises a DpctlError for a step
    that was killed.
    """
    with artifact.writing(out, force=force) as directory:
        asked = {"model": model, "out": str(out), "recipe": to_dict(recipe)}
        code = run_step("graph", directory, **asked)
        if code == 0:
            code = run_step("engine", directory)
        if code and not (code == REFUSED and keep_failed):
            raise typer.Exit(code)
    if code:
        raise typer.Exit(code)
    return artifact.read_manifest(out)


def run_step(step: str, directory: Path, **asked: Any) -> int:
    """Run a step of an export in a process of its own and return its exit code; whatever ends this one ends it."""
    told = json.dumps({"step": step, "directory": str(directory), **asked})
    command = [sys.executable, "-P", "-m", "dpctl.export_step"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, text=True) as process:
        try:
            process.communicate(told)
        except BaseException:  # asked to end: `subprocess.run` would not wait until the step is gone
            process.kill()
            process.wait()
            raise
    code = process.returncode
    if code < 0:
        name = signal.Signals(-code).name
        todo = "free memory, or export and build in two commands" if name == "SIGKILL" else "try again"
        raise DpctlError(f"the step of the export that makes the {step} was killed", name, todo)
    return code
