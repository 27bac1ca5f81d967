"""Progress on stderr: a rich bar with time left on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from dpctl import units

LOG_EVERY_S = 15.0


def say(line: str) -> None:
    """Write a line to stderr."""
    sys.stderr.write(f"{line}\n")


class Advance(Protocol):
    """Report `steps` more steps done; keyword values (loss, ...) are shown behind the bar."""

    def __call__(self, steps: int = 1, **values: float | str) -> None: ...


def silent(steps: int = 1, **values: float | str) -> None:
    """Report nothing: the default of library calls."""


class Bar(Protocol):
    """Open a progress display of `total` steps of which `done` were done before."""

    def __call__(self, description: str, total: int, *, done: int = 0) -> AbstractContextManager[Advance]: ...


@contextmanager
def no_bar(description: str, total: int, *, done: int = 0) -> Iterator[Advance]:
    """Show nothing: the default of library calls."""
    yield silent


@contextmanager
def bar(description: str, total: int, *, done: int = 0) -> Iterator[Advance]:
    """Show progress on stderr: steps, time left and what the caller reports behind the bar."""
    from rich.console import Console

    console = Console(stderr=True)
    shown = _terminal(console, description, total, done) if console.is_terminal else None
    if shown is None:
        yield _Log(console, description, total, done, LOG_EVERY_S)
        return
    with shown as (progress, task):

        def advance(steps: int = 1, **values: float | str) -> None:
            progress.update(task, advance=steps, shown=_text(values))

        yield advance


@contextmanager
def _terminal(console: Any, description: str, total: int, done: int) -> Iterator[tuple[Any, Any]]:
    from rich import progress as rich_progress

    columns = (
        rich_progress.TextColumn("{task.description:<12}"),
        rich_progress.BarColumn(bar_width=30),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TimeElapsedColumn(),
        rich_progress.TextColumn("left"),
        rich_progress.TimeRemainingColumn(),
        rich_progress.TextColumn("{task.fields[shown]}"),
    )
    with rich_progress.Progress(*columns, console=console) as progress:
        yield progress, progress.add_task(description, total=total, completed=done, shown="")


class _Log:
    """The same for a file or pipe: one line at most every `every` seconds, and one at the end."""

    def __init__(self, console: Any, description: str, total: int, done: int, every: float) -> None:
        self._console, self._description, self._total, self._every = console, description, total, every
        self._done = self._first = done
        self._started = self._spoke = time.monotonic()

    def __call__(self, steps: int = 1, **values: float | str) -> None:
        self._done += steps
        now = time.monotonic()
        if now - self._spoke < self._every and self._done < self._total:
            return
        self._spoke = now
        left = (now - self._started) / max(1, self._done - self._first) * (self._total - self._done)
        line = f"{self._description} {self._done}/{self._total}, {units.seconds(left)} left  {_text(values)}"
        self._console.print(line.rstrip(), highlight=False, markup=False, soft_wrap=True)


def _text(values: dict[str, float | str]) -> str:
    return "  ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )
