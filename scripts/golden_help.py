"""Write docs/cli.md, the help of every command; with --check, fail where it is not what the commands say."""

import difflib
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "cli.md"
INTRODUCTION = """# The command line

What `dpctl --help` and the help of every command say. Written by `python scripts/golden_help.py`; the tests compare.
stdout is the result, stderr is progress; `--json` prints one JSON document. Exit codes: 0 done, 1 an error in three
parts (what failed, what we got, what to do), 2 usage, 3 a promised property was measured and is not met.
"""


def page() -> str:
    """Return the page, at a fixed width and without colour."""
    for name in ("FORCE_COLOR", "PY_COLORS", "GITHUB_ACTIONS", "TERMINAL_WIDTH"):
        os.environ.pop(name, None)
    os.environ.update(COLUMNS="100", NO_COLOR="1", TERM="dumb")
    sys.path.insert(0, str(ROOT))
    import typer
    from typer.testing import CliRunner

    from dpctl.cli import app

    def help_of(*command: str) -> str:
        result = CliRunner().invoke(app, [*command, "--help"], prog_name="dpctl")
        text = "\n".join(line.rstrip() for line in result.output.splitlines()).strip("\n")
        return f"\n## {' '.join(('dpctl', *command))}\n\n```text\n{text}\n```\n"

    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return INTRODUCTION + help_of() + "".join(help_of(name) for name in commands)


def main() -> int:
    """Write or compare the page; return the exit code."""
    wanted = page()
    if "--check" not in sys.argv[1:]:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(wanted, encoding="utf-8")
        return 0
    found = PAGE.read_text(encoding="utf-8") if PAGE.is_file() else ""
    lines = difflib.unified_diff(found.splitlines(), wanted.splitlines(), "docs/cli.md", "dpctl --help", lineterm="")
    difference = "\n".join(lines)
    if difference:
        print(f"{difference}\ndocs/cli.md is out of date: run python scripts/golden_help.py")
    return 1 if difference else 0


if __name__ == "__main__":
    sys.exit(main())
