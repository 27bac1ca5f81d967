"""`dpctl compare`: figures against what they were made from, and how the command ends."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import Done

from dpctl.bench.document import read_result, write_result
from dpctl.bench.metrics import Figure, figure
from dpctl.bench.regression import Change, Comparison, compare
from dpctl.bench.result import BenchResult, Memory, Quality
from dpctl.errors import DpctlError
from dpctl.report.regression import verdict

BASE = [2.0, 2.1, 1.9, 2.0, 2.2, 2.0, 1.8, 2.0]
FAST = [1.0, 1.05, 0.95, 1.0, 1.1, 1.0, 0.9, 1.0]  # twice as fast in every round
SAME = {("base", "eager"): BASE, ("slim", "eager"): FAST}
MACHINE = {"processor": "P", "gpu": None, "python": "3.11.2", "libraries": {"torch": "2.13.0", "safetensors": "0.6"}}
VERDICT = (
    "1 of the 4 figures that count is significantly worse: "
    "speed-up over the baseline of slim / eager, batch 1, 2 steps, worse by 20.0 %."
)

Make = Callable[..., BenchResult]


@pytest.fixture
def compared(dpctl: Callable[..., Done], tmp_path: Path) -> Callable[..., Done]:
    """Return `dpctl compare` on two results, or on two paths."""

    def path(given: BenchResult | Path, name: str) -> Path:
        if isinstance(given, Path):
            return given
        (tmp_path / name).mkdir(exist_ok=True)
        write_result(given, tmp_path / name)
        return tmp_path / name / "bench.json"

    def run(old: BenchResult | Path, new: BenchResult | Path, *more: str) -> Done:
        return dpctl("compare", path(old, "old"), path(new, "new"), *more)

    return run


@pytest.fixture
def make(make_result: Make) -> Make:
    """Return `make_result` with subjects whose peak memory is well above its noise."""

    def made(*given: Any, **environment: Any) -> BenchResult:
        result = make_result(*given, **environment)
        heavy = tuple(dataclasses.replace(s, memory=(Memory(1, 100_000_000),)) for s in result.subjects)
        return dataclasses.replace(result, subjects=heavy)

    return made


@pytest.fixture
def old(make: Make) -> BenchResult:
    return make(SAME, **MACHINE)


def times(values: list[float], factor: float) -> list[float]:
    return [value * factor for value in values]


def slim(result: BenchResult, **changes: Any) -> BenchResult:
    """Return the result with other values in the candidate's subject."""
    subjects = tuple(dataclasses.replace(s, **changes) if s.model == "slim" else s for s in result.subjects)
    return dataclasses.replace(result, subjects=subjects)


def judged(result: BenchResult, seed: int = 0, samples: int = 64, **figures: Figure) -> BenchResult:
    quality = (Quality("slim", "eager", 2, "samples/1.npz", figures, {}),)
    recipe = result.recipe | {"samples": samples, "seed": seed}
    return dataclasses.replace(result, recipe=recipe, quality=quality)


def fid(value: float, count: int = 64, seed: int = 0) -> Figure:
    """Return a FID whose replicates all move with `seed`'s resamples, whatever the value."""
    wave = np.random.default_rng(seed).normal(0, 1, size=400)
    return figure(value, value + wave - wave.mean(), count=count, against="100 real images", better="lower")


def found(comparison: Comparison, name: str, model: str = "slim") -> Change:
    (change,) = (each for each in comparison.changes if each.figure == name and each.place.model == model)
    return change


# --- what counts -----------------------------------------------------------------------------------------------------


def test_a_run_against_itself_has_no_change(old: BenchResult, compared: Callable[..., Done]) -> None:
    changes = compare(old, old).changes
    assert {change.change for change in changes} == {0.0}
    assert not any(change.significant for change in changes)
    done = compared(old, old, "--max-regression", "0")
    assert (done.code, done.err) == (0, "")
    assert "None of the 4 figures that count is worse by more than 0.0 %." in done.out


def test_a_slower_candidate_is_a_regression_beyond_the_fraction_only(
    make: Make, old: BenchResult, compared: Callable[..., Done]
) -> None:
    new = make(SAME | {("slim", "eager"): times(FAST, 1.25)}, **MACHINE)
    change = found(compare(old, new), "speed-up over the baseline")
    assert (change.old, change.new) == pytest.approx((2.0, 1.6))
    assert change.worse_by == pytest.approx(0.2)
    # The ratio is the same in every round: so is the median of every resample.
    assert (change.low, change.high) == pytest.approx((-0.2, -0.2))
    done = compared(old, new, "--max-regression", "0.1")
    assert done.code == 3
    assert "error: NEW is worse than OLD beyond --max-regression 0.1" in done.err
    assert "speed-up over the baseline of slim / eager, batch 1, 2 steps: worse by 20.0 %" in done.err
    assert "1 of the 4 figures that count is worse by more than 10.0 %" in done.out
    assert compared(old, new, "--max-regression", "0.25").code == 0
    assert compared(old, new).code == 0


def test_a_machine_that_has_slowed_down_is_none(make: Make, old: BenchResult) -> None:
    new = make({key: times(values, 3.0) for key, values in SAME.items()}, **MACHINE)
    comparison = compare(old, new)
    assert found(comparison, "latency p50 (unpaired)").change == pytest.approx(2.0)
    assert found(comparison, "latency p50 (unpaired)").significant
    assert comparison.regressions(0.0) == ()


def test_a_worse_median_within_its_interval_is_none(make: Make, old: BenchResult) -> None:
    scattered = [value * factor for value, factor in zip(FAST, [0.5, 1.3, 0.6, 1.4, 1.3, 0.7, 1.3, 1.3], strict=True)]
    change = found(compare(old, make(SAME | {("slim", "eager"): scattered}, **MACHINE)), "speed-up over the baseline")
    assert change.worse_by == pytest.approx(1 - 1 / 1.3)
    assert not change.significant
    assert not change.regressed(0.05)


def test_a_backend_that_has_become_slower_shows_over_eager_alone(make: Make) -> None:
    subjects = {(model, backend): values for (model, _), values in SAME.items() for backend in ("eager", "ort")}
    slower = {key: times(values, 2.0 if key[1] == "ort" else 1.0) for key, values in subjects.items()}
    comparison = compare(make(subjects, **MACHINE), make(slower, **MACHINE))
    worse = [(change.figure, change.place.model) for change in comparison.regressions(0.05)]
    assert worse == [("speed-up over eager", "base"), ("speed-up over eager", "slim")]


def test_memory_and_files_count_by_their_size(old: BenchResult) -> None:
    new = slim(old, memory=(Memory(1, 120_000_000),), file_bytes=4400)
    worse = [(each.figure, round(each.worse_by, 9)) for each in compare(old, new).regressions(0.05)]
    assert worse == [("peak memory", 0.2), ("file", 0.1)]
    assert [change.figure for change in compare(old, new).regressions(0.15)] == ["peak memory"]
    assert compare(new, old).regressions(0.0) == ()


def test_memory_that_moved_less_than_the_baselines_own_has_not(old: BenchResult) -> None:
    within = slim(old, memory=(Memory(1, 103_000_000),))
    assert compare(old, within).regressions(0.0) == ()
    new = slim(old, memory=(Memory(1, 120_000_000),))
    base, candidate = new.subjects
    for moved in (75_000_000, 125_000_000):  # downwards too: the measurement is that unsteady
        unsteady = dataclasses.replace(base, memory=(Memory(1, moved),))
        assert compare(old, dataclasses.replace(new, subjects=(unsteady, candidate))).regressions(0.0) == ()


def test_quality_of_the_same_noise_is_paired(old: BenchResult) -> None:
    before, after = judged(old, fid=fid(10.0)), judged(old, fid=fid(10.5))
    change = found(compare(before, after), "fid")
    # The replicates differ by 0.5 each, although either interval is four wide.
    assert (change.low, change.high) == pytest.approx((0.05, 0.05))
    assert change.regressed(0.04)
    assert not change.regressed(0.06)
    apart = found(compare(before, judged(old, seed=1, fid=fid(10.5))), "fid")
    assert apart.worse_by == pytest.approx(0.05)
    assert not apart.significant
    assert apart.low is not None
    assert apart.low < -0.2


def test_unpaired_replicates_give_the_interval_of_a_difference(old: BenchResult) -> None:
    before, after = judged(old, fid=fid(10.0, seed=1)), judged(old, seed=1, fid=fid(10.0, seed=2))
    change = found(compare(before, after), "fid")
    assert change.low is not None
    assert change.high is not None
    # Two independent normals of standard deviation 1, divided by 10: 1.96 sqrt(2) / 10 on either side.
    assert (change.low, change.high) == pytest.approx((-0.277, 0.277), abs=0.03)


def test_a_figure_where_more_is_better(old: BenchResult) -> None:
    def ssim(value: float) -> Figure:
        return figure(value, np.full(4, value), count=64, against="the baseline", better="higher")

    lower, higher = judged(old, ssim=ssim(0.8)), judged(old, ssim=ssim(0.9))
    assert found(compare(higher, lower), "ssim").worse_by == pytest.approx(1 - 0.8 / 0.9)
    assert compare(lower, higher).regressions(0.0) == ()


def test_a_distance_below_zero_is_shown_and_counts_for_nothing(old: BenchResult, compared: Callable[..., Done]) -> None:
    before, after = judged(old, kid=fid(-0.5)), judged(old, kid=fid(5.0))
    assert compare(before, after).regressions(0.0) == ()
    assert "not judged: OLD is not above 0" in compared(before, after).out


# --- what is not there -----------------------------------------------------------------------------------------------


def test_a_candidate_that_died_fails_the_gate(old: BenchResult, compared: Callable[..., Done]) -> None:
    dead = next(s for s in old.subjects if s.model == "slim")
    new = slim(old, failure="killed by SIGKILL", turns=dead.turns[:8])
    assert compared(old, new).code == 0
    done = compared(old, new, "--max-regression", "0.5")
    assert done.code == 3
    assert "missing in NEW: slim / eager: killed by SIGKILL" in done.err


def test_a_figure_that_is_gone_fails_the_gate_unless_none_was_asked_for(
    old: BenchResult, compared: Callable[..., Done]
) -> None:
    before = judged(old, fid=fid(10.0))
    done = compared(before, judged(old), "--max-regression", "0.5")
    assert done.code == 3
    assert "missing in NEW: slim, 2 steps: fid: not measured" in done.err
    assert compared(before, old, "--max-regression", "0.5").code == 0


def test_other_sample_counts_are_not_compared(old: BenchResult) -> None:
    comparison = compare(judged(old, fid=fid(10.0)), judged(old, samples=32, fid=fid(20.0, count=32)))
    assert "slim, 2 steps: fid of 64 samples in OLD, of 32 in NEW: not compared" in comparison.notes
    assert all(change.figure != "fid" for change in comparison.changes)


def test_the_wrong_order_is_noticed(old: BenchResult) -> None:
    later = dataclasses.replace(old, created="2026-02-01T00:00:00+00:00")
    assert compare(old, later).notes == ()
    assert "the wrong way round" in compare(later, old).notes[0]


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"threads": 4}, "threads: 1 in OLD, 4 in NEW"),
        ({"environment": MACHINE | {"processor": "Q"}}, "processor: P in OLD, Q in NEW"),
        ({"environment": MACHINE | {"gpu": "G"}}, "gpu: none in OLD, G in NEW"),
        ({"environment": MACHINE | {"governor": "powersave"}}, "governor: none in OLD, powersave in NEW"),
        ({"environment": MACHINE | {"python": "3.12.0"}}, "Python: 3.11 in OLD, 3.12 in NEW"),
        ({"environment": MACHINE | {"libraries": {"torch": "2.14.0"}}}, "torch: 2.13.0 in OLD, 2.14.0 in NEW"),
        ({"environment": {}}, "processor: P in OLD, none in NEW; Python: 3.11 in OLD, none in NEW; torch: 2.13.0"),
    ],
)
def test_unlike_runs_are_refused_by_name(
    change: dict[str, Any], said: str, old: BenchResult, compared: Callable[..., Done]
) -> None:
    done = compared(old, dataclasses.replace(old, **change))
    assert done.code == 1
    assert done.err.startswith("error: the two benchmarks are unlike\n  got: ")
    assert said in done.err
    assert done.out == ""


def test_other_schedulers_and_baselines_are_refused(old: BenchResult) -> None:
    base, candidate = old.models
    with pytest.raises(DpctlError, match="scheduler: ddim in OLD, euler in NEW"):
        compare(old, dataclasses.replace(old, recipe=old.recipe | {"scheduler": "euler"}))
    with pytest.raises(DpctlError, match=r"guidance scale: none in OLD, 2\.0 in NEW"):
        compare(old, dataclasses.replace(old, recipe=old.recipe | {"guidance_scale": 2.0}))
    with pytest.raises(DpctlError, match="precision: fp32 in OLD, fp16 in NEW"):
        compare(old, dataclasses.replace(old, recipe=old.recipe | {"precision": "fp16"}))
    with pytest.raises(DpctlError, match="the baseline's digest"):
        compare(old, dataclasses.replace(old, models=(dataclasses.replace(base, digest="other"), candidate)))


def test_other_prompts_are_refused_by_what_they_say(old: BenchResult) -> None:
    def told(digest: str, path: str) -> BenchResult:
        both = {"environment": old.environment | {"prompts_digest": digest}, "recipe": old.recipe | {"prompts": path}}
        return dataclasses.replace(old, **both)

    with pytest.raises(DpctlError, match="prompts: 1f in OLD, 2e in NEW"):
        compare(told("1f", "prompts.txt"), told("2e", "prompts.txt"))
    assert compare(told("1f", "prompts.txt"), told("1f", "elsewhere.txt")).changes


def test_what_may_differ_is_compared(old: BenchResult) -> None:
    base, candidate = old.models
    libraries = MACHINE | {"python": "3.11.9", "libraries": {"torch": "2.13.0", "safetensors": "0.7"}}
    retrained = (base, dataclasses.replace(candidate, digest="other"))
    assert compare(old, dataclasses.replace(old, environment=libraries, models=retrained)).changes


def test_nothing_in_common_is_refused(make: Make, old: BenchResult) -> None:
    other = make({("base", "eager"): BASE, ("slimmer", "eager"): FAST}, **MACHINE)
    with pytest.raises(DpctlError, match="no candidate in common"):
        compare(old, other)
    ort = make({("base", "ort"): BASE, ("slim", "ort"): FAST}, **MACHINE)
    with pytest.raises(DpctlError, match="nothing in common"):
        compare(old, ort)


@pytest.mark.parametrize("fraction", ["-0.1", "nan", "inf"])
def test_an_allowed_regression_that_is_no_fraction(fraction: str, compared: Callable[..., Done]) -> None:
    done = compared(Path("/nowhere"), Path("/nowhere"), "--max-regression", fraction)
    assert done.code == 1
    assert "no fraction" in done.err


def test_few_rounds_cannot_gate(make: Make, compared: Callable[..., Done]) -> None:
    few = make({key: values[:3] for key, values in SAME.items()}, **MACHINE)
    done = compared(few, few)
    assert done.code == 0
    assert "speed-ups of fewer than 6 rounds gate nothing" in done.out
    refused = compared(few, few, "--max-regression", "0.1")
    assert refused.code == 1
    assert "no speed-up can be judged" in refused.err


def test_damaged_files_are_refused(old: BenchResult, compared: Callable[..., Done], tmp_path: Path) -> None:
    def damaged(**changes: Any) -> Path:
        path = tmp_path / "damaged.json"
        path.write_text(json.dumps(old.to_dict() | changes), encoding="utf-8")
        return path

    turns = old.to_dict()["subjects"]
    turns[0]["turns"][1]["latency_s"] = math.nan
    text = tmp_path / "text.json"
    text.write_text("{", encoding="utf-8")
    cases = {
        tmp_path / "missing.json": "cannot be read",
        tmp_path: "cannot be read",
        text: "cannot be read",
    }
    for path, said in cases.items():
        assert_refused(compared(old, path), said)
    for changes, said in (
        ({"schema_version": 99}, "unknown benchmark format"),
        ({"threads": "one"}, "damaged"),
        ({"models": []}, "no models"),
        ({"recipe": {}}, "a recipe without batch sizes or steps"),
        ({"subjects": turns}, "latencies that are not positive"),
    ):
        assert_refused(compared(old, damaged(**changes)), said)


def assert_refused(done: Done, said: str) -> None:
    assert done.code == 1
    assert said in done.err
    assert "\n  got: " in done.err
    assert "\n  do:  " in done.err
    assert done.out == ""


# --- what is printed -------------------------------------------------------------------------------------------------


def test_the_table_as_printed(make: Make, old: BenchResult, compared: Callable[..., Done]) -> None:
    new = make(SAME | {("slim", "eager"): times(FAST, 1.25)}, **MACHINE)
    lines = [" ".join(line.split()) for line in compared(old, slim(new, file_bytes=3000)).out.splitlines()]
    assert [line for line in lines if line and "─" not in line] == [
        "figure model / backend batch steps OLD NEW change interval so it is",
        "latency p50 (unpaired) base / eager 1 2 2 s 2 s +0.0 % -5.0 % to +5.3 % no significant difference",
        "peak memory base / eager 1 2 100 MB 100 MB +0.0 % -4.0 % to +4.0 % no significant difference",
        "speed-up over the baseline slim / eager 1 2 2.00x 1.60x -20.0 % -20.0 % to -20.0 % worse",
        "latency p50 (unpaired) slim / eager 1 2 1 s 1.25 s +25.0 % +18.8 % to +31.6 % worse, counts for nothing",
        "peak memory slim / eager 1 2 100 MB 100 MB +0.0 % -4.0 % to +4.0 % no significant difference",
        "file base / eager 4 kB 4 kB +0.0 % unchanged",
        "file slim / eager 4 kB 3 kB -25.0 % better",
        VERDICT,
    ]


def test_json_is_one_document(make: Make, old: BenchResult, compared: Callable[..., Done]) -> None:
    new = make(SAME | {("slim", "eager"): times(FAST, 1.25)}, **MACHINE)
    done = compared(old, new, "--json", "--max-regression", "0.1")
    assert done.code == 3
    document = json.loads(done.out)
    assert document["max_regression"] == 0.1
    assert document["verdict"] == verdict(compare(old, new), 0.1)
    (worst,) = document["regressions"]
    assert worst["place"] == {"model": "slim", "backend": "eager", "batch_size": 1, "num_inference_steps": 2}
    assert worst in document["changes"]


def test_the_evidence_in_the_docs_can_be_compared() -> None:
    path = Path(__file__).parents[2] / "docs/evidence/bench.json"
    result = read_result(path)
    assert compare(result, result).regressions(0.0) == ()


def test_an_approximation_is_not_taken_for_the_model_itself(old: BenchResult) -> None:
    def both(own: float) -> BenchResult:
        result = judged(old, fid=fid(own))
        approximated = dataclasses.replace(result.quality[0], backend="deepcache", figures={"fid": fid(20.0)})
        return dataclasses.replace(result, quality=(*result.quality, approximated))

    changes = compare(both(10.0), both(15.0)).changes
    found = {change.place.backend: (change.old, change.new) for change in changes if change.figure == "fid"}
    assert found == {"eager": (10.0, 15.0), "deepcache": (20.0, 20.0)}
