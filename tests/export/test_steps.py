"""`dpctl export MODEL --trt`: a process per step, and what is left whatever becomes of one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from dpctl import artifact, cli_export
from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.recipe import EngineRecipe, ExportRecipe
from export.to_onnx import export_model

pytest.importorskip("tensorrt_rtx")

ROOT = Path(__file__).parents[2]
RECIPE = ExportRecipe(batch=(1, 2, 4), engine=EngineRecipe(flavor="rtx", compute_capability=("8.9",)))
OPTIONS = ("--batch", "1,2,4", "--trt", "--trt-flavor", "rtx", "--compute-capability", "8.9")
# A shell lets what it starts in the background ignore SIGINT, and that is inherited.
HEARING = (
    sys.executable,
    "-c",
    "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from dpctl.cli import main; main()",
)
CHANGING = ("build_s", "size_bytes")  # of an engine, from one build to the next


def model_of(plain: Any) -> str:
    return str(plain.directory)


def facts(directory: Path) -> dict[str, Any]:
    """Return what a manifest says, without what differs between two builds of one engine."""
    found: dict[str, Any] = json.loads((directory / "dpctl.json").read_text())
    for name in ("created", "environment"):
        del found[name]
    (engine,) = found["stats"]["engines"].values()
    for name in CHANGING:
        del engine[name]
    found["files"] = {name: digest for name, digest in found["files"].items() if "engine" not in name}
    return found


def test_the_steps_give_what_one_process_gives(plain: Any, tmp_path: Path) -> None:
    export_model(load_model(model_of(plain)), tmp_path / "one", RECIPE)
    manifest = cli_export.export_in_steps(model_of(plain), tmp_path / "steps", RECIPE)
    assert facts(tmp_path / "steps") == facts(tmp_path / "one")
    artifact.verify_files(tmp_path / "steps", manifest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "steps"]


def test_the_command_itself_imports_neither_torch_nor_a_runtime(plain: Any, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dpctl import cli_export\n"
        "from dpctl.recipe import EngineRecipe, ExportRecipe\n"
        "engine = EngineRecipe(flavor='rtx', compute_capability=('8.9',))\n"
        "assert cli_export.is_unexported(sys.argv[1])\n"
        "cli_export.export_in_steps(sys.argv[1], Path(sys.argv[2]), ExportRecipe(batch=(1, 2, 4), engine=engine))\n"
        "print([name for name in ('torch', 'onnx', 'onnxruntime', 'tensorrt_rtx') if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, model_of(plain), str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout == "[]\n"


def test_what_is_refused_is_told_once_and_leaves_nothing(dpctl: Callable[..., Any], plain: Any, tmp_path: Path) -> None:
    done = dpctl("export", model_of(plain), "--out", tmp_path / "out", *OPTIONS[:-1], "3.0")
    assert (done.code, done.out) == (1, "")
    assert done.err.count("error:") == 1
    assert "Traceback" not in done.err
    assert list(tmp_path.iterdir()) == []


def test_an_existing_output_is_refused_before_anything_runs(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.setattr(cli_export, "run_step", lambda *_, **__: pytest.fail("a step ran"))
    with pytest.raises(DpctlError, match="the output exists"):
        cli_export.export_in_steps(model_of(plain), tmp_path / "out", RECIPE)


@pytest.mark.parametrize("keep", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_gate_that_is_not_met_exits_3(dpctl: Callable[..., Any], plain: Any, tmp_path: Path, keep: bool) -> None:
    model = load_model(model_of(plain))
    with torch.no_grad():
        model.unet.conv_in.weight.mul_(1e7)  # more than half precision holds
    model.unet.save_pretrained(tmp_path / "model" / "unet")
    more = ("--precision", "fp16", *(("--keep-failed",) if keep else ()))
    done = dpctl("export", tmp_path / "model", "--out", tmp_path / "out", *OPTIONS, *more)
    assert done.code == 3, done.err
    assert done.err.count("error:") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == (["model", "out"] if keep else ["model"])
    if keep:
        manifest = artifact.read_manifest(tmp_path / "out")
        assert manifest is not None
        assert manifest.parity is not None
        assert manifest.parity["verdict"] == "failed"
        assert "engines" not in manifest.stats  # nothing is built from what is wrong


def test_an_engine_that_cannot_be_built_leaves_nothing(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_step = cli_export.run_step

    def spoilt(step: str, directory: Path, **asked: Any) -> int:
        if step == "engine":
            (directory / "unet" / "model.fp32.onnx").write_bytes(b"not a graph")
        return run_step(step, directory, **asked)

    monkeypatch.setattr(cli_export, "run_step", spoilt)
    with pytest.raises(typer.Exit) as ended:
        cli_export.export_in_steps(model_of(plain), tmp_path / "out", RECIPE)
    assert ended.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_is_told_nothing_ends_without_a_word() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dpctl.export_step"], cwd=ROOT, input="", capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_interrupted_at_a_terminal_only_the_command_speaks(plain: Any, tmp_path: Path) -> None:
    """A terminal interrupts both processes."""
    with subprocess.Popen(
        [*HEARING, "export", model_of(plain), "--out", str(tmp_path / "out"), *OPTIONS],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        step = step_of(process.pid)
        time.sleep(1)  # the step has begun to import
        os.killpg(process.pid, signal.SIGINT)
        assert process.stderr is not None
        told = process.stderr.read()
    assert process.returncode == 130
    assert "Traceback" not in told
    assert not Path(f"/proc/{step}").exists()
    assert list(tmp_path.iterdir()) == []


def step_of(parent: int) -> int:
    """Wait for the step that a process runs, and return its number."""
    while True:
        children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
        if children and "dpctl.export_step" in Path(f"/proc/{children[0]}/cmdline").read_text():
            return int(children[0])
        time.sleep(0.02)


def test_a_killed_step_is_an_error_with_its_reason(plain: Any, tmp_path: Path) -> None:
    killer = threading.Thread(target=lambda: os.kill(step_of(os.getpid()), signal.SIGKILL))
    killer.start()
    with pytest.raises(DpctlError, match="makes the graph was killed") as caught:
        cli_export.export_in_steps(model_of(plain), tmp_path / "out", RECIPE)
    killer.join()
    assert caught.value.got == "SIGKILL"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_end_it_takes_the_step_along_and_leaves_nothing(
    plain: Any, tmp_path: Path, number: int, code: int
) -> None:
    command = [*HEARING, "export", model_of(plain), "--out", str(tmp_path / "out"), *OPTIONS]
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        step = step_of(process.pid)
        process.send_signal(number)
        assert process.stderr is not None
        told = process.stderr.read()
    assert process.returncode == code
    assert "Traceback" not in told
    assert not Path(f"/proc/{step}").exists()
    assert list(tmp_path.iterdir()) == []
