"""What `dpctl compare` prints: the table of changes, what is missing, and the verdict in one sentence."""

import dataclasses
from collections.abc import Callable
from typing import Any

from dpctl import units
from dpctl.bench.regression import Change, Comparison
from dpctl.inspect import Report

WRITTEN: dict[str, Callable[[float], str]] = {
    "x": units.ratio,
    "s": units.seconds,
    "bytes": units.bytes_,
    "": lambda value: f"{value:.4g}",
}


def verdict(found: Comparison, most: float | None) -> str:
    """Return the outcome in one sentence."""
    worse, counted = found.regressions(most or 0.0), sum(change.gates for change in found.changes)
    beyond = "significantly worse" if most is None else f"worse by more than {units.percent(most)}"
    lost = f"; {len(found.lost)} missing in NEW" if found.lost else ""
    if not worse:
        return f"None of the {counted} figures that count is {beyond}{lost}."
    worst = f"{worse[0].figure} of {worse[0].place}, worse by {units.percent(worse[0].worse_by)}"
    many = "is" if len(worse) == 1 else "are"
    return f"{len(worse)} of the {counted} figures that count {many} {beyond}: {worst}{lost}."


def report(found: Comparison, most: float | None) -> Report:
    """Return what `dpctl compare` prints."""
    from rich.text import Text

    document = {
        "verdict": verdict(found, most),
        "max_regression": most,
        "regressions": [dataclasses.asdict(change) for change in found.regressions(most or 0.0)],
        **dataclasses.asdict(found),
    }
    lines = [
        *(Text(f"missing in NEW: {each}", style="yellow") for each in found.lost),
        *(Text(f"note: {each}") for each in found.notes),
    ]
    return Report(document, [_table(found), *lines, Text(document["verdict"])])


def _table(found: Comparison) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table("figure", "model / backend", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for heading in ("batch", "steps", "OLD", "NEW", "change", "interval"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("so it is")
    for each in found.changes:
        write, place = WRITTEN[each.unit], each.place
        where = ("" if value is None else str(value) for value in (place.batch_size, place.num_inference_steps))
        between = "" if each.low is None else f"{_signed(each.low)} to {_signed(each.high)}"
        cells = (each.figure, f"{place.model} / {place.backend}", *where, write(each.old), write(each.new))
        table.add_row(*(Text(cell) for cell in (*cells, _signed(each.change), between, _judged(each))))
    return table


def _judged(change: Change) -> str:
    if change.change is None:
        return "not judged: OLD is not above 0"
    if not change.significant:
        return "unchanged" if change.low is None else "no significant difference"
    return ("worse" if change.worse_by > 0 else "better") + ("" if change.gates else ", counts for nothing")


def _signed(fraction: float | None) -> str:
    return "" if fraction is None else f"{100 * fraction:+.1f} %"
