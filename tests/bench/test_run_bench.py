"""The whole measurement with real processes and models: one run, looked at from several sides, and what goes wrong."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dpctl import bench
from dpctl.bench import measuring, stability, subjects
from dpctl.bench.document import read_result
from dpctl.bench.metrics._features import FeatureSpace
from dpctl.bench.painter import open_painter
from dpctl.bench.quality import load_samples
from dpctl.bench.result import BenchResult, Condition, FewerSteps
from dpctl.data import to_bytes
from dpctl.errors import DpctlError
from dpctl.recipe import BenchRecipe, to_dict

SMALL = BenchRecipe(
    batch_sizes=(1, 2), num_inference_steps=(2,), rounds=2, samples=5, threads=1, baselines=(), fewer_steps=False
)


@pytest.fixture(scope="module")
def exported(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The tiny model, exported once into a cache of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        model = subjects.describe(BenchRecipe(baseline=str(tiny)))[0]
        yield subjects.cached_export(model, 2, bench.progress.no_bar)


@pytest.fixture(scope="module")
def recipe(tiny: Path, exported: Path) -> BenchRecipe:
    return dataclasses.replace(SMALL, baseline=str(tiny), candidates=(str(exported),))


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("out") / "bench"


@pytest.fixture(scope="module")
def result(recipe: BenchRecipe, out: Path, toy_space: FeatureSpace) -> BenchResult:
    return bench.run_bench(recipe, out, space=toy_space)


def test_the_file_is_the_result(result: BenchResult, out: Path, recipe: BenchRecipe) -> None:
    assert read_result(out / "bench.json") == result
    assert result.recipe == to_dict(recipe)


def test_every_subject_takes_every_turn(result: BenchResult) -> None:
    names = [subject.name for subject in result.subjects]
    assert len(names) == len(set(names)) == 4
    for subject in result.subjects:
        if subject.failure is None:
            expected = {(n, size) for n in range(3) for size in (1, 2)}
            assert {(turn.round, turn.batch_size) for turn in subject.turns} == expected
            assert [memory.batch_size for memory in subject.memory] in ([1, 2], [])  # none where the system refuses


def test_what_was_exported_is_not_exported_again(result: BenchResult, exported: Path) -> None:
    ort = result.subject("tiny", "ort")
    assert ort is not None
    assert ort.runs_from.endswith(str(exported))
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]
    assert ort.parity is not None
    assert ort.parity["verdict"] == "passed"


def test_an_exported_directory_has_no_eager_subject(result: BenchResult, exported: Path) -> None:
    eager = result.subject(exported.name, "eager")
    assert eager is not None
    assert "no weights" in (eager.failure or "")
    assert eager.turns == ()


def test_speed_ups_are_over_the_baseline_and_over_eager(result: BenchResult, exported: Path) -> None:
    rows = {(row.model, row.backend, row.batch_size): row for row in result.rows}
    assert len(rows) == 6
    assert rows["tiny", "eager", 1].pruning is rows["tiny", "eager", 1].total is None
    assert rows["tiny", "ort", 1].pruning is None
    candidate = rows[exported.name, "ort", 2]
    assert candidate.pruning is not None
    assert candidate.total is not None
    assert candidate.pruning.count == candidate.total.count == 2


def test_the_same_network_draws_the_same_pictures(result: BenchResult, out: Path, exported: Path) -> None:
    one, other = result.quality
    assert (load_samples(out / one.samples) == load_samples(out / other.samples)).all()
    assert load_samples(out / one.samples).shape == (5, 8, 8, 1)
    assert (one.backend, other.backend) == ("ort", "ort")
    assert other.figures["ssim"].value == pytest.approx(1)
    assert other.figures["psnr"].value == pytest.approx(58.9, abs=0.1)
    assert one.figures["fid"] == other.figures["fid"]
    assert one.left_out.keys() == {"clip-score", "psnr", "ssim"}
    assert result.features is not None
    assert result.features["about"].startswith("a toy")


def test_the_environment_is_told(result: BenchResult) -> None:
    assert {
        "libraries",
        "processor",
        "load_average_before",
        "load_average_after",
        "workers",
    } <= result.environment.keys()
    assert result.threads == 1
    assert result.command


def test_a_worker_that_dies_is_named_and_the_others_are_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = bench.Run.turn

    def fatal(self: bench.Run, number: int, condition: Condition) -> None:
        if self.entry.model.name == "tiny (2)" and number == 1 and self.failure is None:
            assert self.worker is not None
            os.kill(self.worker.pid, signal.SIGKILL)
        turn(self, number, condition)

    monkeypatch.setattr(bench.Run, "turn", fatal)
    recipe = dataclasses.replace(SMALL, baseline=str(tiny), candidates=(str(tiny),), backends=("eager",), samples=0)
    result = bench.run_bench(recipe, tmp_path)
    whole, dead = result.subjects
    assert whole.failure is None
    assert len([turn for turn in whole.turns if turn.round > 0]) == 4
    assert "SIGKILL" in (dead.failure or "")
    assert {turn.round for turn in dead.turns} == {0}
    assert [row.model for row in result.rows] == ["tiny", "tiny"]
    assert any("tiny (2) / eager" in warning for warning in result.warnings)
    assert result.quality == ()


def test_an_interrupt_ends_every_process(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []

    def interrupt(self: bench.Run, *_: Any) -> None:
        started.append(self.worker)
        raise KeyboardInterrupt

    monkeypatch.setattr(bench.Run, "open", interrupt)
    with pytest.raises(KeyboardInterrupt):
        bench.run_bench(dataclasses.replace(SMALL, baseline=str(tiny), backends=("eager",)), tmp_path / "out")
    (worker,) = started
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"baseline": "/nowhere"}, "/nowhere"),
        ({"candidates": ("/nowhere",)}, "/nowhere"),
        ({"backends": ("egaer",)}, "did you mean eager"),
        ({"backends": ()}, "backends"),
        ({"batch_sizes": (1, 1)}, "batch_sizes"),
        ({"batch_sizes": (0,)}, "too small"),
        ({"rounds": 0}, "too small"),
        ({"samples": -1}, "too small"),
        ({"clip": "/nowhere"}, "no CLIP model"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(
    change: dict[str, Any], said: str, tiny: Path, tmp_path: Path
) -> None:
    with pytest.raises(DpctlError, match=said):
        bench.run_bench(dataclasses.replace(SMALL, **{"baseline": str(tiny)} | change), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_baseline_is_measured_on_more_backends_and_with_fewer_steps(
    tiny: Path, toy_space: FeatureSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A candidate that always takes half of the baseline's time, so that a number of steps is known.
    monkeypatch.setattr(measuring.Run, "warm", lambda run, _: 1.0 if run.entry.baseline else 0.5)
    recipe = dataclasses.replace(
        SMALL, baseline=str(tiny), candidates=(str(tiny),), backends=("eager",), num_inference_steps=(4,)
    )
    result = bench.run_bench(
        dataclasses.replace(recipe, batch_sizes=(1,), baselines=("eager",), fewer_steps=True), tmp_path, space=toy_space
    )
    assert result.fewer_steps == (FewerSteps("tiny (2)", "eager", 4, 2),)
    rows = [(row.model, row.num_inference_steps, row.instead_of) for row in result.rows]
    assert rows == [("tiny", 4, None), ("tiny (2)", 4, None), ("tiny", 2, 4)]
    assert result.rows[2].pruning is not None
    assert [(q.model, q.num_inference_steps) for q in result.quality] == [("tiny", 4), ("tiny", 2), ("tiny (2)", 4)]
    # The same network draws the same pictures, and with half of the steps others.
    assert result.quality[2].figures["ssim"].value == pytest.approx(1)
    assert result.quality[1].figures["ssim"].value < 0.999


def test_what_was_measured_before_an_interruption_is_kept(
    tiny: Path, toy_space: FeatureSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    turn = measuring.Run.turn

    def interrupted(self: measuring.Run, number: int, condition: Condition) -> None:
        if number == 2:
            raise KeyboardInterrupt
        turn(self, number, condition)

    monkeypatch.setattr(measuring.Run, "turn", interrupted)
    recipe = dataclasses.replace(SMALL, baseline=str(tiny), candidates=(str(tiny),), backends=("eager",))
    result = bench.run_bench(recipe, tmp_path, space=toy_space)
    assert result.interrupted
    assert read_result(tmp_path / "bench.json") == result
    assert all({turn.round for turn in subject.turns} == {0, 1} for subject in result.subjects)
    assert (result.quality, len(result.rows)) == ((), 4)
    assert any("interrupted" in warning for warning in result.warnings)


def test_a_batch_beyond_an_export_is_refused_before_it_runs(tiny: Path, exported: Path, tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        SMALL, baseline=str(tiny), candidates=(str(exported),), backends=("eager", "ort"), batch_sizes=(1, 4096)
    )
    entries = subjects.prepare(
        dataclasses.replace(recipe, backends=("ort",)), subjects.describe(recipe)[1:], (), bench.progress.no_bar
    )
    assert [entry.refused is not None and "batches of 64 at most" in entry.refused for entry in entries] == [True]


def test_an_unknown_precision_is_refused(tiny: Path) -> None:
    with pytest.raises(DpctlError, match="unknown precision"):
        bench.check(dataclasses.replace(SMALL, baseline=str(tiny), precision="fp8"))


def test_torch_runs_in_the_precision_that_is_asked_for(
    tiny: Path, toy_space: FeatureSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[str, Any]] = []
    ask = measuring.Worker.ask

    def noted(self: measuring.Worker, what: str, **request: Any) -> dict[str, Any]:
        if what == "open":
            sent.append((request["backend"], request["precision"]))
        return ask(self, what, **request)

    monkeypatch.setattr(measuring.Worker, "ask", noted)
    recipe = dataclasses.replace(SMALL, baseline=str(tiny), backends=("eager",), batch_sizes=(1,), precision="bf16")
    result = bench.run_bench(recipe, tmp_path / "bf16", space=toy_space)
    (subject,) = result.subjects
    assert (subject.failure, subject.precision) == (None, "bf16")
    assert subject.layers
    assert set(sent) == {("eager", "bf16")}
    assert not any("precision" in warning for warning in result.warnings)
    # The pictures are drawn in it too, and are not those of float32.
    drawn = load_samples(tmp_path / "bf16" / "samples" / "0-2-steps.npz")
    asked: dict[str, Any] = {"scheduler": recipe.scheduler, "threads": 1}
    half, whole = (
        to_bytes(open_painter(tiny, "eager", **asked, precision=precision).paint(range(5), 2))
        for precision in ("bf16", "fp32")
    )
    assert (drawn == half).all()
    assert (drawn != whole).any()


def test_what_cannot_be_profiled_is_measured_and_judged(
    tiny: Path, toy_space: FeatureSpace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = measuring.Worker.ask

    def refusing(self: measuring.Worker, what: str, **request: Any) -> dict[str, Any]:
        if what == "profile":
            raise DpctlError("the profiler does not time this", "a device", "use another")
        return ask(self, what, **request)

    monkeypatch.setattr(measuring.Worker, "ask", refusing)
    recipe = dataclasses.replace(SMALL, baseline=str(tiny), backends=("eager",), batch_sizes=(1,))
    (subject,) = bench.run_bench(recipe, tmp_path, space=toy_space).subjects
    assert (subject.failure, subject.layers) == (None, ())
    assert (tmp_path / "samples" / "0-2-steps.npz").is_file()


def test_candidates_in_another_precision_than_the_baseline_are_named(make_result: Any) -> None:
    result = make_result({("base", "ort"): [2.0] * 8, ("slim", "ort"): [1.0] * 8})
    base, slim = result.subjects
    assert not any("precision" in warning for warning in stability.warnings(result))
    unlike = dataclasses.replace(result, subjects=(base, dataclasses.replace(slim, precision="fp16")))
    assert any("slim / ort is in fp16" in warning for warning in stability.warnings(unlike))
