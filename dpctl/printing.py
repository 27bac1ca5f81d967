"""What the commands print: a report, for people or as one JSON document."""

import json
import sys
from typing import Any

import typer


def print_report(report: Any, as_json: bool) -> None:
    """Print a report: its `.json` document, or its `.renderables` for people."""
    if as_json:
        print_json(report.json)
        return
    for renderable in report.renderables:
        console().print(renderable)


def print_json(document: Any) -> None:
    """Print one JSON document."""
    typer.echo(json.dumps(document, indent=2))


def console() -> Any:
    """Return rich's console on stdout."""
    from rich.console import Console

    # A pipe has no width of its own: 80 columns would fold the tables of every log. No markup: a path may hold [a].
    return Console(markup=False) if sys.stdout.isatty() else Console(markup=False, width=140)
