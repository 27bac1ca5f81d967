"""The parent's end of a worker: start it, ask it, and always end it."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from dpctl.errors import DpctlError

# After its turn a subject must not take processor time from the others: its threads stop spinning within a millisecond.
# Within the turn they may spin, as in production: PyTorch's threads that sleep between two layers instead make a small
# network two to three times slower, and the baseline look worse than it is.
QUIET = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 5.0


class Worker:
    """A fresh Python process that runs `dpctl.bench.worker`; use it as a context manager.

    It has a session of its own, so that Ctrl-C reaches the parent alone, which then ends it.
    """

    def __init__(self, name: str, threads: int) -> None:
        self.name = name
        self._notes = tempfile.TemporaryFile()  # noqa: SIM115  # closed by close()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "dpctl.bench.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._notes,
            env=environment(threads),
            start_new_session=True,
        )
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._pipes = (self._process.stdin, self._process.stdout)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def ask(self, what: str, **request: Any) -> dict[str, Any]:
        """Send one request and wait for its answer, blocked on the pipe.

        Raises the worker's own DpctlError, and one that names the subject where the worker has died.
        """
        requests, answers = self._pipes
        line = b""
        with suppress(BrokenPipeError):
            requests.write(json.dumps({"what": what, **request}).encode() + b"\n")
            requests.flush()
            line = answers.readline()
        if not line.endswith(b"\n"):
            raise self._died(what)
        answer = json.loads(line)
        if "error" in answer:
            raise DpctlError(*answer["error"])
        return answer

    def close(self) -> None:
        """End the process, busy or not."""
        for pipe in self._pipes:
            with suppress(BrokenPipeError):
                pipe.close()
        self._process.terminate()
        try:
            self._process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._notes.close()

    def _died(self, what: str) -> DpctlError:
        code = self._process.wait()
        if code < 0:
            end = f"killed by {signal.Signals(-code).name}"
            todo = "if that was the system for want of memory, take smaller batches or close other programs"
        else:
            end = f"ended with code {code}"
            todo = "this is likely a bug: try the model with `dpctl sample`, and report what it prints"
        self._notes.seek(0)
        lines = self._notes.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1]}" if lines else ""
        return DpctlError(f"the process of {self.name} died while asked to {what}", end + last, todo)


def environment(threads: int) -> dict[str, str]:
    """Return the environment of every worker: the same number of threads, none of them spinning."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    count = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return {**os.environ, **QUIET, **count, "PYTHONPATH": path}
