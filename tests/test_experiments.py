"""The script behind docs/experiments.md: an arm is made once, whoever asks, and the tables hold what is done."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dpctl.finetune import check
from dpctl.recipe import to_dict
from scripts import experiments as script

ROOT = Path(__file__).resolve().parent.parent
TINY = {"steps": 2, "validation": 8, "batch_size": 8, "validate_every": 2, "mixed_precision": "no"}


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> script.Laboratory:
    """Arms that take seconds: two steps, no scoring, eight pictures of two steps."""
    monkeypatch.setattr(script, "TENTH", dataclasses.replace(script.TENTH, **TINY))
    monkeypatch.setattr(script, "HALF", dataclasses.replace(script.HALF, criterion="magnitude", compensate=False))
    monkeypatch.setattr("scripts.before_finetuning.STEPS", 2)
    monkeypatch.setattr(script.torch, "set_num_threads", lambda count: None)
    return script.Laboratory(8, tmp_path / "results", tmp_path / "work")


def entry(fid: float, **more: Any) -> dict[str, Any]:
    figure = {"low": fid - 0.1, "high": fid + 0.1, "count": 8, "against": "x", "better": "lower"}
    found = {name: figure | {"value": fid, "replicates": [fid, fid + 0.2]} for name in ("fid", "kid", "ssim")}
    return {"samples": 8, "params": 10, "held_out_loss": 0.04, "figures": found} | more


def test_every_arm_is_asked_for_and_is_a_recipe_that_can_be_run() -> None:
    assert {arm for arm, _ in script.ORDER} == {script.UNPRUNED, *script.ARMS}
    assert len(set(script.ORDER)) == len(script.ORDER)
    assert {seed for arm, seed in script.ORDER if arm in script.SEEDED} == {0, 1, 2}
    for arm, seed in script.ORDER[1:]:
        cut, tune = script.ARMS[arm].recipes(seed)
        check(tune)
        assert cut.seed == tune.seed == seed
        assert cut.target_macs == 0.5
        assert tune.steps == script.TRAINED // (5 if arm.endswith("twice") else 10)


@pytest.mark.slow
def test_an_arm_is_made_once_and_goes_on_from_its_checkpoint(
    lab: script.Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    order = [(script.UNPRUNED, 0), ("magnitude", 0), ("magnitude", 1)]
    script.run(lab, order)
    made = [json.loads(lab.path(*key).read_text()) for key in order]
    assert len({each["digest"] for each in made}) == 3
    assert made[0]["held_out_loss"] < made[1]["held_out_loss"]
    assert set(made[1]["figures"]) >= {"fid", "kid", "ssim"}
    assert list(lab.work.glob("magnitude*")) == []  # what is measured is not kept

    monkeypatch.setattr(script, "finetune", lambda *_, **__: pytest.fail("made again"))
    monkeypatch.setattr(script, "prune", lambda *_: pytest.fail("cut again"))
    capsys.readouterr()
    script.run(lab, order)
    assert capsys.readouterr().err.count("done before") == 3

    monkeypatch.setattr(script, "TENTH", dataclasses.replace(script.TENTH, learning_rate=1e-3))
    assert lab.done("magnitude", 0) is None
    resumed: list[bool] = []
    monkeypatch.setattr(script, "finetune", lambda *_, resume: resumed.append(resume) or 1 / 0)
    (lab.work / "magnitude.0.checkpoints").mkdir()
    for arm in order[1:]:
        with pytest.raises(ZeroDivisionError):
            script.run(lab, [arm])
    assert resumed == [True, False]


def test_what_another_process_holds_is_left_to_it(
    lab: script.Laboratory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken: list[tuple[str, int]] = []
    monkeypatch.setattr(lab, "take", lambda *key: taken.append(key))
    with script.held(lab.work / "locks" / "random.0") as ours:
        assert ours
        script.run(lab, [("random", 0), ("taylor", 0)])
    assert taken == [("taylor", 0)]
    assert "random, seed 0: another process has it" in capsys.readouterr().err
    script.run(lab, [("random", 0)])
    assert taken[1:] == [("random", 0)]


def test_the_tables_hold_what_is_done() -> None:
    best = script.BEST
    done = {
        (script.UNPRUNED, 0): entry(2.0),
        ("random", 0): entry(3.0),
        (best, 0): entry(2.5, params=5),
        (best, 1): entry(2.7),
        (f"{best}-twice", 0): entry(2.2),
    }
    lines = [line for line in script.tables(done).splitlines() if line.startswith("| ") and "FID" not in line]

    def row(what: str, part: str, fid: float, last: str) -> str:
        return f"| {what} | {part} | 0.04000 |{f' {fid:g} [{fid - 0.1:.2g}, {fid + 0.1:.2g}] |' * 3} {last} |"

    assert lines == [
        row("(unpruned) | ", "100.0 %", 2, "-0.50 [-0.50, -0.50]"),
        row("`--criterion random` | ", "100.0 %", 3, "+0.50 [+0.50, +0.50]"),
        row(" | ", "50.0 %", 2.5, "-"),
        "| `--criterion random` |  | 3.00 | 3.00 | - | 3.000 | 0.04000 |",
        "|  |  | 2.50, 2.70 | 2.60 | 0.20 | 2.600 | 0.04000 |",
        row(" | ", "50.0 %", 2.5, "1.25 [1.23, 1.25]"),
        row(" | `--steps 800 --validate-every 800`", "100.0 %", 2.2, "1.10 [1.09, 1.10]"),
    ]
    assert script.tables({}) == ""


def test_the_command_prints_the_tables_and_puts_them_on_the_page(
    lab: script.Laboratory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"above\n{script.BEGIN}\n{script.END}\nbelow\n", encoding="utf-8")
    command = ["x", "--results", lab.results, "--work", lab.work, "--samples", "8", "--page", page]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    monkeypatch.setattr(script, "ORDER", [(script.UNPRUNED, 0)])
    assert script.main() == 0
    printed = capsys.readouterr().out
    assert "| (unpruned) |" in printed
    assert page.read_text(encoding="utf-8") == f"above\n{script.BEGIN}\n{printed}{script.END}\nbelow\n"


def test_the_page_has_a_place_for_the_tables() -> None:
    text = (ROOT / "docs" / "experiments.md").read_text(encoding="utf-8")
    assert text.index(script.BEGIN) < text.index(script.END)


def test_results_in_the_docs_are_of_todays_recipes() -> None:
    lab = script.Laboratory(2048, script.RESULTS, script.WORK)
    found = {path.name for path in script.RESULTS.glob("*.json")}
    assert found == {lab.path(*key).name for key in script.ORDER if lab.done(*key) is not None}
    assert to_dict(script.TENTH)["steps"] == 400
