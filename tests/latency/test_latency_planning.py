"""Widths by a latency model: profiled once, predicted, corrected by what is built; refused where it does not fit."""

import hashlib
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dpctl import chain
from dpctl import prune as pruning
from dpctl.asked import goal
from dpctl.bench.compare import Estimate
from dpctl.errors import DpctlError
from dpctl.inspect import report
from dpctl.latency.build import Exports
from dpctl.latency.clock import Clock, Timed
from dpctl.latency.document import read_profile
from dpctl.latency.profile import profile
from dpctl.models import read_config
from dpctl.progress import no_bar
from dpctl.prune import score
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
    for changed in ({"seed": 1}, {"networks": 18}, {"networks": 12}):
        with pytest.raises(DpctlError, match="of other networks"):
            profile(str(toy_pipeline), path, LatencyRecipe(threads=1), **(asked | changed), resume=True)
    with pytest.raises(DpctlError, match="another measurement"):
        profile(str(toy_pipeline), path, LatencyRecipe(batch_size=2, threads=1), **asked, resume=True)
    told = profile(str(toy_pipeline), path, LatencyRecipe(threads=1), **asked, resume=True)
    assert read_profile(path) == whole
    assert len(machine) - seen == 1 + 16 + 6  # each once
    assert profile(str(toy_pipeline), path, LatencyRecipe(threads=1), **asked, resume=True).json == told.json
    assert len(machine) - seen == 1 + 16 + 6  # a finished file is read
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


def other_machine(path: Path) -> Path:
    """Let a latency file be of another machine."""
    found = read_profile(path)
    replace(found, environment={**found.environment, "processor": "another"}).write(path)
    return path


@pytest.fixture
def elsewhere(latency_file: Path) -> Path:
    return other_machine(latency_file)


def test_a_model_of_another_machine_plans_and_says_so(
    toy_pipeline: Path, tmp_path: Path, elsewhere: Path, machine: list[dict[str, int]]
) -> None:
    latency_file = elsewhere
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
        "below the floor": (by_model(latency_file, "0.01"), "cannot be reached\n(.|\n)*0.010(.|\n)*tried takes 0.04"),
        "another model": (by_model(latency_file), "another model"),
        "local": (by_model(latency_file, scope="local"), "ranks all groups together"),
        "stock": (
            by_model(latency_file, "0.01", layout="stock", align=2),
            "cannot be reached\n(.|\n)*tried takes 0.361",
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


def test_the_floor_of_a_model_of_another_machine_is_what_it_predicts(
    toy_pipeline: Path, tmp_path: Path, elsewhere: Path
) -> None:
    for layout, failed in (("free", "cannot be reached\n"), ("stock", "in the layout stock")):
        with pytest.raises(DpctlError, match=failed) as caught:
            chain.prune(str(toy_pipeline), tmp_path / "out", by_model(elsewhere, "0.01", layout=layout))
        assert caught.value.got.startswith("0.010 (")
        floor = caught.value.got.rsplit(" is ", 1)[1].split()[0]
        manifest = chain.prune(str(toy_pipeline), tmp_path / layout, by_model(elsewhere, floor, layout=layout))
        assert manifest.stats["achieved"]["predicted_latency"] <= float(floor)


def test_a_target_below_the_predicted_floor_may_be_met(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, machine: list[dict[str, int]]
) -> None:
    """The narrowest network is built where predictions are too slow, and a corrected target never is an error."""
    found = read_profile(latency_file)
    slow = [replace(s, latency_s=s.latency_s + 0.05 * found.baseline_s) for s in found.samples]
    replace(found, samples=tuple(slow)).write(latency_file)
    manifest = chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file, "0.041"))
    assert manifest.stats["achieved"]["latency"] == pytest.approx(0.041, rel=0.05)
    assert all(build["predicted"] > 0.05 for build in manifest.stats["latency"]["builds"])


@pytest.mark.parametrize("changed", [{"keep": ("conv_in", "up_blocks.*")}, {"only": ("mid_block.*", "*.conv1")}])
def test_groups_that_stay_whole_are_charged_for_their_widths(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, machine: list[dict[str, int]], changed: dict[str, Any]
) -> None:
    machine.clear()
    manifest = chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file, "0.8", **changed))
    (build,) = manifest.stats["latency"]["builds"]
    assert build["predicted"] == pytest.approx(build["ratio"], rel=0.03)
    assert build["ratio"] == pytest.approx(0.8, rel=0.05)
    assert set(machine[0]) < set(read_profile(latency_file).samples[0].widths)


def test_what_is_predicted_to_be_fast_enough_already_is_refused(
    toy_pipeline: Path, tmp_path: Path, elsewhere: Path
) -> None:
    found = read_profile(elsewhere)
    # As of a model that was pruned before: the unpruned one takes twice as long.
    replace(found, baseline_s=2 * found.baseline_s).write(elsewhere)
    with pytest.raises(DpctlError, match="meets the target already") as caught:
        chain.prune(str(toy_pipeline), tmp_path / "out", by_model(elsewhere, "0.9"))
    assert caught.value.got == "0.900 of the unpruned model's latency is asked for, and it takes 0.500"
    assert not (tmp_path / "out").exists()


def test_a_whole_network_that_is_slower_than_predicted_is_no_candidate(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, machine: list[dict[str, int]]
) -> None:
    found = read_profile(latency_file)
    fast = [replace(s, latency_s=0.9 * s.latency_s) for s in found.samples]
    replace(found, samples=tuple(fast)).write(latency_file)
    machine.clear()
    manifest = chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file, "0.95"))
    assert machine[0] == found.samples[0].widths
    assert len(manifest.stats["latency"]["builds"]) == len(machine) - 1
    assert manifest.stats["achieved"]["latency"] == pytest.approx(0.95, rel=0.03)


def test_a_file_of_another_unpruned_network_is_refused(toy_pipeline: Path, tmp_path: Path, latency_file: Path) -> None:
    replace(read_profile(latency_file), unpruned="0" * 64).write(latency_file)
    with pytest.raises(DpctlError, match="another model\n.*of the unpruned architecture 000000000000"):
        chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file))
    replace(read_profile(latency_file), unpruned=None).write(latency_file)
    chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file))


def test_a_file_says_how_many_threads_and_which_file_it_was(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path
) -> None:
    wanted = LatencyRecipe("0.6", model=str(latency_file))
    recipe = PruneRecipe("magnitude", latency=wanted, align=1)
    manifest = chain.prune(str(toy_pipeline), tmp_path / "out", recipe)
    told = manifest.stats["latency"]
    assert told["asked"]["threads"] == 1
    assert "1 threads" in goal(told)
    assert told["profile"] == {"digest": hashlib.sha256(latency_file.read_bytes()).hexdigest(), "elsewhere": ""}
    assert "threads" not in manifest.recipe["latency"]
    with pytest.raises(DpctlError, match="threads 1, asked for 3"):
        recipe = replace(recipe, latency=replace(wanted, threads=3))
        chain.prune(str(toy_pipeline), tmp_path / "out", recipe, force=True)


def test_a_cut_is_made_again_where_its_latency_file_was(toy_pipeline: Path, tmp_path: Path, latency_file: Path) -> None:
    out, recipe, digest = tmp_path / "out", by_model(latency_file), chain.source_digest(str(toy_pipeline))
    first, again = (chain.prune_stage(str(toy_pipeline), out, recipe, digest, no_bar) for _ in range(2))
    assert again == first
    replace(read_profile(latency_file), seed=7).write(latency_file)
    assert chain.prune_stage(str(toy_pipeline), out, recipe, digest, no_bar) != first


def test_an_upgrade_is_told_and_still_measured(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    found = read_profile(latency_file)
    libraries = found.environment["libraries"]
    others = libraries | {"onnxruntime": "1.0", "openvino": "2020"}
    replace(found, environment={**found.environment, "libraries": others}).write(latency_file)
    manifest = chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file))
    assert "latency" in manifest.stats["achieved"]
    told = f"onnxruntime 1.0, here {libraries['onnxruntime']}"
    assert manifest.stats["latency"]["profile"]["elsewhere"] == told  # of OpenVINO it is none
    assert f"({told}): predictions may be off" in capfd.readouterr().err
    with pytest.raises(DpctlError, match=r"another machine\n.*onnxruntime 1\.0"):
        profile(str(toy_pipeline), latency_file, LatencyRecipe(threads=1), networks=16, held_out=6, resume=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"baseline_s": float("nan")}, "a latency of nan"),
        ({"samples": [{"widths": {}, "layers": {"a": -1.0}, "latency_s": 1.0}]}, "layer's time"),
        ({"samples": [{"widths": {}, "layers": {}, "latency_s": float("inf")}]}, "a latency of inf"),
        ({"conditions": {"backend": "ort"}}, "no precision"),
    ],
)
def test_a_file_with_other_figures_is_damaged(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, changed: dict[str, Any], message: str
) -> None:
    values = json.loads(latency_file.read_text(encoding="utf-8"))
    latency_file.write_text(json.dumps(values | changed), encoding="utf-8")
    with pytest.raises(DpctlError, match=message):
        chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file))
    with pytest.raises(DpctlError, match=message):
        chain.preview_cut(str(toy_pipeline), by_model(latency_file))


def test_a_file_of_other_groups_and_scores_that_are_none_are_refused(
    toy_pipeline: Path, tmp_path: Path, latency_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def endless(model: Any, recipe: Any, **_: Any) -> Any:
        scored = score(model, recipe)
        return replace(scored, scores={name: [float("inf"), *of[1:]] for name, of in scored.scores.items()})

    with monkeypatch.context() as patched:
        patched.setattr(pruning, "score", endless)
        with pytest.raises(DpctlError, match="importance of a group is not finite"):
            chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file))
    found = read_profile(latency_file)
    samples = tuple(replace(s, widths={f"{name}x": n for name, n in s.widths.items()}) for s in found.samples)
    replace(found, samples=samples).write(latency_file)
    with pytest.raises(DpctlError, match="does not fit the model"):
        chain.prune(str(toy_pipeline), tmp_path / "out", by_model(latency_file))


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_timed(
    toy_pipeline: Path, tmp_path: Path, machine: list[dict[str, int]]
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for out, message in ((tmp_path, "is a directory"), (tmp_path / "file" / "latency.json", "cannot be read or")):
        with pytest.raises(DpctlError, match=message):
            profile(str(toy_pipeline), out, LatencyRecipe(threads=1), force=True)
    assert machine == []


def test_few_networks_that_are_held_out_have_no_rank(toy_pipeline: Path, tmp_path: Path, machine: Any) -> None:
    found = profile(str(toy_pipeline), tmp_path / "latency.json", LatencyRecipe(threads=1), networks=7, held_out=1)
    assert found.json["rank_correlation"] is None
    assert "too few to rank" in found.renderables[-1]


def test_too_few_networks_are_refused_before_any_is_timed(toy_pipeline: Path, tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match="so few networks"):
        profile(str(toy_pipeline), tmp_path / "latency.json", LatencyRecipe(), networks=6)
