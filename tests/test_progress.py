"""Progress goes to stderr: a bar with time left on a terminal, a line now and then elsewhere."""

import io
import re
from typing import Any

import pytest
from rich.console import Console

from dpctl import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A clock that the test moves: `clock(seconds)`."""
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def test_in_a_log_it_is_a_line_now_and_then(clock: Any, capsys: pytest.CaptureFixture) -> None:
    with progress.bar("train", 100) as advance:
        for _ in range(100):
            clock(1.0)
            advance(1, loss=0.5)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "train 15/100, 85 s left  loss 0.5"
    assert [int(re.search(r"(\d+)/100", line)[1]) for line in lines] == [15, 30, 45, 60, 75, 90, 100]  # type: ignore[index]
    assert lines[-1] == "train 100/100, 0 s left  loss 0.5"


def test_what_was_done_before_does_not_shorten_the_time_left(clock: Any, capsys: pytest.CaptureFixture) -> None:
    with progress.bar("train", 1000, done=900) as advance:
        clock(20.0)
        advance(10)
    assert capsys.readouterr().err == "train 910/1000, 180 s left\n".replace("180 s", "3 min 00 s")


def test_nothing_done_is_no_division_by_zero(clock: Any, capsys: pytest.CaptureFixture) -> None:
    with progress.bar("train", 10) as advance:
        clock(20.0)
        advance(0, note="waiting")
    assert "train 0/10" in capsys.readouterr().err


def test_a_long_line_is_one_line_and_markup_is_text(clock: Any, capsys: pytest.CaptureFixture) -> None:
    with progress.bar("bench", 1) as advance:
        advance(1, subject="[red]runs/" + "deep/" * 30 + "[/b]")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("  subject [red]runs/" + "deep/" * 30 + "[/b]")


def test_an_exception_passes_through(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(KeyError), progress.bar("train", 10):
        raise KeyError


@pytest.mark.parametrize("fails", [False, True])
def test_on_a_terminal_it_is_a_bar_with_time_left(monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=120, color_system=None, legacy_windows=False)
    monkeypatch.setattr("rich.console.Console", lambda **_: console)
    try:
        with progress.bar("finetune", 20, done=5) as advance:
            for _ in range(10):
                advance(1, loss=0.123456, grad_norm=1.0)
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    last = [line for line in re.split(r"[\r\n]", stream.getvalue()) if "finetune" in line][-1]
    assert "15/20" in last
    assert "left" in last
    assert "loss 0.1235  grad_norm 1" in last
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l")  # the cursor is back


def test_no_bar_is_silent(capsys: pytest.CaptureFixture) -> None:
    with progress.no_bar("train", 10, done=3) as advance:
        advance()
        advance(3, loss=0.5)
    progress.silent(1, loss=0.5)
    assert capsys.readouterr() == ("", "")
