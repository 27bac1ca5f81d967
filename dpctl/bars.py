"""Bars for the terminal, of characters that also a pipe keeps: widths per block, and how the loss reacts to cuts."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpctl import units
from dpctl.blocks import by_block, within

LENGTH = 20


@dataclass(frozen=True)
class Bar:
    """A bar whose first `share` is filled, the rest light (or blank, where `light` is false)."""

    share: float
    light: bool = True

    @property
    def filled(self) -> int:
        """How many of `LENGTH` characters are filled; neither none nor all where the share is neither."""
        if not 0 < self.share < 1:
            return LENGTH if self.share >= 1 else 0
        return min(LENGTH - 1, max(1, round(self.share * LENGTH)))

    def __rich_console__(self, console: Any, options: Any) -> Iterable[Any]:
        from rich.text import Text

        full, rest = ("#", ".") if options.ascii_only else ("█", "░")
        yield Text(full * self.filled + (rest if self.light else " ") * (LENGTH - self.filled), no_wrap=True)


def widths(pairs: Mapping[str, Sequence[int]], left_alone: Mapping[str, str]) -> list[Any]:
    """Return the widths before and after, a line per block and below it one per group, and what is left alone."""
    from rich.text import Text

    table = _table("widths per block", "before -> after", "stays")
    for block, names in by_block(pairs).items():
        whole = [sum(pairs[name][side] for name in names) for side in (0, 1)]
        table.add_row(block, *_change(*whole), style="bold")
        for name in names if names != [block] else ():
            table.add_row(Text(f"  {within(name)}"), *_change(*pairs[name]))
    reasons: dict[str, list[str]] = {}
    for name, reason in left_alone.items():
        reasons.setdefault(reason, []).append(name)
    return [table, *(Text(f"left alone, {reason}: {', '.join(names)}") for reason, names in reasons.items())]


def _change(before: int, after: int) -> tuple[str, str, Bar]:
    share = after / before
    return f"{before} -> {after}", units.percent(share), Bar(share)


def reactions(scan: Mapping[str, Any]) -> list[Any]:
    """Return what a scan found, the group whose cuts raise the loss most first; bars are of the mean over its cuts."""
    from rich.text import Text

    base, fractions = scan["base_loss"], scan["fractions"]
    found: dict[str, dict[float, float]] = {}
    for row in scan["rows"]:
        found.setdefault(row["group"], {})[nearest(row, fractions)] = row["loss"] / base - 1
    means = {group: sum(cuts.values()) / len(cuts) for group, cuts in found.items()}
    most = max(means.values(), default=0.0)
    widths = {row["group"]: row["width"] for row in scan["rows"]}
    headings = [f"-{100 * fraction:.0f} %" for fraction in fractions]
    table = _table(f"the loss when a part of one group is cut{_of(scan)}", "width", *headings, "mean")
    for group in sorted(means, key=lambda name: (-means[name], name)):
        cells = [_rise(found[group].get(fraction)) for fraction in fractions]
        table.add_row(
            group, str(widths[group]), *cells, _rise(means[group]), Bar(means[group] / most if most > 0 else 0.0, False)
        )
    return [table, Text(f"denoising loss {base:.4g} uncut; {measured_on(scan)}")]


def _of(scan: Mapping[str, Any]) -> str:
    return f" (of the model {scan['model'][:12]})" if "model" in scan else ""


def nearest(row: Mapping[str, Any], fractions: Sequence[float]) -> float:
    """Return the fraction that a cut is nearest to: a width has steps, so that it is not always one of them."""
    gone = 1 - row["kept"] / row["width"]
    return min(fractions, key=lambda fraction: abs(fraction - gone))


def measured_on(scan: Mapping[str, Any]) -> str:
    """Say what a scan's losses are means over."""
    told = scan["measured_on"]
    times = ", ".join(map(str, told["timesteps"]))
    return f"{told['images']} images of {told['data']} with fixed noise, each at the timesteps {times}"


def _rise(change: float | None) -> str:
    if change is None:
        return ""
    # The part after the point says nothing where the loss rises by a tenth and more; adding 0.0 makes -0.0 a zero.
    return f"{round(100 * change, 0 if abs(change) >= 0.1 else 1) + 0.0:+.{int(abs(change) < 0.1)}f} %"


def _table(title: str, *figures: str) -> Any:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("", overflow="fold")
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", width=LENGTH, no_wrap=True)
    return table
