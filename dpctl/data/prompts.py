"""Prompts: a text file with one per line."""

from pathlib import Path

from dpctl.errors import DpctlError


def read_prompts(path: Path) -> tuple[str, ...]:
    """Return the prompts of a text file, one per line; empty lines do not count."""
    todo = "give a text file in UTF-8, one prompt per line"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as problem:
        raise DpctlError("the prompts cannot be read", f"{path}: {problem.strerror}", todo) from None
    except ValueError as problem:
        raise DpctlError("the prompts are not text", f"{path}: {problem}", todo) from None
    found = tuple(line.strip() for line in lines if line.strip())
    if not found:
        raise DpctlError("there are no prompts", f"{path}: {len(lines)} lines, all empty", todo)
    return found
