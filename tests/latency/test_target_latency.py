"""A latency target: what it asks for, how the search comes near to it, and what stands in the artifact."""

import dataclasses
import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from functools import partialmethod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dpctl import chain
from dpctl import prune as pruning
from dpctl.artifact import read_manifest
from dpctl.bench.compare import Estimate
from dpctl.cost import stats
from dpctl.errors import DpctlError
from dpctl.inspect import report
from dpctl.latency import clock
from dpctl.latency import profile as profiling
from dpctl.latency.build import Exports
from dpctl.latency.clock import Clock, Timed
from dpctl.latency.document import architecture_of, read_profile
from dpctl.latency.goal import check, read_goal
from dpctl.latency.profile import profile
from dpctl.latency.search import BUILDS, CLOSE, Build, choose, propose, search
from dpctl.models import load_model
from dpctl.progress import no_bar
from dpctl.prune import score
from dpctl.prune.unpruned import unpruned_network
from dpctl.recipe import ExportRecipe, LatencyRecipe, PruneRecipe
from export.to_onnx import export_model
from runtime.layers import JOINED

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
        self.whole = SimpleNamespace(macs=1.0)

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
        "threads": torch.get_num_threads(),
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


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let nothing be exported; returns the MACs of what was timed.

    A network takes a time that grows with the root of its MACs: 0.8 of the unpruned one's as the model is.
    """
    seen: list[int] = []
    whole: list[int] = []

    def baseline(self: Exports) -> Path:
        whole.append(self.network.cost("macs", self.network.full()))
        return Path("whole")

    def of_widths(self: Exports, widths: Any, stock: Any = None) -> Path:
        seen.append(self.network.cost("macs", widths))
        return Path("slim")

    monkeypatch.setattr(Exports, "baseline", baseline)
    monkeypatch.setattr(Exports, "of_widths", of_widths)
    monkeypatch.setattr(Clock, "__enter__", lambda self: self)
    monkeypatch.setattr(Clock, "baseline_s", lambda self: 0.01)
    monkeypatch.setattr(Clock, "time", lambda *_: timed(0.8 * (seen[-1] / whole[-1]) ** 0.5))
    return seen


@pytest.mark.parametrize(("share", "met"), [(0.75, 0.7125), (0.9, None), (0.8, None)])
def test_a_slim_model_that_is_slower_than_its_macs_is_cut_further(
    toy_pipeline: Path, tmp_path: Path, unbuilt: list[int], share: float, met: float | None
) -> None:
    """It takes 0.8 of the latency with 0.6 of the MACs: what a straight line from the unpruned model says is met."""
    slim = tmp_path / "slim"
    chain.prune(str(toy_pipeline), slim, PruneRecipe("magnitude", target_macs=0.6, align=1))
    recipe = dataclasses.replace(WANTED, latency=LatencyRecipe(str(share)))
    if met is None:
        with pytest.raises(DpctlError, match="meets the target already") as caught:
            chain.prune(str(slim), tmp_path / "out", recipe)
        assert "it takes 0.800" in caught.value.got
        assert not (tmp_path / "out").exists()
    else:
        found = chain.prune(str(slim), tmp_path / "out", recipe).stats["achieved"]["latency"]
        assert met <= found <= 1.05 * share
        assert unbuilt[1] < unbuilt[0]  # the model as it is comes first


def test_scores_that_are_none_are_told_as_they_are(
    toy_pipeline: Path, tmp_path: Path, unbuilt: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(model: Any, recipe: Any, **_: Any) -> Any:
        scored = score(model, recipe)
        return dataclasses.replace(scored, scores={n: [math.inf, *of[1:]] for n, of in scored.scores.items()})

    monkeypatch.setattr(pruning, "score", endless)
    with pytest.raises(DpctlError, match="not finite"):
        chain.prune(str(toy_pipeline), tmp_path / "out", WANTED)


def test_a_stock_cut_is_timed_against_the_unpruned_one_too(
    toy_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exported: list[Any] = []
    monkeypatch.setattr(Exports, "_export", lambda self, unet, out: exported.append(unet))
    slim, out = tmp_path / "slim", tmp_path / "out"
    first = chain.prune(str(toy_pipeline), slim, PruneRecipe("magnitude", target_macs=0.8, align=1, layout="stock"))
    exports = Exports(load_model(slim), WANTED, tmp_path)
    exports.baseline()
    assert [stats(unet)["macs"] for unet in exported] == [first.stats["unpruned"]["macs"]]
    assert exports.unpruned == architecture_of(load_model(toy_pipeline).unet) != exports.architecture
    for layout in ("free", "stock"):
        chain.prune(str(slim), out / layout, PruneRecipe("magnitude", target_macs=0.5, align=1, layout=layout))
    for again in out.iterdir():  # nor is it forgotten when that is cut again
        assert stats(unpruned_network(load_model(again)))["macs"] == first.stats["unpruned"]["macs"]
    older = dataclasses.replace(first, stats={k: v for k, v in first.stats.items() if k != "unpruned_config"})
    (slim / "dpctl.json").write_text(older.to_json(), encoding="utf-8")
    with monkeypatch.context() as patched, pytest.raises(DpctlError, match="the unpruned network is not known"):
        patched.setattr(pruning, "score", lambda *_, **__: pytest.fail("scored"))
        chain.prune(str(slim), tmp_path / "another", WANTED)
    for layout in ("free", "stock"):  # nor is it taken for the unpruned one once it is cut again
        cut = PruneRecipe("magnitude", target_macs=0.4, align=1, layout=layout)
        assert "unpruned_config" not in chain.prune(str(slim), tmp_path / layout, cut).stats
        with pytest.raises(DpctlError, match="the unpruned network is not known"):
            unpruned_network(load_model(tmp_path / layout))


def test_a_scan_is_made_of_a_cut_to_a_latency_too(
    toy_pipeline: Path, toy_images: Path, tmp_path: Path, unbuilt: list[int]
) -> None:
    recipe = dataclasses.replace(WANTED, sensitivity=True, data=str(toy_images))
    told = chain.prune(str(toy_pipeline), tmp_path / "out", recipe).stats["sensitivity"]
    assert told["model"] == load_model(toy_pipeline).digest


def test_a_backend_that_cannot_run_is_told_before_a_model_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "openvino", None)
    missing = {
        LatencyRecipe(backend="trt"): "runs on an NVIDIA GPU",
        LatencyRecipe(backend="ov"): "needs OpenVINO",
        LatencyRecipe(precision="bf16"): "no bfloat16 on a processor",
    }
    for wanted, message in missing.items():
        with pytest.raises(DpctlError, match=message):
            chain.prune("no model is looked at", tmp_path / "out", dataclasses.replace(WANTED, latency=wanted))
        with pytest.raises(DpctlError, match=message):
            profile("no model is looked at", tmp_path / "latency.json", wanted)


def test_a_clock_that_cannot_open_its_network_leaves_no_process(toy_pipeline: Path) -> None:
    with pytest.raises(DpctlError), Clock(toy_pipeline, LatencyRecipe(), 1, 1):
        pytest.fail("it opened a directory that was not exported")
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    assert not [pid for pid in children if "dpctl.bench.worker" in Path(f"/proc/{pid}/cmdline").read_text()]


@pytest.mark.slow
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
        again, layers = running.profile(tmp_path / "two", passes=2)
        running.precision = clock.Precision(too_wide=0.0)
        with pytest.raises(DpctlError) as caught:
            running.time(tmp_path / "two")
    assert found.ratio.count == clock.FEWEST
    assert found.ratio.low <= found.ratio.value <= found.ratio.high
    assert again.ratio.count == clock.FEWEST
    convolutions = {n for n, m in load_model(toy_pipeline).unet.named_modules() if isinstance(m, torch.nn.Conv2d)}
    assert convolutions <= {name for layer in layers if layer.latency_s > 0 for name in layer.name.split(JOINED)}
    assert caught.value.failed == "this machine is too noisy to measure a latency"
    assert "stop what else runs here" in caught.value.todo


def test_options_of_no_target_are_refused(dpctl: Any, tmp_path: Path) -> None:
    found = dpctl("prune", "reference", "--out", tmp_path / "out", "--ratio", "0.5", "--backend", "ort")
    assert found.code == 1
    assert "options of a latency target, but there is none" in found.err
    shown = dpctl("prune", "x", "--out", "y", "--target-latency", "12ms", "--latency-of", "image", "--dry-run")
    assert json.loads(shown.out)["latency"]["of"] == "image"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"num_inference_steps": 5}, "takes no steps"),
        ({"scheduler": "euler"}, "takes no steps"),
    ],
)
def test_what_a_call_would_not_read_is_refused(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DpctlError, match=message):
        check(LatencyRecipe(**changed))
    check(LatencyRecipe(of="image", **changed))


def test_a_latency_file_is_asked_for_by_the_command(dpctl: Any, toy_pipeline: Path, tmp_path: Path) -> None:
    asked = ("--target-latency", "0.5", "--latency-model", tmp_path / "none.json")
    for more in ((), ("--dry-run",)):
        found = dpctl("prune", toy_pipeline, "--out", tmp_path / "out", *asked, *more)
        assert found.code == 1
        assert "no such latency file" in found.err
        assert "make one with `dpctl profile`" in found.err


@pytest.mark.slow
def test_the_command_profiles_a_model(
    dpctl: Any, toy_pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiling, "ROUGH", clock.Precision(enough=1.0, too_wide=math.inf))  # it is never quiet
    out = tmp_path / "latency.json"
    found = dpctl("profile", toy_pipeline, "--out", out, "--networks", 7, "--held-out", 3, "--threads", 1, "--json")
    assert found.code == 0, found.err
    told, file = json.loads(found.out), read_profile(out)
    assert (len(file.samples), len(file.held_out), len(told["pairs"])) == (8, 3, 3)
    assert all(sample.latency_s > 0 and sum(sample.layers.values()) > 0 for sample in file.samples)
    assert file.is_from_here


def test_a_plan_alone_meets_no_latency(toy_pipeline: Path, tmp_path: Path, dpctl: Any) -> None:
    with pytest.raises(DpctlError, match="met by what runs"):
        pruning.prune(str(toy_pipeline), tmp_path / "out", WANTED)
    assert "plan" not in chain.preview_cut(str(toy_pipeline), WANTED)
    found = dpctl("prune", toy_pipeline, "--out", tmp_path / "out", "--target-latency", "fast", "--dry-run")
    assert found.code == 1
    assert "no fraction and no time" in found.err
