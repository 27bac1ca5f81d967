"""What the manifest of an exported directory records of it, read strictly (stdlib only).

Whoever changed `dpctl.json` by hand, or has a damaged one, gets an error that names the entry.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpctl.artifact import MANIFEST, Manifest
from dpctl.errors import DpctlError
from dpctl.signature import BATCH, HEIGHT, OUTPUT, WIDTH, Signature

VERDICTS = ("passed", "failed", "not run here")
TEXTS = frozenset({"reason", "tensor", "output", "module", "headroom_module"})
FIGURES = frozenset(
    {
        *("timestep", "batch", "relative_l2", "max_abs", "max_over_std", "error", "allowed", "tensor_relative_l2"),
        *("ssim", "at_least", "steps", "largest_relative_l2", "largest"),
        *("headroom", "headroom_largest", "headroom_timestep"),
    }
)
# Of these all are there, or none.
TOGETHER = (
    ("error", "allowed"),
    ("ssim", "at_least", "steps"),
    ("headroom", "headroom_largest", "headroom_module"),
)
# Of a yardstick: errors, a list each.
ERRORS = ("relative_l2", "guided_relative_l2", "other_size_relative_l2")
# Of an engine's summary: what it may be.
ENGINE: dict[str, Any] = {
    "precision": str,
    "targets": list,
    "size_bytes": int,
    "weights_bytes": int | None,
    "activation_bytes": int | None,
    "build_s": int | float,
}


def check(manifest: Manifest, where: Path) -> None:
    """Raise a DpctlError for what is recorded of the export in `where` and is not of its kind."""
    try:
        if manifest.parity:
            _parity(manifest.parity)
        if manifest.signature is not None:
            _signature(Signature.from_json(manifest.signature))
        _recipe(manifest.recipe, manifest.parity or {})
        _stats(manifest.stats)
    except (DpctlError, ValueError) as problem:
        got = f"{where / MANIFEST}: {problem.got if isinstance(problem, DpctlError) else problem}"
        todo = "copy the directory again, or export the model again"
        raise DpctlError("what the manifest records of the export cannot be read", got, todo) from None


def precision_of(manifest: Manifest, where: Path) -> str:
    """Return the precision of an export's graph; a DpctlError unless its recipe, parity and graph agree on one."""
    precision = manifest.recipe.get("precision")
    if (manifest.parity or {}).get("precision") != precision or f"unet/model.{precision}.onnx" not in manifest.files:
        got = f"{where / MANIFEST}: precision {precision}"
        raise DpctlError("the graph is not of the precision in the manifest", got, "export the model again")
    return str(precision)


def _signature(signature: Signature) -> None:
    """Raise a ValueError unless these are the tensors of a UNet: every one has a batch, and a picture goes in."""
    shapes = {tensor.name: tensor.shape for tensor in signature.inputs}
    if len(shapes.get("sample", ())) != 4 or len(shapes.get("timestep", ())) != 1 or len(signature.outputs) != 1:
        raise ValueError(f"signature: inputs {shapes}, {len(signature.outputs)} outputs")
    sized = {BATCH, HEIGHT, WIDTH} if signature.sizes is not None else {BATCH}
    for tensor in (*signature.inputs, *signature.outputs):
        named = {axis for axis in tensor.shape if isinstance(axis, str)}
        if tensor.shape[:1] != (BATCH,) or not named <= sized:
            raise ValueError(f"signature: {tensor.name} has the axes {list(tensor.shape)}")
    if signature.outputs[0].name != OUTPUT:
        raise ValueError(f"signature: the output is {signature.outputs[0].name}")


def _parity(parity: Mapping[str, Any]) -> None:
    _verdict(parity, "parity")
    _row(parity.get("worst", {}), "parity: worst")
    for entry in ("checks", "components"):
        for name, found in _table(parity.get(entry, {}), f"parity: {entry}").items():
            _verdict(found, f"parity: {entry}: {name}")
    for row in _list(parity.get("timesteps", []), "parity: timesteps"):
        _row(row, "parity: timesteps")
    if "yardstick" in parity:
        _yardstick(_table(parity["yardstick"], "parity: yardstick"))


def _verdict(values: Any, what: str) -> None:
    """Raise a ValueError unless this is a verdict with figures, of one check or of several."""
    if _row(values, what).get("verdict") not in VERDICTS:
        raise ValueError(f"{what}: verdict is {values.get('verdict')!r}")
    _row(values.get("worst", {}), f"{what}: worst")


def _row(values: Any, what: str) -> Mapping[str, Any]:
    """Return a table of figures and texts."""
    found = _table(values, what)
    for name, value in found.items():
        figure, text = name in FIGURES and not _number(value), name in TEXTS and not isinstance(value, str)
        if figure or text or (name == "finite" and not isinstance(value, bool)):
            raise ValueError(f"{what}: {name} is {value!r}")
    for names in TOGETHER:
        missing = [name for name in names if name not in found]
        if 0 < len(missing) < len(names):
            raise ValueError(f"{what}: no {', '.join(missing)}")
    return found


def _yardstick(own: Mapping[str, Any]) -> None:
    for name in ERRORS:
        for error in _list(own.get(name, []), f"yardstick: {name}"):
            if error is not None and not (_number(error) and 0 <= error < float("inf")):
                raise ValueError(f"yardstick: {name} holds {error!r}")
    if not (_number(own.get("samples_ssim", 1.0)) and -1 <= own.get("samples_ssim", 1.0) <= 1):
        raise ValueError(f"yardstick: samples_ssim is {own['samples_ssim']!r}")


def _recipe(recipe: Mapping[str, Any], parity: Mapping[str, Any]) -> None:
    for precision in (recipe.get("precision", ""), parity.get("precision", "")):
        if not (isinstance(precision, str) and re.fullmatch(r"\w*", precision)):
            raise ValueError(f"precision is {precision!r}")
    batch = recipe.get("batch", [1, 1, 1])
    if not (isinstance(batch, list) and len(batch) == 3 and all(isinstance(size, int) for size in batch)):
        raise ValueError(f"recipe: batch is {batch!r}")


def _stats(stats: Mapping[str, Any]) -> None:
    for name, engine in _table(stats.get("engines", {}), "engines").items():
        for entry, kind in ENGINE.items():
            if not isinstance(_table(engine, f"engines: {name}").get(entry), kind):
                raise ValueError(f"engines: {name}: {entry} is {engine.get(entry)!r}")
        if not all(isinstance(target, str) for target in engine["targets"]):
            raise ValueError(f"engines: {name}: targets are {engine['targets']}")
    _table(_table(stats.get("precision", {}), "stats: precision").get("not_lowered", {}), "not_lowered")


def _table(values: Any, what: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise ValueError(f"{what} is {values!r}")
    return values


def _list(values: Any, what: str) -> list[Any]:
    if not isinstance(values, list):
        raise ValueError(f"{what} is {values!r}")
    return values


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
