"""Widths by a latency model: profiled once, predicted, corrected by what is built; refused where it does not fit."""

from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpctl import chain
from dpctl.bench.compare import Estimate
from dpctl.errors import DpctlError
from dpctl.inspect import report
from dpctl.latency.build import Exports
from dpctl.latency.clock import Clock, Timed
from dpctl.latency.document import read_profile
from dpctl.latency.profile import profile
from dpctl.models import read_config
from dpctl.recipe import LatencyRecipe, PruneRecipe
from runtime.layers import LayerTime


def layer_times(exports: Exports, widths: dict[str, int]) -> dict[str, float]:
    """Return what a machine would take that does 1e9 MACs a second, in blocks of 4 channels."""
    found = {}
    for layer in exports.network.layers:
        if layer.is_gone(widths) or (layer.positions and not layer.inputs.width(widths)):
            continue
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


def test_levels_are_planned_within_a_predicted_latency_too(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path
) -> None:
    recipe = by_model(latency_file, "0.7", layout="stock", align=1)
    manifest = chain.prune(str(toy_pipeline), tmp_path / "out", recipe)
    found = manifest.stats["latency"]
    chosen = found["builds"][found["chosen"]]
    assert chosen["predicted"] <= 0.7
    assert chosen["ratio"] == pytest.approx(chosen["predicted"], rel=0.05)
    assert len(found["builds"]) == 1  # its next width is beyond the target
    assert manifest.stats["macs"] < manifest.stats["unpruned"]["macs"]
    assert read_config(tmp_path / "out")["_class_name"] == "UNet2DModel"


def test_whole_branches_go_where_the_latency_is_worth_it(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, machine: list[dict[str, int]]
) -> None:
    recipe = by_model(latency_file, "0.2", depth=True, scope="global")
    manifest = chain.prune(str(toy_pipeline), tmp_path / "out", recipe)
    found = manifest.stats["latency"]
    chosen = found["builds"][found["chosen"]]
    assert any(kept == 0 for _, kept in manifest.stats["widths"].values())
    assert any(width == 0 for width in machine[-1].values())
    assert chosen["ratio"] == pytest.approx(0.2, rel=0.05)
    assert chosen["predicted"] == pytest.approx(chosen["ratio"], rel=0.05)


def test_what_a_model_cannot_plan_is_refused(toy_pipeline: Path, tmp_path: Path, latency_file: Path) -> None:
    asked = {
        "below the floor": (by_model(latency_file, "0.01"), "floor|budget|reached"),
        "another model": (by_model(latency_file), "another model"),
        "local": (by_model(latency_file, scope="local"), "ranks all groups together"),
        "stock": (
            by_model(latency_file, "0.01", layout="stock", align=2),
            "reached in the layout stock(.|\n)*the floor",
        ),
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


def test_too_few_networks_are_refused_before_any_is_timed(toy_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match="so few networks"):
        profile(str(toy_pipeline), tmp_path / "latency.json", LatencyRecipe(), networks=6)
