"""A deep cut in rounds: one pair of artifacts each, on the way to what one cut is asked for."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from dpctl import artifact, chain
from dpctl import finetune as finetuning
from dpctl import prune as pruning
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.recipe import ChainRecipe, FinetuneRecipe, PruneRecipe, read_recipe, to_dict

STAGES = ("rounds/1/pruned", "rounds/1/finetuned", "rounds/2/pruned", "rounds/2/finetuned", "pruned")


def replace(recipe: ChainRecipe, **changed: Any) -> ChainRecipe:
    """Return the recipe with other values; those of an inner recipe are given as a dict."""
    inner = {k: dataclasses.replace(getattr(recipe, k), **v) for k, v in changed.items() if isinstance(v, dict)}
    return dataclasses.replace(recipe, **(changed | inner))


def manifest(directory: Path) -> Manifest:
    found = artifact.read_manifest(directory)
    assert found is not None
    return found


def weights(out: Path) -> list[str]:
    """Return the hash of every stage's weights. (Stock diffusers writes where a model was loaded from into configs.)"""
    return [manifest(out / name).files["unet/diffusion_pytorch_model.safetensors"] for name in STAGES]


def times(out: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in out.rglob("*")}


@pytest.fixture(scope="module")
def recipe(toy_pipeline: Path, toy_images: Path) -> ChainRecipe:
    data = str(toy_images)
    return ChainRecipe(
        model=str(toy_pipeline),
        rounds=3,
        prune=PruneRecipe(target_macs=0.2, data=data, images=4, timesteps=2),
        finetune=FinetuneRecipe(data=data, steps=2, batch_size=2),
        between=FinetuneRecipe(data=data, steps=2, batch_size=2, warmup_steps=0, checkpoint_every=1),
    )


@pytest.fixture(scope="module")
def cut(recipe: ChainRecipe, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("rounds") / "out"
    chain.cut_in_rounds(recipe, out)
    return out


# --- the schedule ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["ratio", "target_macs", "target_params"])
@given(value=st.floats(0.01, 0.99), count=st.integers(2, 6))
def test_every_round_takes_the_same_part_of_what_is_there(target: str, value: float, count: int) -> None:
    found = chain.rounds(ChainRecipe(rounds=count, prune=PruneRecipe(**{target: value})))
    assert len(found) == count
    targets = [getattr(each.prune, target) for each in found]
    assert targets[-1] == value
    left = [1.0, *(1 - t if target == "ratio" else t for t in targets)]
    parts = [after / before for before, after in zip(left, left[1:], strict=False)]
    assert parts == pytest.approx([parts[0]] * count)
    assert parts[0] < 1


def test_no_two_rounds_train_on_the_same_noise_and_the_last_finetune_is_the_chains() -> None:
    recipe = ChainRecipe(rounds=4)
    found = chain.rounds(recipe)
    assert len({each.finetune.seed for each in found}) == 4
    assert found[-1].finetune == recipe.finetune
    assert all(dataclasses.replace(each.finetune, seed=0) == recipe.between for each in found[:-1])


def test_one_round_is_the_recipe_itself() -> None:
    recipe = ChainRecipe()
    assert chain.rounds(recipe) == [chain.Round(recipe.prune, recipe.finetune)]
    assert chain.preview(recipe) == to_dict(recipe)


def test_a_preview_shows_the_recipes_of_every_round() -> None:
    recipe = ChainRecipe(rounds=3)
    found = chain.preview(recipe)
    assert found.pop("schedule") == [
        {"prune": to_dict(r.prune), "finetune": to_dict(r.finetune)} for r in chain.rounds(recipe)
    ]
    assert found == to_dict(recipe)


def test_from_scratch_means_as_many_steps(recipe: ChainRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "_export", lambda *_: None)
    monkeypatch.setattr(chain, "bench_stage", lambda *_: None)
    chain.run(replace(recipe, scratch=True, finetune={"steps": 3}), tmp_path / "out")
    tuned, scratch = (manifest(tmp_path / "out" / name) for name in ("finetuned", "scratch"))
    pruned = manifest(tmp_path / "out" / "pruned")
    assert tuned.parent == scratch.parent == pruned.digest
    assert (tuned.stats["steps"], scratch.stats["steps"]) == (3, 2 + 2 + 3)


def test_the_comparison_gives_rounds_and_one_cut_the_same_target_and_as_many_steps() -> None:
    examples = Path(__file__).parent.parent / "examples"
    many, one = (read_recipe(examples / name, ChainRecipe) for name in ("rounds.toml", "one-cut.toml"))
    assert many.rounds > 1 == one.rounds
    assert sum(each.finetune.steps for each in chain.rounds(many)) == one.finetune.steps
    assert many == replace(one, rounds=many.rounds, between=many.between, finetune={"steps": many.finetune.steps})
    for entry in ("batch_size", "learning_rate", "distillation", "mixed_precision"):
        assert getattr(many.between, entry) == getattr(one.finetune, entry)
    for recipe in (many, one):
        chain.check(recipe)


# --- the artifacts -----------------------------------------------------------------------------------------------


def test_every_round_leaves_its_artifacts_each_made_from_the_one_before(cut: Path, recipe: ChainRecipe) -> None:
    parent = load_model(recipe.model).digest
    for name in STAGES:
        found = manifest(cut / name)
        artifact.verify_files(cut / name, found)
        assert found.parent == parent, name
        parent = found.digest
    assert sorted(path.name for path in (cut / "rounds").iterdir()) == ["1", "2"]
    assert sorted(path.name for path in (cut / "rounds" / "1").iterdir()) == ["finetuned", "pruned"]


def test_every_round_meets_its_target_and_the_last_the_recipes(cut: Path, recipe: ChainRecipe) -> None:
    achieved = [manifest(cut / name).stats["achieved"]["macs"] for name in STAGES if name.endswith("pruned")]
    for found, wanted, before in zip(achieved, (0.2 ** (1 / 3), 0.2 ** (2 / 3), 0.2), (1.0, *achieved), strict=False):
        assert wanted - 0.1 < found <= wanted < before
    stats = manifest(cut / "pruned").stats
    assert stats["requested"] == {"target_macs": 0.2}
    base = load_model(recipe.model).unet
    final = load_model(cut / "pruned").unet
    for name, (before, after) in stats["widths"].items():
        layers = (base.get_submodule(name), final.get_submodule(name))
        assert [getattr(layer, "out_channels", None) or layer.out_features for layer in layers] == [before, after]


def test_the_lineage_names_every_round_and_the_teacher_is_the_unpruned_model(cut: Path, recipe: ChainRecipe) -> None:
    lineage = manifest(cut / "pruned").lineage
    assert [entry["source"] for entry in lineage] == [
        recipe.model,
        *(str((cut / name).resolve()) for name in STAGES[:-1]),
    ]
    assert [entry["kind"] for entry in lineage] == ["foreign", "pruned", "finetuned", "pruned", "finetuned"]
    for name in STAGES:
        teacher = finetuning._teacher(load_model(cut / name), recipe.between)
        assert teacher is not None
        assert teacher.digest == load_model(recipe.model).digest


def test_kept_channels_are_the_base_models(cut: Path, recipe: ChainRecipe) -> None:
    first, second, last = (load_file(cut / name / "unet" / "kept.safetensors") for name in STAGES[::2])
    own = pruning.prune_unet(load_model(cut / "rounds/1/finetuned"), chain.rounds(recipe)[1].prune).kept
    sizes = {
        f"{name}.{side}": tensor.shape[side == "in"]
        for name, tensor in shapes(recipe.model)
        for side in ("in", "out")
        if tensor.ndim > (side == "in")
    }
    assert own
    for key, index in second.items():
        there = first.get(key, torch.arange(sizes[key]))
        assert torch.equal(index, there[own[key]] if key in own else there), key
    for key, index in first.items():
        assert set(last[key].tolist()) <= set(second[key].tolist()) <= set(index.tolist())
    for name, tensor in shapes(str(cut / "pruned")):
        assert tensor.shape[0] == len(last.get(f"{name}.out", range(sizes[f"{name}.out"]))), name


def shapes(model: str) -> Any:
    """Return (module, its weight) of every layer of a model."""
    state = load_model(model).unet.state_dict()
    return [(name.removesuffix(".weight"), tensor) for name, tensor in state.items() if name.endswith(".weight")]


# --- resuming ----------------------------------------------------------------------------------------------------


def test_a_second_run_does_nothing(recipe: ChainRecipe, cut: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = times(cut)
    chain.cut_in_rounds(recipe, cut)
    assert times(cut) == before
    assert capsys.readouterr().err.count("skipped") == len(STAGES)


def test_what_was_killed_in_a_round_goes_on_there(
    recipe: ChainRecipe, cut: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dpctl.finetune import checkpoint

    real, saved = checkpoint.save, list[Path]()

    def save_then_stop(folder: Path, state: checkpoint.Checkpoint, keep: int) -> Path:
        saved.append(real(folder, state, keep))
        if len(saved) == 2:  # one checkpoint a round: this is the second's
            raise KeyboardInterrupt
        return saved[-1]

    monkeypatch.setattr(checkpoint, "save", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        chain.cut_in_rounds(recipe, tmp_path / "out")
    done = times(tmp_path / "out" / "rounds" / "1") | times(tmp_path / "out" / "rounds" / "2" / "pruned")
    assert not (tmp_path / "out" / "rounds" / "2" / "finetuned").exists()
    chain.cut_in_rounds(recipe, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert len(saved) == 2  # it went on after step 1 of 2
    assert weights(tmp_path / "out") == weights(cut)


def test_a_change_redoes_what_it_concerns(recipe: ChainRecipe, cut: Path, tmp_path: Path) -> None:
    shutil.copytree(cut, tmp_path / "out")
    before = times(tmp_path / "out" / "rounds" / "1" / "pruned")
    chain.cut_in_rounds(replace(recipe, between={"steps": 3}), tmp_path / "out")
    assert times(tmp_path / "out" / "rounds" / "1" / "pruned") == before
    same = [one == other for one, other in zip(weights(tmp_path / "out"), weights(cut), strict=True)]
    assert same == [True, False, False, False, False]


def test_one_round_is_one_cut(recipe: ChainRecipe, tmp_path: Path) -> None:
    once = replace(recipe, rounds=1, between={"steps": 99})
    found = chain.cut_in_rounds(once, tmp_path / "out")
    assert found.digest == pruning.prune(recipe.model, tmp_path / "cut", recipe.prune).digest
    assert found.recipe == to_dict(recipe.prune)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["pruned"]


# --- the staircase -----------------------------------------------------------------------------------------------


def widths(directory: Path) -> dict[str, list[int]]:
    return dict(manifest(directory).stats["widths"])


@pytest.mark.parametrize(
    ("align", "ratio", "made"),
    [
        (8, 0.5, {"1", "2", "3"}),
        (16, 0.5, {"2"}),  # 64 channels become 64, 48, 48, 32 and 32 channels 32, 32, 32, 16
        pytest.param(16, 0.7, {"1", "3"}, marks=pytest.mark.slow),  # the third round lands on the last one's widths
        pytest.param(32, 0.6, set(), marks=pytest.mark.slow),
    ],
)
def test_a_ratio_in_rounds_leaves_the_widths_of_one_cut(
    recipe: ChainRecipe, tmp_path: Path, align: int, ratio: float, made: set[str]
) -> None:
    keep = ("time_embedding.*",)  # what is left has 32 or 64 channels
    prune = {"criterion": "magnitude", "target_macs": None, "ratio": ratio, "align": align, "keep": keep}
    chosen = replace(recipe, rounds=4, prune=prune, between={"steps": 1})
    chain.cut_in_rounds(chosen, tmp_path / "out")
    pruning.prune(recipe.model, tmp_path / "cut", chosen.prune)
    assert widths(tmp_path / "out" / "pruned") == widths(tmp_path / "cut")
    assert {path.name for path in (tmp_path / "out" / "rounds").glob("*")} == made


def test_where_a_round_lands_on_the_target_the_last_cut_takes_its_place(
    recipe: ChainRecipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The stock class cannot have 32 channels here: after 64 and 48 come 16, with less than a half of the MACs.
    prune = {"criterion": "magnitude", "target_macs": 0.5, "align": 16, "layout": "stock"}
    chosen = replace(recipe, prune=prune, between={"steps": 1})
    found = chain.cut_in_rounds(chosen, tmp_path / "out")
    told = capsys.readouterr().err
    assert "takes its place" in told
    assert found.stats["achieved"]["macs"] < 0.5
    assert found.recipe == to_dict(chain.rounds(chosen)[-1].prune)
    landed = tmp_path / "out" / "rounds" / "2"
    assert [path.name for path in landed.iterdir()] == ["pruned"]
    assert manifest(landed / "pruned").parent == found.parent == manifest(landed.parent / "1" / "finetuned").digest
    before = times(tmp_path / "out")
    chain.cut_in_rounds(chosen, tmp_path / "out")
    assert times(tmp_path / "out") == before


def test_a_target_out_of_reach_costs_no_round(recipe: ChainRecipe, tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match="cannot be reached"):
        chain.cut_in_rounds(replace(recipe, prune={"target_macs": 0.001}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"target_macs": 0.999}, "meets the target already"),
        ({"target_macs": None, "ratio": 0.01}, "nothing would be pruned"),
    ],
)
def test_where_no_round_would_cut_the_last_says_so(
    recipe: ChainRecipe, cut: Path, tmp_path: Path, prune: dict[str, Any], message: str
) -> None:
    chosen = replace(recipe, model=str(cut / "rounds/1/pruned"), prune={"criterion": "magnitude", **prune})
    with pytest.raises(DpctlError, match=message):
        chain.cut_in_rounds(chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_floor_is_of_the_unpruned_width(recipe: ChainRecipe, tmp_path: Path) -> None:
    prune = {"target_macs": 0.35, "align": 1, "floor": 0.5, "criterion": "magnitude", "scope": "global"}
    chosen = replace(recipe, prune=prune, between={"steps": 1})
    chain.cut_in_rounds(chosen, tmp_path / "out")
    kept = {after / before for before, after in widths(tmp_path / "out" / "pruned").values()}
    assert min(kept) == 0.5
    # Of what is there, a floor of one half allows a quarter in the second round.
    relative = dataclasses.replace(chain.rounds(chosen)[-1].prune, fractions_of="model")
    again = pruning.prune(str(tmp_path / "out" / "rounds" / "1" / "pruned"), tmp_path / "relative", relative)
    assert min(after / before for before, after in again.stats["widths"].values()) < 0.5


def test_the_stock_layout_goes_in_rounds(recipe: ChainRecipe, tmp_path: Path, make_unet: Callable[..., Any]) -> None:
    blocks = {"down_block_types": ("DownBlock2D",) * 2 + ("AttnDownBlock2D",)}
    blocks |= {"up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * 2}
    make_unet(block_out_channels=(16, 64, 128), attention_head_dim=8, **blocks).save_pretrained(tmp_path / "base")
    chosen = replace(recipe, model=str(tmp_path / "base"), prune={"target_macs": 0.3, "layout": "stock"})
    found = chain.cut_in_rounds(chosen, tmp_path / "out")
    assert found.stats["achieved"]["macs"] <= 0.3
    final = load_model(tmp_path / "out" / "pruned").unet
    assert type(final).__name__ == "UNet2DModel"
    taken = [load_model(path).unet.config.block_out_channels for path in (tmp_path / "base", *made(tmp_path / "out"))]
    assert len(taken) == 4
    assert all(after < before for after, before in zip(taken[1:], taken, strict=False))
    pairs = widths(tmp_path / "out" / "pruned")
    assert pairs["down_blocks.1.resnets.0.conv1"] == [64, taken[-1][1]]
    kept = load_file(tmp_path / "out" / "pruned" / "unet" / "kept.safetensors")
    assert len(kept["mid_block.resnets.0.conv1.out"]) == taken[-1][2]
    assert int(kept["mid_block.resnets.0.conv1.out"].max()) >= taken[1][2]  # of the base model's 128 channels


def made(out: Path) -> list[Path]:
    return [out / name for name in STAGES if name.endswith("pruned")]


# --- bad recipes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"rounds": 0}, "rounds are below 1"),
        ({"rounds": -3}, "rounds are below 1"),
        ({"between": {"steps": 0}}, "a count is below 1"),
        ({"between": {"steps": 0}, "rounds": 1}, "a count is below 1"),
        ({"between": {"seed": 2**63 - 2}}, "seed is out of range"),
        ({"between": {"data": "reference"}}, "other data than the last finetune"),
        ({"prune": {"fractions_of": "base"}}, "unknown fractions_of"),
    ],
)
def test_a_mistake_stops_the_chain_before_the_first_round(
    recipe: ChainRecipe, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    for refuse in (chain.preview, lambda wrong: chain.run(wrong, tmp_path / "out")):
        with pytest.raises(DpctlError, match=message):
            refuse(replace(recipe, **changed))
    assert not list(tmp_path.iterdir())
