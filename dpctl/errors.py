"""The errors that a user can cause, in three parts: what failed, what we got, what to do."""


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


class GateError(DpctlError):
    """A promised property was measured and is not met (parity, regression): exit code 3."""

    exit_code = 3
