"""Samples drawn by several processes: the same images as by one, and everyone ends whatever happens."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch.distributed import HashStore

from dpctl import bench
from dpctl.bench import drawing
from dpctl.bench.document import read_result
from dpctl.bench.drawing import Crew, own_gpu
from dpctl.bench.quality import load_samples
from dpctl.bench.result import BenchResult
from dpctl.errors import DpctlError
from dpctl.recipe import BenchRecipe

ROOT = Path(__file__).parents[2]
COUNT = 150  # parts of 64, 64 and 22 images: the second is the second process's
OPTIONS = ("--backend", "eager", "--batch-size", "1", "--num-inference-steps", "2", "--rounds", "1", "--threads", "1",
           "--baselines", "", "--no-fewer-steps")  # fmt: skip


@pytest.fixture(scope="module")
def recipe(tiny: Path) -> BenchRecipe:
    small = BenchRecipe(backends=("eager",), batch_sizes=(1,), num_inference_steps=(2,), rounds=1, threads=1)
    alone = {"baselines": (), "fewer_steps": False}
    return dataclasses.replace(small, baseline=str(tiny), candidates=(str(tiny),), samples=COUNT, **alone)


@pytest.fixture(scope="module")
def alone(recipe: BenchRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process measures and draws."""
    out = tmp_path_factory.mktemp("alone")
    bench.run_bench(recipe, out)
    return out


def images(out: Path) -> list[np.ndarray]:
    return [load_samples(out / each.samples) for each in read_result(out / "bench.json").quality]


@pytest.fixture
def together(recipe: BenchRecipe, tmp_path: Path) -> Callable[..., BenchResult]:
    """Return a benchmark by a leader and a follower that share a store, each a thread with workers of its own."""

    def run(**changes: Any) -> BenchResult:
        store = HashStore()
        leader, follower = (Crew(rank, 2, store) for rank in range(2))
        thread = threading.Thread(target=follower.follow)
        thread.start()
        try:
            leader.hear("here")
            return bench.run_bench(dataclasses.replace(recipe, **changes), tmp_path, processes=leader)
        finally:
            leader.ask(drawing.END)
            thread.join(60)
            assert not thread.is_alive()

    return run


def assert_same(out: Path, alone: Path) -> None:
    for ours, theirs in zip(images(out), images(alone), strict=True):
        assert len(ours) == COUNT
        assert (ours == theirs).all()


@pytest.mark.slow
def test_one_process_draws_all(alone: Path) -> None:
    assert read_result(alone / "bench.json").environment["samples_drawn_by"] == [2 * COUNT]
    assert [path.name for path in alone.iterdir() if path.name.startswith(".")] == []


def test_the_first_draws_what_another_could_not(
    together: Callable[..., BenchResult],
    alone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    opened, dead = drawing.Hand._opened, []

    def fatal(self: Any, opening: dict[str, Any]) -> Any:
        worker = opened(self, opening)
        if not dead:
            dead.append(worker.pid)
            os.kill(worker.pid, signal.SIGKILL)
        return worker

    monkeypatch.setattr(drawing.Hand, "_opened", fatal)
    # The first model's share falls to the first process; for the second model the other one opens a new worker.
    assert together().environment["samples_drawn_by"] == [86 + 64 + 86, 64]
    assert_same(tmp_path, alone)
    assert "process 1 could not draw its share, the first one does:" in capsys.readouterr().err


@pytest.mark.slow
def test_a_subject_that_dies_while_it_draws_leaves_nobody_waiting(
    together: Callable[..., BenchResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = bench.Run.ask

    def fatal(self: bench.Run, what: str, **request: Any) -> Any:
        if what == "draw" and self.worker is not None and self.entry.model.name == "tiny":
            os.kill(self.worker.pid, signal.SIGKILL)
        return ask(self, what, **request)

    monkeypatch.setattr(bench.Run, "ask", fatal)
    result = together()
    assert "SIGKILL" in (result.subjects[0].failure or "")
    assert [each.model for each in result.quality] == ["tiny (2)"]


def test_an_error_of_the_first_dismisses_the_others(together: Callable[..., BenchResult]) -> None:
    with pytest.raises(DpctlError, match="too small"):
        together(rounds=0)  # the fixture sees that the other one has ended


@pytest.mark.parametrize(
    ("local_rank", "count", "seen", "expected"),
    [(1, 0, None, None), (1, 4, None, "1"), (1, 2, "6,7", "7"), (0, 2, "GPU-a, GPU-b", "GPU-a"), (3, 2, None, "1")],
)
def test_each_process_has_its_gpu(local_rank: int, count: int, seen: str | None, expected: str | None) -> None:
    assert own_gpu(local_rank, count, seen) == expected


# --- under the real launcher -----------------------------------------------------------------------------------------


def launched(tiny: Path, out: Path, *more: object) -> subprocess.Popen:
    """Start `dpctl bench` as two processes on the CPU: with --cpu instead, accelerate would start only one."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = [*launcher, "--main_process_port", "0", "-m", "dpctl", "bench", str(tiny), str(tiny), "--out", str(out)]
    return subprocess.Popen(
        [*command, *OPTIONS, *map(str, more)],
        env=os.environ | {"ACCELERATE_USE_CPU": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def test_accelerate_launch_draws_the_same_images(tiny: Path, alone: Path, tmp_path: Path) -> None:
    process = launched(tiny, tmp_path / "out", "--samples", COUNT, "--json")
    said, noted = process.communicate(timeout=300)
    assert process.returncode == 0, noted
    document = json.loads(said)  # one process prints
    assert document["environment"]["samples_drawn_by"] == [2 * 86, 2 * 64]
    assert_same(tmp_path / "out", alone)
    assert (tmp_path / "out" / "report.html").is_file()


def children(pid: int) -> Iterator[tuple[int, Sequence[str]]]:
    """Yield the processes below `pid`, each with its environment."""
    for path in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(path), Path(f"/proc/{path}/environ").read_bytes().decode().split("\0")
        yield from children(int(path))


def until(condition: Callable[[], Any]) -> Any:
    for _ in range(600):
        found = condition()
        if found:
            return found
        time.sleep(0.1)
    raise AssertionError("it never came to that")


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_is_killed_ends_them_all(rank: int, tiny: Path, tmp_path: Path) -> None:
    process = launched(tiny, tmp_path / "out", "--rounds", 100000, "--samples", COUNT)

    def ranks() -> list[int]:
        below = list(children(process.pid))
        return [pid for pid, environment in below if f"RANK={rank}" in environment] if len(below) >= 4 else []

    victim = until(ranks)[0]  # two processes and the workers of the first
    everyone = [pid for pid, _ in children(process.pid)]
    os.kill(victim, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in everyone))
    assert not (tmp_path / "out").exists()
    if rank != 0:  # the first was asked to end, and did so properly
        assert list(tmp_path.iterdir()) == []
