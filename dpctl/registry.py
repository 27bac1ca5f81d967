"""A folder is a registry: every module file in it is an entry, and the file's name is the entry's name.

Names are read from the directory without importing anything, so that `--help` and error messages
can list them while torch stays unloaded.
"""

import difflib
import importlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

from dpctl.errors import DpctlError


@cache
def names(package: str) -> tuple[str, ...]:
    """Return the sorted CLI names found in `package`, e.g. ``"dpctl.prune.criteria"``.

    The file ``diff_pruning.py`` is the name ``diff-pruning``; files that begin with ``_`` are private.
    """
    folder = Path(__file__).resolve().parent.parent.joinpath(*package.split("."))
    stems = (path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    return tuple(sorted(stem.replace("_", "-") for stem in stems))


def check(package: str, name: str, what: str) -> str:
    """Return `name` if `package` has it; otherwise raise a DpctlError that says "did you mean".

    `what` is the word for one entry, e.g. ``"criterion"``.
    """
    return choose(names(package), name, what)


def choose(known: Sequence[str], name: str, what: str) -> str:
    """Return `name` if it is known; otherwise raise a DpctlError that says "did you mean"."""
    if name in known:
        return name
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise DpctlError(f"unknown {what}", repr(name), f"{hint}choose one of: {', '.join(known)}")


def load(package: str, name: str, what: str) -> ModuleType:
    """Import and return the module behind `name` (checked as in `check`)."""
    check(package, name, what)
    return importlib.import_module(f"{package}.{name.replace('-', '_')}")
