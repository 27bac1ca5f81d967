"""Fail where a file or function outgrows the house rule: files < 400 lines, functions <= 60 but for the loops."""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("dpctl", "export", "runtime", "scripts", "tests")
LONGEST_FILE = 399
LONGEST_FUNCTION = 60
# The training and the sampling loop read top to bottom.
LOOPS = {"dpctl/finetune/loop.py", "runtime/sampler.py"}


def too_long(path: Path) -> Iterator[str]:
    """Yield a line of text for each breach in one file."""
    name = path.relative_to(ROOT).as_posix()
    source = path.read_text(encoding="utf-8")
    lines = len(source.splitlines())
    if lines > LONGEST_FILE:
        yield f"{name}: {lines} lines, at most {LONGEST_FILE}: split it"
    if name in LOOPS:
        return
    for node in ast.walk(ast.parse(source, filename=name)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > LONGEST_FUNCTION:
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, at most {LONGEST_FUNCTION}: split it"


def main() -> int:
    """Check every Python file of the house; return the exit code."""
    paths = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    breaches = [line for path in paths for line in too_long(path)]
    print("\n".join(breaches) or f"{len(paths)} files are short enough")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main())
