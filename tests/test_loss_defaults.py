"""The script behind the table of docs/losses.md: it goes on where it was, and every arm is what its recipe says."""

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpctl.errors import DpctlError
from dpctl.finetune import check
from dpctl.recipe import PruneRecipe, to_dict
from scripts import loss_defaults as script

ROOT = Path(__file__).resolve().parent.parent


def entry(arm: str, seed: int, loss: float, cut: str = "c" * 64) -> dict[str, Any]:
    recipe = script.recipe_of(arm, seed)
    figure = {"value": 2.5 + seed, "low": 2.0, "high": 4.0, "count": 8, "against": "x", "better": "lower"}
    return {
        "recipe": to_dict(recipe) if recipe else None,
        "cut": cut,
        "held_out_loss": loss,
        "figures": {"fid": figure | {"replicates": []}},
    }


@pytest.fixture
def done() -> dict[str, Any]:
    arms = [("unpruned", 0), ("features-0.1", 0), ("features-0.1", 1), ("importance", 1)]
    return {script.key_of(arm, seed): entry(arm, seed, 0.0371 + seed) for arm, seed in arms}


@pytest.mark.parametrize("arm", script.ARMS)
def test_every_arm_is_a_recipe_that_can_be_run(arm: str) -> None:
    recipe = script.recipe_of(arm, 2)
    assert recipe is not None
    check(recipe)
    assert recipe.seed == 2
    changed = {name for name, value in to_dict(recipe).items() if value != to_dict(script.BASE).get(name)}
    assert changed == {*script.ARMS[arm], "seed"}


def test_the_table_holds_the_arms_that_are_done_with_all_their_seeds(done: dict[str, Any]) -> None:
    text = script.table(done, 2)
    assert [line for line in text.splitlines() if line.startswith("| ") and "FID" not in line] == [
        "| unpruned | 0.03710 | 2.5 [2, 4] | - |",
        "| `--feature-distillation 0.1` | 0.03710, 1.03710 | 2.5 [2, 4], 3.5 [2, 4] | - |",
        "| `--timestep-sampling importance` | 1.03710 | 3.5 [2, 4] | - |",
    ]
    assert "dpctl finetune CUT --out DIR --steps 200 --mixed-precision bf16 --validation 256" in text
    assert "importance" not in script.table(done, 1)
    assert script.table({}, 1) == ""


def test_the_page_has_a_place_for_the_table() -> None:
    text = (ROOT / "docs" / "losses.md").read_text(encoding="utf-8")
    assert text.index(script.BEGIN) < text.index(script.END)


def test_results_of_another_cut_are_not_mixed(done: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[Any] = []
    monkeypatch.setattr(script.Bench, "take", lambda _, arm, seed: entry(arm, seed, 0.1, cut="d" * 64))
    with pytest.raises(DpctlError, match="the cut network is not the one"):
        script.fill(done, [("min-snr-5", 0)], script.Bench(8, Path()), lambda: saved.append(dict(done)))
    assert "min-snr-5/0" not in done
    assert not saved


def test_an_arm_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    page = tmp_path / "page.md"
    page.write_text(f"above\n{script.BEGIN}\n{script.END}\nbelow\n", encoding="utf-8")
    short = {"steps": 2, "validation": 8, "batch_size": 8, "validate_every": 2}
    monkeypatch.setattr(script, "BASE", dataclasses.replace(script.BASE, **short))
    monkeypatch.setattr(script, "CUT", PruneRecipe("magnitude", target_macs=0.5, align=16, compensate=False))
    monkeypatch.setattr(script.torch, "set_num_threads", lambda count: None)
    monkeypatch.setattr("scripts.before_finetuning.STEPS", 2)

    def run(*arguments: str) -> int:
        command = ["loss_defaults.py", "--out", str(out), "--samples", "8", "--page", str(page), *arguments]
        monkeypatch.setattr(sys, "argv", command)
        return script.main()

    assert run("--only", "features-0.1") == 0
    first, printed = out.read_bytes(), capsys.readouterr().out
    arms = json.loads(first)["arms"]
    assert list(arms) == ["unpruned/0", "not finetuned/0", "features-0.1/0"]
    assert len({each["digest"] for each in arms.values()}) == 3
    assert len({each["cut"] for each in arms.values()}) == 1
    assert arms["unpruned/0"]["held_out_loss"] < arms["not finetuned/0"]["held_out_loss"]
    assert len(arms["features-0.1/0"]["held_out_buckets"]) == 8
    assert page.read_text(encoding="utf-8") == f"above\n{script.BEGIN}\n{printed}{script.END}\nbelow\n"

    measured: Callable[..., Any] = lambda *_: pytest.fail("measured again")  # noqa: E731
    monkeypatch.setattr(script.Bench, "take", measured)
    assert run("--only", "features-0.1") == 0
    assert (out.read_bytes(), capsys.readouterr().out) == (first, printed)
