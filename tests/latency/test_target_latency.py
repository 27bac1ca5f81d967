"""A latency target: what it asks for, how the search comes near to it, and what stands in the artifact."""

import json
import math
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dpctl import chain
from dpctl.artifact import read_manifest
from dpctl.bench.compare import Estimate
from dpctl.cost import stats
from dpctl.errors import DpctlError
from dpctl.inspect import report
from dpctl.latency import clock
from dpctl.latency.build import Exports
from dpctl.latency.clock import Clock, Timed
from dpctl.latency.document import read_profile
from dpctl.latency.goal import check, read_goal
from dpctl.latency.profile import profile
from dpctl.latency.search import BUILDS, CLOSE, Build, choose, propose, search
from dpctl.models import load_model
from dpctl.progress import no_bar
from dpctl.recipe import ExportRecipe, LatencyRecipe, PruneRecipe
from export.to_onnx import export_model
from runtime.layers import LayerTime

WANTED = PruneRecipe("magnitude", latency=LatencyRecipe("0.6"), align=1)


@pytest.mark.parametrize(("text", "baseline_s", "share"), [("0.5", 9.0, 0.5), ("12ms", 0.024, 0.5), ("2 s", 4.0, 0.5)])
def test_a_target_is_a_share_or_a_time(text: str, baseline_s: float, share: float) -> None:
    assert read_goal(text).of(baseline_s) == pytest.approx(share)


@pytest.mark.parametrize(
    "text", ["0", "1", "1.5", "nan", "-0.5", "fast", "ms", "0 ms", "-3ms", "infms", "nans", "12 m"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(DpctlError, match="--target-latency") as caught:
        read_goal(text)
    assert "12ms" in caught.value.todo


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"backend": "eager"}, "for a backend that runs exported networks"),
        ({"backend": "orrt"}, "unknown backend"),
        ({"precision": "fp8"}, "unknown precision"),
        ({"of": "step"}, "kind of latency"),
        ({"scheduler": "dimm"}, "unknown scheduler"),
        ({"batch_size": 0}, "below 1"),
        ({"threads": -1}, "below 1"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(changed: dict[str, Any], message: str, tmp_path: Path) -> None:
    recipe = PruneRecipe("magnitude", latency=LatencyRecipe(**{"target": "0.5"} | changed))
    with pytest.raises(DpctlError, match=message):
        chain.prune("no model is looked at", tmp_path / "out", recipe)
    assert check(LatencyRecipe("3ms")).latency_s == pytest.approx(0.003)


def test_a_target_beside_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match="exactly one target") as caught:
        chain.prune("reference", tmp_path / "out", PruneRecipe(target_macs=0.5, latency=LatencyRecipe()))
    assert caught.value.got == "target_macs, target_latency"


def timed(ratio: float) -> Timed:
    return Timed(Estimate(ratio, ratio, ratio, 9), ratio * 0.01, 0.01)


class Stairs:
    """Exports of networks whose MACs come in steps; a clock that knows what they take."""

    def __init__(self, takes: Callable[[float], float], steps: int = 1000, floor: float = 0.0) -> None:
        self.takes, self.steps, self.floor = takes, steps, floor

    def cut(self, macs: float) -> Any:
        level = max(int(macs * self.steps), int(self.floor * self.steps) + 1)
        return SimpleNamespace(widths={"all": level}, stock=None, macs=level / self.steps)

    def of_widths(self, widths: Any, stock: Any) -> Any:
        return widths["all"] / self.steps

    def time(self, macs: Any) -> Timed:
        return timed(self.takes(macs))


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("constant", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("bend", [0.7, 1.0, 1.4])
def test_a_few_builds_come_near(share: float, constant: float, bend: float) -> None:
    stairs: Any = Stairs(lambda macs: constant + (1 - constant) * macs**bend)
    builds = search(stairs, stairs, stairs, share, no_bar)
    assert abs(choose(builds, share).share / share - 1) <= CLOSE
    assert len(builds) <= BUILDS // 2


def test_coarse_steps_end_the_search_at_the_nearest() -> None:
    stairs: Any = Stairs(lambda macs: macs, steps=10)
    builds = search(stairs, stairs, stairs, 0.57, no_bar)
    assert {build.candidate.macs for build in builds} >= {0.5, 0.6}
    assert len(builds) == len({build.candidate.macs for build in builds}) < BUILDS
    assert choose(builds, 0.57).candidate.macs == 0.5
    assert choose(builds, 0.58).candidate.macs == 0.6


def test_a_target_below_the_floor_names_it() -> None:
    stairs: Any = Stairs(lambda macs: 0.2 + 0.8 * macs, floor=0.25)
    builds = search(stairs, stairs, stairs, 0.3, no_bar)
    with pytest.raises(DpctlError, match="cannot be reached") as caught:
        choose(builds, 0.3)
    assert "0.401" in caught.value.got
    assert "0.401" in caught.value.todo


def test_the_next_candidate_lies_between_its_neighbours() -> None:
    def built(macs: float, ratio: float) -> Build:
        return Build(SimpleNamespace(macs=macs), timed(ratio))  # type: ignore[arg-type]

    assert 0.0 < propose([], 0.5) < 0.5
    builds = [built(0.4, 0.55), built(0.3, 0.45)]
    assert propose(builds, 0.5) == pytest.approx(0.35)
    assert choose(builds, 0.46).candidate.macs == 0.3


@pytest.fixture
def by_macs(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Let a clock read the MACs of what is exported: what a test can know beforehand. Returns what was timed."""
    seen: list[Path] = []

    def macs(directory: Path) -> float:
        manifest = read_manifest(directory)
        assert manifest is not None
        return float(manifest.stats["macs"])

    def time(self: Clock, directory: Path) -> Timed:
        seen.append(directory)
        return timed(0.1 + 0.9 * macs(directory) / macs(self.baseline))

    monkeypatch.setattr(Clock, "time", time)
    return seen


def test_the_artifact_says_what_was_asked_and_what_every_candidate_took(
    toy_pipeline: Path, tmp_path: Path, by_macs: list[Path]
) -> None:
    manifest = chain.prune(str(toy_pipeline), tmp_path / "out", WANTED)
    told = manifest.stats["latency"]
    assert told["asked"] == {
        "target": "0.6", "backend": "ort", "precision": "fp32", "batch_size": 1, "of": "unet",
        "num_inference_steps": 20, "scheduler": "ddim", "share": 0.6, "rows": 1, "size": [8, 8],
    }  # fmt: skip
    assert len(told["builds"]) == len(by_macs) >= 1
    measured = told["builds"][told["chosen"]]
    model = load_model(tmp_path / "out")
    assert stats(model.unet)["macs"] / manifest.stats["unpruned"]["macs"] == pytest.approx(
        (measured["ratio"] - 0.1) / 0.9
    )
    assert manifest.stats["achieved"]["latency"] == measured["ratio"] <= 1.05 * 0.6
    assert read_manifest(tmp_path / "out") == manifest
    assert "asked" in str(report(manifest, tmp_path / "out").json["stats"]["latency"])
    assert not list(tmp_path.glob("*candidate*"))


def test_a_pruned_model_is_timed_against_the_unpruned_one(
    toy_pipeline: Path, tmp_path: Path, by_macs: list[Path]
) -> None:
    first = chain.prune(str(toy_pipeline), tmp_path / "first", PruneRecipe("magnitude", target_macs=0.8, align=1))
    second = chain.prune(str(tmp_path / "first"), tmp_path / "second", WANTED)
    ratio = second.stats["achieved"]["latency"]
    assert second.stats["macs"] / first.stats["unpruned"]["macs"] == pytest.approx((ratio - 0.1) / 0.9)


def test_the_real_clock_refuses_what_no_machine_can_do(
    toy_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Clock, "__init__", partialmethod(Clock.__init__, precision=clock.Precision(too_wide=math.inf))
    )  # it is never quiet
    monkeypatch.setattr(clock, "MOST", clock.FEWEST)
    for target, message in (("100s", "meets the target already"), ("1 us", "cannot be reached")):
        recipe = PruneRecipe("magnitude", latency=LatencyRecipe(target, threads=1), align=1)
        with pytest.raises(DpctlError, match=message):
            chain.prune(str(toy_pipeline), tmp_path / "out", recipe)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("of", ["unet", pytest.param("image", marks=pytest.mark.slow)])
def test_the_real_clock_times_both_turn_by_turn(
    toy_pipeline: Path, tmp_path: Path, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    export_model(load_model(toy_pipeline), tmp_path / "one", ExportRecipe(batch=(1, 2, 2)))
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr(clock, "MOST", clock.FEWEST)
    wanted = LatencyRecipe(of=of, num_inference_steps=2, batch_size=2)
    with Clock(tmp_path / "one", wanted, 2, 1, clock.Precision(too_wide=math.inf)) as running:
        found = running.time(tmp_path / "two")
        assert running.baseline_s() > 0
        running.precision = clock.Precision(too_wide=0.0)
        with pytest.raises(DpctlError) as caught:
            running.time(tmp_path / "two")
    assert found.ratio.count == clock.FEWEST
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert caught.value.failed == "this machine is too noisy to measure a latency"
    assert "stop what else runs here" in caught.value.todo


def test_options_of_no_target_are_refused(dpctl: Any, tmp_path: Path) -> None:
    found = dpctl("prune", "reference", "--out", tmp_path / "out", "--ratio", "0.5", "--backend", "ort")
    assert found.code == 1
    assert "options of a latency target, but there is none" in found.err
    shown = dpctl("prune", "x", "--out", "y", "--target-latency", "12ms", "--latency-of", "image", "--dry-run")
    assert json.loads(shown.out)["latency"]["of"] == "image"


# --- by a latency model -----------------------------------------------------------------------------------------------


def layer_times(exports: Exports, widths: dict[str, int]) -> dict[str, float]:
    """Return what a machine would take that does 1e9 MACs a second, in blocks of 4 channels."""
    found = {}
    for layer in exports.network.layers:
        a, b = (-(-side.width(widths) // 4) * 4 for side in (layer.inputs, layer.outputs))
        found[layer.name] = 1e-7 * b + layer.positions * layer.kernel * a * b / 1e9
    return found


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, int]]:
    """Let networks be timed by such a machine: what is built and how it is planned stays. Returns the widths seen."""
    seen: list[dict[str, int]] = []
    opened: dict[Path, tuple[Exports, dict[str, int]]] = {}

    def baseline(self: Exports) -> Path:
        opened[self._whole] = (self, self.network.full())
        return self._whole

    def of_widths(self: Exports, widths: Any, stock: Any = None) -> Path:
        seen.append(dict(widths))
        opened[Path(str(len(seen)))] = (self, dict(widths))
        return Path(str(len(seen)))

    def seconds(directory: Path) -> float:
        return 1e-4 + sum(layer_times(*opened[directory]).values())

    def time(self: Clock, directory: Path) -> Timed:
        took, whole = seconds(directory), seconds(self.baseline)
        return Timed(Estimate(took / whole, took / whole, took / whole, 9), took, whole)

    def profiled(self: Clock, directory: Path, passes: int) -> Any:
        layers = [LayerTime(name, "Conv", took) for name, took in layer_times(*opened[directory]).items()]
        return self.time(directory), layers

    monkeypatch.setattr(Exports, "baseline", baseline)
    monkeypatch.setattr(Exports, "of_widths", of_widths)
    monkeypatch.setattr(Clock, "__enter__", lambda self: self)
    monkeypatch.setattr(Clock, "baseline_s", lambda self: seconds(self.baseline))
    monkeypatch.setattr(Clock, "time", time)
    monkeypatch.setattr(Clock, "profile", profiled)
    return seen


@pytest.fixture
def latency_file(toy_pipeline: Path, tmp_path: Path, machine: list[dict[str, int]]) -> Path:
    path = tmp_path / "latency.json"
    profile(str(toy_pipeline), path, LatencyRecipe(threads=1), networks=16, held_out=6)
    return path


def by_model(path: Path, target: str = "0.6", **changed: Any) -> PruneRecipe:
    wanted = LatencyRecipe(target, model=str(path), threads=1)
    return PruneRecipe(**{"criterion": "magnitude", "latency": wanted, "align": 1} | changed)


def test_a_profile_that_was_stopped_goes_on(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, machine: list[dict[str, int]]
) -> None:
    path, asked = tmp_path / "cut.json", {"networks": 16, "held_out": 6}
    whole, seen = read_profile(latency_file), len(machine)
    with pytest.raises(KeyboardInterrupt):
        profile(str(toy_pipeline), path, LatencyRecipe(threads=1), **asked, bar=interrupted_after(5))
    assert len(read_profile(path).samples) == 5
    with pytest.raises(DpctlError, match="the output is there already"):
        profile(str(toy_pipeline), path, LatencyRecipe(threads=1), **asked)
    with pytest.raises(DpctlError, match="of another seed"):
        profile(str(toy_pipeline), path, LatencyRecipe(threads=1), **asked, seed=1, resume=True)
    with pytest.raises(DpctlError, match="another measurement"):
        profile(str(toy_pipeline), path, LatencyRecipe(batch_size=2, threads=1), **asked, resume=True)
    told = profile(str(toy_pipeline), path, LatencyRecipe(threads=1), **asked, resume=True)
    assert read_profile(path) == whole
    assert len(machine) - seen == 1 + 16 + 6  # each once
    assert "6 networks held out" in told.renderables[-1]
    assert told.json["median_error"] < 0.02


def interrupted_after(count: int) -> Any:
    """Return a progress bar that stops the run after so many steps."""

    @contextmanager
    def bar(description: str, total: int, *, done: int = 0) -> Any:
        left = iter(range(count - 1))

        def advance(*_: Any, **__: Any) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        yield advance

    return bar


def test_widths_planned_by_a_model_meet_the_target_at_once(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, machine: list[dict[str, int]]
) -> None:
    machine.clear()
    manifest = chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file))
    told = manifest.stats["latency"]
    (build,) = told["builds"]
    assert len(machine) == 1
    assert build["predicted"] == pytest.approx(build["ratio"], rel=0.03)
    assert 0.95 * 0.6 <= build["ratio"] <= 1.05 * 0.6
    assert {name: pair[1] for name, pair in manifest.stats["widths"].items()} == machine[0]
    assert "predicted" in str(report(manifest, tmp_path / "out").renderables[0].columns[1]._cells)


def test_a_model_that_is_off_is_corrected(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, machine: list[dict[str, int]]
) -> None:
    found = read_profile(latency_file)
    # The machine got slower for narrow networks than it was when the file was made.
    samples = [replace(s, latency_s=s.latency_s * (s.latency_s / found.baseline_s) ** 0.5) for s in found.samples]
    replace(found, samples=tuple(samples)).write(latency_file)
    told = chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file)).stats["latency"]
    assert 2 <= len(told["builds"]) <= 4
    assert abs(told["builds"][0]["ratio"] / 0.6 - 1) > 0.05
    assert abs(told["builds"][told["chosen"]]["ratio"] / 0.6 - 1) <= 0.05


def test_a_model_of_another_machine_plans_and_says_so(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, machine: list[dict[str, int]]
) -> None:
    found = read_profile(latency_file)
    replace(found, environment={**found.environment, "processor": "another"}).write(latency_file)
    machine.clear()
    manifest = chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file))
    assert machine == []
    (build,) = manifest.stats["latency"]["builds"]
    assert "ratio" not in build
    assert manifest.stats["achieved"]["predicted_latency"] == build["predicted"] <= 0.6
    assert "latency" not in manifest.stats["achieved"]
    shown = str(report(manifest, tmp_path / "out").renderables[0].columns[1]._cells)
    assert "by a model of another machine, not measured" in shown
    with pytest.raises(DpctlError, match="another machine"):
        profile(str(toy_pipeline), latency_file, LatencyRecipe(threads=1), networks=16, resume=True)


def test_what_a_model_cannot_plan_is_refused(toy_pipeline: Path, tmp_path: Path, latency_file: Path) -> None:
    asked = {
        "below the floor": (by_model(latency_file, "0.01"), "floor|budget|reached"),
        "another model": (by_model(latency_file), "another model"),
        "stock": (by_model(latency_file, layout="stock", align=2), "plans every group by itself"),
        "image": (
            replace(by_model(latency_file), latency=LatencyRecipe("0.5", of="image", model=str(latency_file))),
            "of calls of the network",
        ),
    }
    other = tmp_path / "other"
    chain.prune(str(toy_pipeline), other, PruneRecipe("magnitude", target_macs=0.9, align=1))
    for name, (recipe, message) in asked.items():
        with pytest.raises(DpctlError, match=message):
            chain.prune(str(other if name == "another model" else toy_pipeline), tmp_path / "out", recipe)
        assert not (tmp_path / "out").exists()
