"""The script behind the tables of docs/pruning.md: it goes on where it was, and the page says what the file holds."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpctl import artifact
from dpctl.errors import DpctlError
from dpctl.models import resolve
from dpctl.prune import prune
from dpctl.recipe import to_dict
from scripts import before_finetuning as script

ROOT = Path(__file__).resolve().parent.parent


def entry(arm: str, done: dict[str, Any], macs: int, fid: float) -> dict[str, Any]:
    recipe = script.recipe_of(arm, done)
    figure = {"value": fid, "low": fid - 1, "high": fid + 1, "count": 8, "against": "x", "better": "lower"}
    return {
        "recipe": to_dict(recipe) if recipe else None,
        "macs": macs,
        "params": macs // 10,
        "denoising_loss": 0.0371,
        "figures": {"fid": figure | {"replicates": []}},
    }


@pytest.fixture(autouse=True)
def _threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave torch's threads alone: the script sets them, and other tests compare bits with other processes."""
    monkeypatch.setattr(script.torch, "set_num_threads", lambda count: None)


@pytest.fixture
def done() -> dict[str, Any]:
    found: dict[str, Any] = {}
    sizes = {"unpruned": 1000, "magnitude-compensated": 499, "stock": 429, "free": 428, "threshold-0.2": 500}
    for position, (arm, macs) in enumerate(sizes.items()):
        found[arm] = entry(arm, found, macs, 2.5 + position)
    return found


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    def call(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["before_finetuning.py", *arguments])
        return script.main()

    return call


def test_the_tables_hold_the_arms_that_are_done_with_their_options_and_shares(done: dict[str, Any]) -> None:
    lines = script.tables(done).splitlines()
    assert [line for line in lines if line.startswith("| ") and "MACs" not in line] == [
        "| unpruned | 1k | 100 | 0.0371 | 2.5 [1.5, 3.5] | - |",
        "| `--criterion magnitude --compensate` | 49.9 % | 49.0 % | 0.0371 | 3.5 [2.5, 4.5] | - |",
        "| `--layout stock` | 42.9 % | 42.0 % | 0.0371 | 4.5 [3.5, 5.5] | - |",
        "| `--target-macs 0.429` | 42.8 % | 42.0 % | 0.0371 | 5.5 [4.5, 6.5] | - |",
        "| `--threshold 0.2` | 50.0 % | 50.0 % | 0.0371 | 6.5 [5.5, 7.5] | - |",
    ]


def test_the_free_layout_gets_no_more_than_the_stock_one_came_to(done: dict[str, Any]) -> None:
    done["stock"]["macs"], done["unpruned"]["macs"] = 42_877, 100_000
    found = script.recipe_of("free", done)
    assert found is not None
    assert found.target_macs == 0.4287
    del done["stock"]
    with pytest.raises(DpctlError, match="no target"):
        script.recipe_of("free", done)


def test_the_page_keeps_what_stands_around_the_tables(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{script.BEGIN}\nold\n{script.END}\nbelow\n", encoding="utf-8")
    script.write_between(page, "new\n")
    assert page.read_text(encoding="utf-8") == f"above\n{script.BEGIN}\nnew\n{script.END}\nbelow\n"
    page.write_text("no place", encoding="utf-8")
    with pytest.raises(DpctlError, match="no place"):
        script.write_between(page, "new\n")


def test_an_arm_is_measured_once_and_is_the_model_of_its_recipe(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "results.json"
    arguments = ("--out", str(out), "--samples", "8", "--only", "magnitude")
    monkeypatch.setattr(script, "STEPS", 2)
    assert run(*arguments) == 0
    first, printed = out.read_bytes(), capsys.readouterr().out
    arms = json.loads(first)["arms"]
    assert list(arms) == ["unpruned", "magnitude"]
    assert set(arms["unpruned"]["figures"]) == {"fid", "kid"}
    assert set(arms["magnitude"]["figures"]) == {"fid", "kid", "psnr", "ssim"}
    recipe = script.recipe_of("magnitude", {})
    assert recipe is not None
    assert not arms["magnitude"]["compensated"]
    assert arms["magnitude"]["digest"] == prune("reference", tmp_path / "slim", recipe).digest

    monkeypatch.setattr(script.Gauge, "take", lambda *_: pytest.fail("measured again"))
    assert run(*arguments) == 0
    assert (out.read_bytes(), capsys.readouterr().out) == (first, printed)

    assert run("--out", str(out), "--samples", "9", "--only", "magnitude") == 1
    assert "another number of samples" in capsys.readouterr().err


def test_an_arm_of_another_recipe_is_measured_again(done: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    done["stock"]["recipe"]["images"] += 1
    taken: list[Any] = []
    monkeypatch.setattr(script.Gauge, "take", lambda _, recipe: taken.append(recipe) or entry("stock", done, 429, 2.5))
    saved: list[list[str]] = []
    script.fill(done, list(done), script.Gauge(8), lambda: saved.append(list(done)))
    assert [recipe.layout for recipe in taken] == ["stock"]
    assert len(saved) == 1


def test_the_page_shows_the_results_that_lie_beside_it() -> None:
    shown = (ROOT / "docs" / "pruning.md").read_text(encoding="utf-8").split(script.BEGIN)[1].split(script.END)[0]
    document = json.loads(script.OUT.read_text(encoding="utf-8"))
    assert shown == f"\n{script.tables(document['arms'])}"
    assert document["arms"]["unpruned"]["digest"] == artifact.digest(artifact.hash_files(resolve("reference")))
