"""A sweep: every cell of the grid once, one bench of all, and on again where it was."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from dpctl import artifact, chain, environment, sweep
from dpctl.errors import DpctlError
from dpctl.latency.document import Profile
from dpctl.recipe import BenchRecipe, FinetuneRecipe, LatencyRecipe, PruneRecipe, SweepRecipe

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def recipe(toy_pipeline: Path, toy_images: Path) -> SweepRecipe:
    data = str(toy_images)
    bench = {"batch_sizes": (1,), "num_inference_steps": (2,), "rounds": 2, "samples": 4, "threads": 1}
    return SweepRecipe(
        model=str(toy_pipeline),
        criteria=("magnitude", "random"),
        target_macs=(0.6,),
        steps=(0, 2),
        prune=PruneRecipe(data=data),
        finetune=FinetuneRecipe(data=data, batch_size=4),
        bench=BenchRecipe(backends=("eager",), baselines=(), **bench),
    )


@pytest.fixture(scope="module")
def finished(recipe: SweepRecipe, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("sweep") / "out"
    return out, sweep.sweep(recipe, out)


def test_every_cell_is_made_and_measured_in_one_report(recipe: SweepRecipe, finished: tuple[Path, Any]) -> None:
    out, result = finished
    cells = sweep.preview(recipe)["cells"]
    assert cells == [f"{c}/macs-0.6/{n}" for c in ("magnitude", "random") for n in ("pruned", "finetuned-2")]
    assert [str(Path(model.source).relative_to(out)) for model in result.models[1:]] == cells
    assert len({model.digest for model in result.models}) == 5
    for cell in cells:
        manifest = artifact.read_manifest(out / cell)
        assert manifest is not None
        assert manifest.stats["macs"] <= 0.6 * result.models[0].macs
    page = (out / "bench" / "report.md").read_text(encoding="utf-8")
    assert all(f"{name}/macs-0.6" in page for name in ("magnitude", "random"))


def test_a_second_sweep_does_nothing_and_a_longer_one_the_rest(
    recipe: SweepRecipe, finished: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, _ = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    sweep.sweep(recipe, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before

    monkeypatch.setattr(chain, "bench_stage", lambda measured, *_: measured.candidates)
    more = dataclasses.replace(recipe, steps=(0, 2, 3))
    assert len(sweep.sweep(more, out)) == 6
    assert {p.parent.name for p in out.rglob("dpctl.json")} == {"pruned", "finetuned-2", "finetuned-3"}
    assert all(path.stat().st_mtime_ns == before[path] for path in before if path.name == "dpctl.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"criteria": ()}, "different criteria"),
        ({"target_macs": ()}, "different targets"),
        ({"steps": (2, 2)}, "different steps"),
        ({"steps": (-1,)}, "negative number of steps"),
        ({"criteria": ("magnitud",)}, "unknown criterion"),
        ({"target_macs": (1.5,)}, "outside"),
        ({"target_latency": ("fast",)}, "no fraction and no time"),
        ({"target_latency": ("3ms", "0.003 s")}, "different targets"),
        ({"target_macs": (0.5, 0.5000001)}, "different targets\n.*macs-0.5, macs-0.5"),
        ({"target_latency": ("0.5",), "prune": PruneRecipe(latency=LatencyRecipe("0.6"))}, "sweep's target_latency"),
        ({"prune": PruneRecipe(latency=LatencyRecipe(backend="ov"))}, r"nothing would read \[prune.latency\]"),
        ({"prune": PruneRecipe(ratio=0.3)}, r"\[prune\] ratio = 0.3"),
        ({"prune": PruneRecipe("taylor")}, "sweep's criteria"),
        ({"finetune": FinetuneRecipe(steps=7)}, "sweep's steps"),
        ({"finetune": FinetuneRecipe(learning_rate=0.0)}, "learning rate is out of range"),
    ],
)
def test_a_mistake_in_any_cell_stops_the_sweep_before_the_first(
    recipe: SweepRecipe, changed: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(DpctlError, match=message):
        sweep.sweep(dataclasses.replace(recipe, **changed), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_latencies_are_targets_where_the_recipe_says(recipe: SweepRecipe) -> None:
    prune = dataclasses.replace(recipe.prune, latency=LatencyRecipe(backend="ov", batch_size=2))
    asked = dataclasses.replace(recipe, target_latency=("0.5", "3 ms"), prune=prune)
    found = {cut.name: cut.recipe for cut in sweep.cuts(asked)}
    assert set(found) == {f"{c}/{t}" for c in recipe.criteria for t in ("macs-0.6", "latency-0.5", "latency-3ms")}
    wanted = found["random/latency-3ms"].latency
    assert wanted == LatencyRecipe("3 ms", backend="ov", batch_size=2)
    assert found["random/macs-0.6"].latency is None
    assert found["random/latency-3ms"].target_macs is None


def test_a_latency_that_cannot_be_planned_stops_the_sweep_before_the_first_cell(
    recipe: SweepRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a recipe and what is installed it is a mistake; of a file it may be only with this model."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    latencies = (LatencyRecipe(backend="trt"), LatencyRecipe(model=str(tmp_path / "none.json")), _of_another(tmp_path))
    for latency, message in zip(latencies, ("NVIDIA GPU", "no such latency file", "another model"), strict=True):
        prune = dataclasses.replace(recipe.prune, latency=latency)
        with pytest.raises(DpctlError, match=message):
            sweep.sweep(dataclasses.replace(recipe, target_latency=("0.5",), prune=prune), tmp_path / "out")
        assert not (tmp_path / "out").exists()


def _of_another(folder: Path) -> LatencyRecipe:
    """Return the recipe of a latency file of another network."""
    conditions = {"backend": "ort", "precision": "fp32", "batch_size": 1, "rows": 1, "size": [8, 8], "threads": 1}
    Profile("another", conditions, environment.describe(), 0, 0.01).write(folder / "latency.json")
    return LatencyRecipe(model=str(folder / "latency.json"))


def test_targets_out_of_reach_leave_their_cells_out_and_are_told(
    recipe: SweepRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(chain, "bench_stage", lambda measured, *_: measured.candidates)
    few = dataclasses.replace(recipe, criteria=("magnitude",), steps=(0,))
    made = sweep.sweep(dataclasses.replace(few, target_macs=(1e-6, 0.6)), tmp_path / "out")
    assert made == (str(tmp_path / "out" / "magnitude" / "macs-0.6" / "pruned"),)
    assert "magnitude/macs-1e-06 is left out: the target cannot be reached (macs" in capfd.readouterr().err
    with pytest.raises(DpctlError, match="the target cannot be reached"):
        sweep.sweep(dataclasses.replace(few, target_macs=(1e-6,)), tmp_path / "none")


def test_the_command_shows_the_grid_of_a_recipe(dpctl: Any, tmp_path: Path) -> None:
    shown = dpctl("sweep", ROOT / "examples" / "sweep.toml", "--dry-run", "--out", tmp_path / "out")
    assert shown.code == 0, shown.err
    assert '"diff-pruning/macs-0.5/finetuned-200"' in shown.out
    assert not (tmp_path / "out").exists()
