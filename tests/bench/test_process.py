"""A worker and its parent's end, with a real model: it answers, idles, keeps its pipe clean, dies and is ended."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpctl.bench import process
from dpctl.bench.process import Worker
from dpctl.bench.stability import _process_ticks
from dpctl.errors import DpctlError


@pytest.fixture(scope="module")
def worker(tiny: Path) -> Iterator[Worker]:
    with Worker("tiny / eager", threads=1) as started:
        opened = started.ask("open", directory=str(tiny), backend="eager", scheduler="ddim", threads=1, seed=0)
        assert opened["base_memory_bytes"] > 10**7
        yield started


def test_a_turn_measures_every_step(worker: Worker) -> None:
    turn = worker.ask("turn", batch_size=2, num_inference_steps=3)
    steps, network = turn["step_latency_s"], turn["network_latency_s"]
    assert len(steps) == len(network) == 3
    assert all(0 < part <= whole for part, whole in zip(network, steps, strict=True))
    assert sum(steps) <= turn["latency_s"]


def test_memory_is_beyond_what_was_there(worker: Worker) -> None:
    small, large = (worker.ask("memory", batch_size=n, num_inference_steps=1)["peak_memory_bytes"] for n in (1, 64))
    assert 0 < small <= large


def test_samples_do_not_depend_on_their_batch(worker: Worker, tmp_path: Path) -> None:
    import numpy as np

    path = tmp_path / "part.npy"

    def draw(start: int, stop: int) -> np.ndarray:
        worker.ask("draw", start=start, stop=stop, num_inference_steps=2, file=str(path))
        return np.load(path)

    together = draw(0, 3)
    assert together.shape == (3, 8, 8, 1)
    assert together.dtype == np.uint8
    assert (together == np.concatenate([draw(i, i + 1) for i in range(3)])).all()


@pytest.mark.parametrize("scheduler", ["ddpm", "dpm-solver++", "euler", "euler-ancestral"])
def test_every_scheduler_takes_turns(scheduler: str, worker: Worker, tiny: Path) -> None:
    worker.ask("open", directory=str(tiny), backend="eager", scheduler=scheduler, threads=1, seed=0)
    assert len(worker.ask("turn", batch_size=1, num_inference_steps=4)["step_latency_s"]) == 4


def test_between_turns_it_uses_no_processor(worker: Worker) -> None:
    worker.ask("turn", batch_size=2, num_inference_steps=2)
    before = _process_ticks(worker.pid)
    time.sleep(0.5)
    # A spinning thread would have used 50 ticks of 10 ms.
    assert _process_ticks(worker.pid) - before <= 2


def test_its_own_error_crosses_the_pipe(worker: Worker) -> None:
    with pytest.raises(DpctlError, match="out of range") as problem:
        worker.ask("turn", batch_size=1, num_inference_steps=1000)
    assert "100 timesteps" in problem.value.got


def test_dead_it_is_an_error_that_names_it(worker: Worker) -> None:
    os.kill(worker.pid, signal.SIGKILL)
    for _ in range(2):
        with pytest.raises(DpctlError, match="tiny / eager died while asked to turn") as problem:
            worker.ask("turn", batch_size=1, num_inference_steps=1)
        assert "SIGKILL" in problem.value.got


CHATTER = """
import os, sys
import dpctl.bench.worker as worker
def turn(subject, **request):
    print("chatter"); sys.stdout.flush(); os.write(1, b"from a library"); os.system("echo from a child")
    return {"read": sys.stdin.read()}
worker.COMMANDS["turn"] = turn
worker.COMMANDS["draw"] = lambda subject, **request: sys.exit("this is a bug")
worker.main()
"""


def test_chatter_does_not_reach_the_pipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "python"
    (tmp_path / "chatter.py").write_text(CHATTER)
    script.write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/chatter.py\n")
    script.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(script))
    with Worker("noisy", threads=1) as started:
        assert started.ask("turn") == {"read": ""}
        with pytest.raises(DpctlError, match="noisy died") as problem:
            started.ask("draw")
        assert problem.value.got == "ended with code 1: this is a bug"


def test_a_busy_worker_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text('#!/bin/sh\ntrap "" TERM\necho "{}"\nsleep 60\n')
    script.chmod(0o755)
    monkeypatch.setattr(process.sys, "executable", str(script))
    monkeypatch.setattr(process, "PATIENCE_S", 0.2)
    with Worker("stubborn", threads=1) as started:
        assert started.ask("anything") == {}
    assert started._process.returncode == -signal.SIGKILL


def test_every_worker_has_the_same_threads_and_spins_for_a_moment_only() -> None:
    found = process.environment(3)
    assert (found["OMP_NUM_THREADS"], found["MKL_NUM_THREADS"]) == ("3", "3")
    # Not 0: threads that sleep between two layers would slow the eager baseline down.
    assert (found["GOMP_SPINCOUNT"], found["KMP_BLOCKTIME"]) == ("20000", "1")
