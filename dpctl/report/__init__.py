"""A benchmark's result for people: the terminal's table, report.md, a self-contained report.html. Measures nothing."""

import re
from pathlib import Path
from typing import Any

from dpctl.bench.layers import Layer
from dpctl.bench.result import BenchResult
from dpctl.report import architecture, charts, measured, page, tables


def table(result: BenchResult) -> Any:
    """Return what the terminal shows, as one rich renderable."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = [Padding(Text("\n".join(page.verdicts(result))), (1, 0))]
    for shown in tables.brief(result):
        grid = Table(title=shown.title, title_justify="left", caption=shown.note, caption_justify="left")
        grid.box, grid.padding, grid.pad_edge = SIMPLE_HEAD, (0, 1, 0, 0), False
        for heading in shown.headings:
            words = heading in tables.TEXT
            grid.add_column(heading, justify="left" if words else "right", no_wrap=not words, overflow="fold")
        for row in shown.rows:
            grid.add_row(*(Text(cell) for cell in row))
        parts.append(grid)
    parts += [Text(f"note: {line}") for line in page.labels(result)]
    parts += [Text(f"warning: {line}", style="yellow") for line in result.warnings]
    return Group(*parts)


def write_report(result: BenchResult, out: Path) -> None:
    """Write report.md (with its pictures beside it) and the self-contained report.html into `out`."""
    sheets = charts.sheets(result, out)
    strips = charts.strips(result, out)
    drawings = measured.drawings(result)
    networks = architecture.drawings(result)
    for name, drawing in (drawings | networks).items():
        (out / name).write_text(drawing.svg, encoding="utf-8")
    for name, sheet in sheets.items():
        (out / name).write_bytes(charts.png(sheet.whole))
    for name, strip in strips.items():
        (out / name).write_bytes(strip.png)
    told = {
        "result": result,
        "title": page.title(result),
        "verdicts": page.verdicts(result),
        "headlines": page.headlines(result),
        "labels": page.labels(result),
        "tables": tables.tables(result, lagging(result)),
        "sheets": sheets,
        "strips": strips,
        "drawings": drawings,
        "networks": networks,
        "lineage": tables.lineage(result),
        "environment": page.environment(result),
        "method": page.METHOD,
        "repeat": page.repeat_command(result),
    }
    for name in ("report.md", "report.html"):
        (out / name).write_text(_template(name).render(told), encoding="utf-8")


def lagging(result: BenchResult) -> dict[str, tuple[Layer, ...]]:
    """Return by subject the layers whose time did not follow their MACs, those that lost most first."""
    compared = {subject.name: result.layers(subject.model, subject.backend) for subject in result.subjects}
    return {name: found.lagging for name, found in compared.items() if found is not None}


def _template(name: str) -> Any:
    import jinja2

    # Escaped by the name's ending: only charts made here are marked safe, in the template.
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=lambda template: template is not None and template.startswith("report.html"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    environment.filters["unbroken"] = lambda text: re.sub(r", (?=\S+\])", ",\u00a0", text)  # an interval
    return environment.get_template(f"{name}.jinja")
