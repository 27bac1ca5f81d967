"""The command line: stdout is the result, the exit code says how it ended. Refusals are in test_cli_refusals.py."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toys import Done

from dpctl import artifact, cli
from dpctl.errors import DpctlError, GateError
from dpctl.recipe import ChainRecipe, FinetuneRecipe, PruneRecipe, TrainRecipe, to_dict

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = (
    "prune",
    "finetune",
    "train",
    "export",
    "refit",
    "verify",
    "bench",
    "compare",
    "run",
    "sample",
    "inspect",
    "doctor",
)


def in_a_process(*arguments: object, cwd: Path) -> Done:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "dpctl", *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    return Done(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def prune_toy(dpctl: Callable[..., Done], toy_pipeline: Path) -> Callable[..., Done]:
    """Return `dpctl prune` on the toy pipeline."""

    def run(out: Path, *more: object) -> Done:
        return dpctl("prune", toy_pipeline, "--out", out, "--criterion", "magnitude", "--target-macs", "0.6", *more)

    return run


def manifest_of(directory: Path) -> artifact.Manifest:
    manifest = artifact.read_manifest(directory)
    assert manifest is not None
    artifact.verify_files(directory, manifest)
    return manifest


# --- what is printed ---------------------------------------------------------------------------------------------


def test_prune_prints_what_was_asked_and_what_was_achieved(tmp_path: Path, prune_toy: Callable[..., Done]) -> None:
    done = prune_toy(tmp_path / "out")
    assert done.code == 0
    stats = manifest_of(tmp_path / "out").stats
    for text in ("target macs 0.6", f"macs {stats['achieved']['macs']:.4f}", "params", "widths per block", "->"):
        assert text in done.out
    assert stats["achieved"]["macs"] <= 0.6


def test_json_is_one_document_on_stdout(
    tmp_path: Path, dpctl: Callable[..., Done], prune_toy: Callable[..., Done], toy_images: Path
) -> None:
    small = ("--data", toy_images, "--steps", 1, "--batch-size", 2, "--json")
    pruned = prune_toy(tmp_path / "pruned", "--json")
    tuned = dpctl("finetune", tmp_path / "pruned", "--out", tmp_path / "tuned", *small)
    trained = dpctl("train", "--config", tmp_path / "pruned", "--out", tmp_path / "trained", *small)
    inspected = dpctl("inspect", tmp_path / "tuned", "--json")
    for done, name in ((pruned, "pruned"), (tuned, "tuned"), (trained, "trained"), (inspected, "tuned")):
        assert done.code == 0, done.err
        document = json.loads(done.out)
        assert document["digest"] == manifest_of(tmp_path / name).digest
        assert document["directory"] == str(tmp_path / name)
    assert inspected.out == tuned.out
    assert "finetune 1/1" in tuned.err
    assert json.loads(trained.out)["kind"] == "trained"


def test_compensation_is_switched_on_and_off(
    tmp_path: Path, dpctl: Callable[..., Done], prune_toy: Callable[..., Done], toy_images: Path
) -> None:
    data = ("--data", toy_images, "--batch-size", 1)
    for name, more, expected in (
        ("without", (), False),
        ("with", data, True),
        ("asked", (*data, "--compensate"), True),
        ("off", (*data, "--no-compensate"), False),
    ):
        done = prune_toy(tmp_path / name, *more)
        assert done.code == 0, done.err
        assert ("compensation" in manifest_of(tmp_path / name).stats) == expected
        assert ("compensated" in done.out, "compensate 51/51" in done.err) == (expected, expected)
    plan = prune_toy(tmp_path / "plan", *data, "--dry-run")
    assert (plan.code, "compensation" in json.loads(plan.out)["plan"]) == (0, False)
    assert "compensate" not in plan.err


def test_compensation_of_a_model_that_images_cannot_feed_is_refused(
    tmp_path: Path, dpctl: Callable[..., Done], make_unet: Callable[..., Any]
) -> None:
    make_unet(out_channels=2).save_pretrained(tmp_path / "unet")
    prune = ("prune", tmp_path / "unet", "--out", tmp_path / "out", "--criterion", "magnitude", "--ratio", "0.5")
    done = dpctl(*prune, "--compensate")
    assert (done.code, done.out) == (1, "")
    assert "cut of this model cannot be compensated" in done.err
    assert "2 output channels" in done.err
    assert "--no-compensate" in done.err
    assert not (tmp_path / "out").exists()
    assert dpctl(*prune).code == 0


def test_inspect_scans_and_draws(
    tmp_path: Path, dpctl: Callable[..., Done], prune_toy: Callable[..., Done], toy_pipeline: Path, toy_images: Path
) -> None:
    prune_toy(tmp_path / "slim")
    assert dpctl("inspect", tmp_path / "slim", "--picture", tmp_path / "widths.svg").code == 0
    assert "before" in (tmp_path / "widths.svg").read_text()
    scanning = ("inspect", toy_pipeline, "--sensitivity", "--data", toy_images)
    done = dpctl(*scanning, "--picture", tmp_path / "scan.svg", "--json")
    assert done.code == 0, done.err
    rows = json.loads(done.out)["stats"]["sensitivity"]["rows"]
    assert {row["group"] for row in rows} == set(manifest_of(tmp_path / "slim").stats["widths"])
    assert "rise of the loss" in (tmp_path / "scan.svg").read_text()
    # A mistake in the name costs no scan.
    refused = dpctl(*scanning, "--picture", tmp_path / "scan.svg")
    assert (refused.code, refused.out) == (1, "")
    assert "sensitivity" not in refused.err


def test_doctor_says_what_there_is(dpctl: Callable[..., Done]) -> None:
    done = dpctl("doctor", "--json")
    assert done.code == 0
    assert isinstance(json.loads(done.out), list | dict)
    assert "torch" in dpctl("doctor").out


def test_a_real_process_prints_json_alone_and_no_traceback(tmp_path: Path, toy_pipeline: Path) -> None:
    options = ("--out", "out", "--criterion", "random", "--ratio", "0.3", "--json")
    done = in_a_process("prune", toy_pipeline, *options, cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["digest"] == manifest_of(tmp_path / "out").digest
    assert "Traceback" not in done.err


def test_a_real_process_ends_with_the_errors_code(tmp_path: Path) -> None:
    done = in_a_process("run", "missing.toml", cwd=tmp_path)
    assert done == Done(1, "", "error: no such recipe\n  got: missing.toml\n  do:  give the path of a TOML file\n")


def test_a_name_that_looks_like_markup_is_printed_as_it_is(tmp_path: Path, prune_toy: Callable[..., Done]) -> None:
    assert "[bold]out[1]" in prune_toy(tmp_path / "[bold]out[1]").out


# --- the dry run -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "recipe"),
    [
        (
            ("prune", "missing", "--out", "out", "--ratio", "0.3", "--criterion", "taylor", "--seed", "7"),
            PruneRecipe("taylor", ratio=0.3, seed=7),
        ),
        (
            ("prune", "missing", "--out", "out", "--ratio", "0.3", "--heads", "--norm-groups"),
            PruneRecipe(ratio=0.3, heads=True, norm_groups=True),
        ),
        (
            ("finetune", "missing", "--out", "out", "--steps", "5", "--distillation", "0", "--from-scratch"),
            FinetuneRecipe(steps=5, distillation=0.0, from_scratch=True),
        ),
        (
            ("finetune", "missing", "--out", "out", "--teacher", "t", "--ema-decay", "0.5", "--data", "d"),
            FinetuneRecipe(teacher="t", ema_decay=0.5, data="d"),
        ),
        (
            ("train", "--out", "out", "--learning-rate", "0.1", "--batch-size", "3", "--mixed-precision", "bf16"),
            TrainRecipe(learning_rate=0.1, batch_size=3, mixed_precision="bf16"),
        ),
        (
            ("train", "--out", "out", "--config", "c", "--checkpoint-every", "9", "--seed", "4"),
            TrainRecipe(config="c", checkpoint_every=9, seed=4),
        ),
        (("run",), ChainRecipe()),
        (("run", "r.toml"), ChainRecipe(prune=PruneRecipe(ratio=0.25, align=16))),
    ],
)
def test_a_dry_run_prints_the_recipe_and_touches_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dpctl: Callable[..., Done], arguments: Any, recipe: Any
) -> None:
    (tmp_path / "r.toml").write_text("[prune]\nratio = 0.25\n")
    monkeypatch.chdir(tmp_path)
    done = dpctl(*arguments, "--dry-run")
    assert done.code == 0
    assert json.loads(done.out) == to_dict(recipe)
    assert done.err == ""
    assert [path.name for path in tmp_path.iterdir()] == ["r.toml"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("prune", "m", "--out", "o", "--ratio", "2"),
        ("prune", "m", "--out", "o"),
        ("finetune", "m", "--out", "o", "--steps", "0"),
        ("train", "--out", "o", "--mixed-precision", "fp12"),
        ("run", "bad.toml"),
    ],
)
def test_a_dry_run_refuses_what_the_run_would_refuse(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dpctl: Callable[..., Done], arguments: Any
) -> None:
    (tmp_path / "bad.toml").write_text('[bench]\nscheduler = "ddin"\n')
    monkeypatch.chdir(tmp_path)
    done = dpctl(*arguments, "--dry-run")
    assert (done.code, done.out) == (1, "")
    assert done.err.count("\n") >= 3


def test_the_options_defaults_are_the_recipes(dpctl: Callable[..., Done]) -> None:
    pruned = dpctl("prune", "m", "--out", "o", "--ratio", "0.5", "--dry-run")
    assert json.loads(pruned.out) == to_dict(PruneRecipe(ratio=0.5))
    assert json.loads(dpctl("finetune", "m", "--out", "o", "--dry-run").out) == to_dict(FinetuneRecipe())
    assert json.loads(dpctl("train", "--out", "o", "--dry-run").out) == to_dict(TrainRecipe())


# --- exit codes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "code"), [(DpctlError("what", "got this", "do that"), 1), (GateError("what", "got this", "do that"), 3)]
)
def test_an_error_ends_with_its_code_and_three_parts(
    monkeypatch: pytest.MonkeyPatch, dpctl: Callable[..., Done], problem: DpctlError, code: int
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr("dpctl.finetune.train", fail)
    assert dpctl("train", "--out", "o") == Done(code, "", "error: what\n  got: got this\n  do:  do that\n")


def test_our_own_mistakes_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("dpctl.finetune.train", fail)
    monkeypatch.setattr(sys, "argv", ["dpctl", "train", "--out", "o"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_an_interrupt_is_no_traceback(monkeypatch: pytest.MonkeyPatch, dpctl: Callable[..., Done]) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dpctl.finetune.train", stop)
    done = dpctl("train", "--out", "o")
    assert done.code not in (0, 1, 2, 3)
    assert done.out == ""
    assert "Traceback" not in done.err


STOPPED = """
import os, signal, sys, time
import dpctl.finetune
from dpctl import artifact, cli

def train(out, *_, **__):
    with artifact.writing(out) as directory:
        (directory / "half").touch()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

dpctl.finetune.train = train
sys.argv = ["dpctl", "train", "--out", "out"]
cli.main()
"""


def test_a_run_that_is_asked_to_end_leaves_nothing_half_written(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STOPPED]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (128 + signal.SIGTERM, "", "")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("cut",),
        ("prune",),
        ("prune", "reference"),
        ("prune", "--out", "o"),
        ("prune", "reference", "--out", "o", "--ratio", "half"),
        ("prune", "reference", "--out", "o", "--shape", "round"),
        ("prune", "reference", "more", "--out", "o"),
        ("finetune", "reference", "--out", "o", "--steps", "1.5"),
        ("finetune", "reference", "--out"),
        ("train",),
        ("train", "--out", "o", "--seed", "x"),
        ("train", "--out", "o", "--resume=yes"),
        ("export", "reference", "--out", "o", "--batch", "1,2"),
        ("export", "reference", "--out", "o", "--batch", "1,two,3"),
        ("export", "reference", "--out", "o", "--batch", "0,1,2"),
        ("bench", "reference", "m", "--out", "o", "--batch-size", ""),
        ("bench", "reference", "m", "--out", "o", "--num-inference-steps", "ten"),
        ("run", "--out"),
        ("inspect",),
    ],
    ids=" ".join,
)
def test_a_mistake_of_usage_ends_with_2(dpctl: Callable[..., Done], arguments: tuple[str, ...]) -> None:
    done = dpctl(*arguments)
    assert done.code == 2
    assert "Usage: dpctl" in done.out + done.err or "Error" in done.err
    assert "Traceback" not in done.err


# --- help --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)], ids=" ".join)
def test_help_is_help(dpctl: Callable[..., Done], command: tuple[str, ...]) -> None:
    done = dpctl(*command, "--help")
    assert (done.code, done.err) == (0, "")
    assert f"Usage: {' '.join(('dpctl', *command))}" in done.out


def test_the_documented_help_is_what_the_commands_say() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "golden_help.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
