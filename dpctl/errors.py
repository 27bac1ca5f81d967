"""The errors that a user can cause, in three parts: what failed, what we got, what to do."""

import signal


class DpctlError(Exception):
    """A user's mistake or an unmet condition: printed without a traceback, exit code 1.

    Anything that is not a DpctlError is our own bug and keeps its traceback.
    """

    exit_code = 1

    def __init__(self, failed: str, got: str, todo: str) -> None:
        super().__init__(failed, got, todo)
        self.failed, self.got, self.todo = failed, got, todo

    def __str__(self) -> str:
        return f"{self.failed}\n  got: {self.got}\n  do:  {self.todo}"


class MetAlready(DpctlError):
    """A target that is met as things are: there is nothing to do."""


class OutOfReach(DpctlError):
    """A target below what can be had at all; `floor` is the least, in the target's own unit."""

    def __init__(self, failed: str, got: str, todo: str, floor: float) -> None:
        super().__init__(failed, got, todo)
        self.floor = floor


class GateError(DpctlError):
    """A promised property was measured and is not met (parity, regression): exit code 3."""

    exit_code = 3


class StoppedError(Exception):
    """A run that was asked to end and left what it goes on from: a preemption is no failure."""

    def __init__(self, step: int, steps: int, number: int) -> None:
        super().__init__(f"stopped after step {step} of {steps}")
        self.number = number  # the signal's

    @property
    def exit_code(self) -> int:
        """Return 0 where a cluster asked (SIGTERM), 130 where somebody at a terminal did (SIGINT)."""
        return 130 if self.number == signal.SIGINT else 0
