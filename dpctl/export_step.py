"""One step of an export in a process of its own: `python -m dpctl.export_step` with what to do as JSON on stdin.

torch, ONNX Runtime and TensorRT's builder hold hundreds of megabytes each for as long as their process lives, and the
exporter's graph holds the weights. `dpctl export MODEL --trt` has no more of them at a time than its larger step.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Any

from dpctl import artifact, progress
from dpctl.errors import DpctlError, GateError
from dpctl.recipe import ExportRecipe, from_dict

INTERRUPTED = 130  # as a shell says it


def graph(directory: Path, model: str, out: Path, recipe: ExportRecipe) -> GateError | None:
    """Export a model into an empty directory that is to become `out`; return what the gate says against it."""
    from dpctl.models import load_model
    from export import engines, to_onnx

    to_onnx.check(recipe)
    with progress.bar("export", 3) as advance:
        return to_onnx.fill(directory, load_model(model), out, engines.chosen(recipe), advance)[1]


def engine(directory: Path) -> None:
    """Build the engine that the recipe of an exported directory names."""
    from export import engines

    manifest = artifact.read_manifest(directory)
    assert manifest is not None
    recipe = from_dict(ExportRecipe, manifest.recipe, str(directory)).engine
    assert recipe is not None
    with progress.bar("engine", 1) as advance:
        engines.add_engine(directory, manifest, recipe, advance)


def main() -> int:
    """Do the step that stdin names and return the exit code of a command that fails as it does."""
    # A terminal interrupts the command too, and it is the one to say so.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    told = sys.stdin.read()
    if not told:  # the command was ended before it had said what to do
        return INTERRUPTED
    asked: dict[str, Any] = json.loads(told)
    directory = Path(asked["directory"])
    try:
        if asked["step"] == "engine":
            engine(directory)
            return 0
        recipe = from_dict(ExportRecipe, asked["recipe"], "the recipe")
        failure = graph(directory, asked["model"], Path(asked["out"]), recipe)
        if failure is not None:
            raise failure
    except DpctlError as problem:
        sys.stderr.write(f"error: {problem}\n")
        return problem.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
