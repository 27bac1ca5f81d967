"""The chain on a toy: real stages end to end, skipping what is done, redoing what a change concerns."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dpctl import artifact, chain
from dpctl.errors import DpctlError
from dpctl.recipe import BenchRecipe, ChainRecipe, ExportRecipe, FinetuneRecipe, PruneRecipe


@pytest.fixture(scope="module")
def recipe(toy_pipeline: Path, toy_images: Path) -> ChainRecipe:
    data = str(toy_images)
    return ChainRecipe(
        model=str(toy_pipeline),
        prune=PruneRecipe(target_macs=0.6, data=data, images=8, timesteps=4),
        finetune=FinetuneRecipe(data=data, steps=3, batch_size=4),
        export=ExportRecipe(batch=(1, 2, 4)),
        bench=BenchRecipe(batch_sizes=(1,), num_inference_steps=(2,), rounds=2, samples=4, threads=1, baselines=()),
    )


@pytest.fixture(scope="module")
def finished(recipe: ChainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("chain") / "out"
    chain.run(recipe, out)
    return out


def digests(out: Path) -> dict[str, str]:
    found = {}
    for name in ("pruned", "finetuned", "exported"):
        manifest = artifact.read_manifest(out / name)
        assert manifest is not None
        found[name] = manifest.digest
    return found


def test_every_stage_leaves_its_directory_and_names_its_input(finished: Path) -> None:
    manifests = [artifact.read_manifest(finished / name) for name in ("pruned", "finetuned", "exported")]
    for parent, child in zip(manifests, manifests[1:], strict=False):
        assert parent is not None
        assert child is not None
        assert child.parent == parent.digest
    for name in ("bench.json", "report.md", "report.html"):
        assert (finished / "bench" / name).is_file()


def test_a_second_run_does_nothing(recipe: ChainRecipe, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    chain.run(recipe, finished)
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
    assert capsys.readouterr().err.count("skipped") == 4


def test_a_changed_recipe_redoes_what_it_concerns(
    recipe: ChainRecipe, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chain, "bench_stage", lambda *_: None)  # measured above; here the artifacts matter
    before = digests(finished)
    longer = dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, steps=4))
    chain.run(longer, finished)
    after = digests(finished)
    assert after["pruned"] == before["pruned"]
    assert after["finetuned"] != before["finetuned"]
    assert after["exported"] != before["exported"]


def test_a_damaged_stage_is_made_again(recipe: ChainRecipe, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "bench_stage", lambda *_: None)
    chain.run(recipe, finished)
    before = digests(finished)
    weights = finished / "pruned" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    chain.run(recipe, finished)
    # Everything is a function of the recipe, so what is made again is the same.
    assert digests(finished) == before


def test_a_finetune_that_was_stopped_goes_on(
    recipe: ChainRecipe, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpctl.finetune import checkpoint

    monkeypatch.setattr(chain, "bench_stage", lambda *_: None)
    stopped = dataclasses.replace(recipe, finetune=dataclasses.replace(recipe.finetune, checkpoint_every=1))
    saved: list[int] = []
    real = checkpoint.save

    def save_then_stop(folder: Path, state: checkpoint.Checkpoint, keep: int) -> Path:
        path = real(folder, state, keep)
        saved.append(state.step)
        if saved == [1, 2]:
            raise KeyboardInterrupt
        return path

    monkeypatch.setattr(checkpoint, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        chain.run(stopped, tmp_path / "out")
    assert not (tmp_path / "out" / "finetuned").exists()
    saved.clear()
    chain.run(stopped, tmp_path / "out")
    # It went on after step 2 of 3: no checkpoint was written a second time.
    assert saved == []
    assert not checkpoint.folder_for(tmp_path / "out" / "finetuned").exists()


@pytest.mark.parametrize(
    "wrong",
    [
        {"prune": PruneRecipe(ratio=2.0)},
        {"finetune": FinetuneRecipe(steps=0)},
        {"export": ExportRecipe(batch=(4, 2, 1))},
        {"bench": BenchRecipe(scheduler="ddin")},
        {"bench": BenchRecipe(backends=("orr",))},
    ],
)
def test_a_mistake_in_any_stage_stops_the_chain_before_the_first(
    recipe: ChainRecipe, tmp_path: Path, wrong: dict[str, Any]
) -> None:
    with pytest.raises(DpctlError):
        chain.run(dataclasses.replace(recipe, **wrong), tmp_path / "out")
    assert not list(tmp_path.iterdir())
