"""bench.json: a `BenchResult` one to one, read strictly, older versions too."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

from dpctl.bench.result import SCHEMA_VERSION, BenchResult
from dpctl.errors import DpctlError

FILE = "bench.json"


def write_result(result: BenchResult, out: Path) -> None:
    """Write bench.json into `out`: whole or not at all."""
    temporary = out / f".{FILE}.writing"
    temporary.write_text(json.dumps(result.to_dict(), indent=1) + "\n", encoding="utf-8")
    temporary.replace(out / FILE)


def read_result(path: Path) -> BenchResult:
    """Read a bench.json, strictly; a DpctlError says what is wrong with it."""
    todo = "give a bench.json that this version of dpctl wrote, or measure again"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise DpctlError("the benchmark file cannot be read", f"{path}: {problem}", todo) from None
    version: Any = values.get("schema_version") if isinstance(values, dict) else type(values).__name__
    if version not in range(1, SCHEMA_VERSION + 1) or isinstance(version, bool):
        raise DpctlError("unknown benchmark format", f"{path}: schema_version {version!r}", todo)
    values.pop("summary", None)
    try:
        if version < SCHEMA_VERSION:
            values = _grown(BenchResult, values) | {"schema_version": SCHEMA_VERSION}
        return _build(BenchResult, values, "result")
    except (KeyError, TypeError, ValueError) as problem:
        raise DpctlError("the benchmark file is damaged", f"{path}: {problem}", todo) from None


def _grown(hint: Any, value: Any) -> Any:
    """Fill in what an older version had not: every entry since the first version has a default."""
    options = typing.get_args(hint)
    if isinstance(value, list) and options:
        return [_grown(options[0], inner) for inner in value]
    if not (dataclasses.is_dataclass(hint) and isinstance(value, dict)):
        return value
    hints = typing.get_type_hints(hint)
    new = {f.name: f for f in dataclasses.fields(hint) if f.name not in value and f.default is not dataclasses.MISSING}
    made: dict[str, Any] = {
        f.name: {} for f in dataclasses.fields(hint) if f.name not in value and f.default_factory is dict
    }
    known = {name: _grown(hints[name], inner) if name in hints else inner for name, inner in value.items()}
    plain = {name: list(f.default) if isinstance(f.default, tuple) else f.default for name, f in new.items()}
    return known | plain | made


def _build(hint: Any, value: Any, where: str) -> Any:
    """Make a value of the type `hint` from plain JSON; ValueError says where it does not fit."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is types.UnionType:
        return None if value is None else _build(options[0], value, where)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        hints = typing.get_type_hints(hint)
        unlike = sorted(hints.keys() ^ value.keys())
        if unlike:
            raise ValueError(f"{where}: entries missing or unknown: {', '.join(unlike)}")
        return hint(**{name: _build(hints[name], inner, f"{where}.{name}") for name, inner in value.items()})  # type: ignore[operator]
    if origin is tuple and isinstance(value, list):
        return tuple(_build(options[0], inner, f"{where}[{i}]") for i, inner in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _build(options[1], inner, f"{where}.{name}") for name, inner in value.items()}
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and type(value) is hint:
        return value
    raise ValueError(f"{where}: {value!r} is no {hint}")
