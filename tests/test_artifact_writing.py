"""Writing a model directory leaves the old one or the new one, never a mixture, and says why where it cannot."""

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from dpctl import artifact
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError, GateError

ROOT = Path(__file__).resolve().parent.parent


def write_small(directory: Path, text: str = "one") -> Manifest:
    (directory / "unet").mkdir()
    (directory / "unet" / "weights").write_text(text)
    (directory / "model_index.json").write_text("{}")
    return artifact.write_manifest(directory, kind="pruned", recipe={"seed": 0}, stats={"params": 1})


def listed(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_writing_appears_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    with artifact.writing(out) as directory:
        write_small(directory)
        assert not out.exists()
    assert listed(out) == ["dpctl.json", "model_index.json", "unet"]
    assert listed(tmp_path / "deep") == ["out"]


def test_the_directory_has_ordinary_permissions(tmp_path: Path) -> None:
    with artifact.writing(tmp_path / "out"):
        pass
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


OLD = ["bench.json", "report.md"]


def old_benchmark(out: Path) -> Path:
    """Make a directory that --force may replace."""
    out.mkdir()
    for name in OLD:
        (out / name).touch()
    return out


@pytest.mark.parametrize("problem", [ValueError("x"), GateError("a", "b", "c"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("force", [False, True])
def test_an_exception_leaves_what_was_there(tmp_path: Path, problem: BaseException, force: bool) -> None:
    out = tmp_path / "out"
    if force:
        old_benchmark(out)
    with pytest.raises(type(problem)), artifact.writing(out, force=force) as directory:
        write_small(directory)
        raise problem
    assert listed(tmp_path) == (["out"] if force else [])
    if force:
        assert listed(out) == OLD


def test_an_output_that_exists_is_refused_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(DpctlError, match="the output exists"), artifact.writing(out):
        pytest.fail("the block ran")
    assert listed(tmp_path) == ["out"]


def test_an_output_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(DpctlError, match="the output exists"), artifact.writing(out):
        out.mkdir()
        (out / "of somebody else").touch()
    assert listed(out) == ["of somebody else"]
    assert listed(tmp_path) == ["out"]


@pytest.mark.parametrize("exchange", [True, False], ids=["renameat2", "two renames"])
def test_force_replaces_the_whole_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(artifact, "_exchange", lambda one, other: False)
    out = old_benchmark(tmp_path / "out")
    with artifact.writing(out, force=True) as directory:
        write_small(directory)
        assert listed(out) == OLD
    assert listed(out) == ["dpctl.json", "model_index.json", "unet"]
    assert listed(tmp_path) == ["out"]


def test_force_replaces_what_a_link_points_to(tmp_path: Path) -> None:
    old_benchmark(tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with artifact.writing(tmp_path / "link", force=True) as directory:
        write_small(directory)
    assert (tmp_path / "link").is_symlink()
    assert listed(tmp_path / "real") == ["dpctl.json", "model_index.json", "unet"]
    assert listed(tmp_path) == ["link", "real"]


def test_force_replaces_no_file(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a letter")
    with pytest.raises(DpctlError, match="not a directory"), artifact.writing(tmp_path / "out", force=True):
        pytest.fail("the block ran")
    assert (tmp_path / "out").read_text() == "a letter"


@pytest.mark.parametrize("out", [".", "..", "/"])
def test_force_replaces_no_directory_that_we_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(DpctlError, match="where you are"), artifact.writing(Path(out), force=True):
        pytest.fail("the block ran")


@pytest.mark.parametrize("out", ["file/out", "x" * 300, "loop/out", "/dev/null/out"])
def test_an_output_that_cannot_be_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(DpctlError), artifact.writing(tmp_path / out):
        pytest.fail("the block ran")
    assert listed(tmp_path) == ["file", "loop"]


# --- no space left -----------------------------------------------------------------------------------------------


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """Yield a directory on a file system of 256 kB."""
    mounted = tmp_path / "small"
    mounted.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mounted)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode != 0:
        pytest.skip(f"a small tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield mounted
    subprocess.run(["umount", str(mounted)], check=True)


def write_by_python(directory: Path) -> None:
    (directory / "big").write_bytes(bytes(1_000_000))


def write_by_safetensors(directory: Path) -> None:
    save_file({"big": np.zeros(250_000, np.float32)}, directory / "big.safetensors")


def write_by_numpy(directory: Path) -> None:
    with (directory / "big.data").open("wb") as stream:
        np.zeros(250_000, np.float32).tofile(stream)


@pytest.mark.parametrize("write", [write_by_python, write_by_safetensors, write_by_numpy])
def test_a_full_disk_is_explained_and_leaves_the_old(full_disk: Path, write: Callable[[Path], None]) -> None:
    out = full_disk / "out"
    with artifact.writing(out) as directory:
        write_small(directory)
    with pytest.raises(DpctlError, match="no space left"), artifact.writing(out, force=True) as directory:
        write(directory)
    assert listed(full_disk) == ["out"]
    manifest = artifact.read_manifest(out)
    assert manifest is not None
    artifact.verify_files(out, manifest)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_the_systems_word_for_no_space_is_explained(tmp_path: Path, code: int) -> None:
    with pytest.raises(DpctlError, match="no space left"), artifact.writing(tmp_path / "out"):
        raise OSError(code, os.strerror(code))
    assert listed(tmp_path) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[Errno 28] No space left on device: 'a'", "no space left"),
        ("[Errno 13] Permission denied: 'a'", "denied: 'a'"),
    ],
)
def test_a_tree_that_cannot_be_copied_is_explained(tmp_path: Path, text: str, words: str) -> None:
    """As shutil.copytree tells it: without the system's number."""
    with pytest.raises(DpctlError, match=words), artifact.writing(tmp_path / "out"):
        raise shutil.Error([("a", "b", text)])
    with pytest.raises(shutil.SameFileError), artifact.writing(tmp_path / "out"):
        raise shutil.SameFileError("our own mistake")
    assert listed(tmp_path) == []


def test_our_own_mistakes_keep_their_traceback(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), artifact.writing(tmp_path / "out") as directory:
        (directory / "missing").read_text()
    assert listed(tmp_path) == []


# --- killed ------------------------------------------------------------------------------------------------------

WRITER = """
import itertools, sys
from pathlib import Path
from dpctl import artifact

out = Path(sys.argv[1])
for n in itertools.count(1):
    with artifact.writing(out, force=True) as directory:
        for name in "abcdefgh":
            (directory / name).write_text(str(n) * 1000)
        artifact.write_manifest(directory, kind="trained", recipe={"n": n}, stats={})
    print(n, flush=True)
"""

SUICIDE = """
import os, signal, sys
from pathlib import Path
from dpctl import artifact

out, moment = Path(sys.argv[1]), sys.argv[2]

def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "before publishing":
    artifact._publish = die
elif moment == "after publishing":
    artifact.shutil.rmtree = die
elif moment == "between two renames":
    artifact._exchange = lambda one, other: False
    rename = Path.rename
    Path.rename = lambda self, target: rename(self, target) if self == out else die()
with artifact.writing(out, force=True) as directory:
    (directory / "new").touch()
    if moment == "while writing":
        die()
"""


def start(program: str, *arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize("seed", range(6))
def test_killed_at_any_moment_it_is_the_old_or_the_new(tmp_path: Path, seed: int) -> None:
    out = tmp_path / "out"
    with start(WRITER, out) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "1\n"
        time.sleep(random.Random(seed).uniform(0.0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        said = [1, *map(int, process.stdout.read().split())]
    manifest = artifact.read_manifest(out)
    assert manifest is not None
    artifact.verify_files(out, manifest)
    assert len(manifest.files) == 8
    assert manifest.recipe["n"] in (said[-1], said[-1] + 1)
    # The next run clears up what the killed one left.
    with artifact.writing(out, force=True) as directory:
        (directory / "x").touch()
    assert listed(tmp_path) == ["out"]
    assert listed(out) == ["x"]


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        ("while writing", OLD),
        ("before publishing", OLD),
        ("after publishing", ["new"]),
        ("between two renames", None),
    ],
)
def test_killed_at_the_worst_moments(tmp_path: Path, moment: str, expected: list[str] | None) -> None:
    out = old_benchmark(tmp_path / "out")
    with start(SUICIDE, out, moment) as process:
        assert process.wait() == -signal.SIGKILL
    if expected is not None:
        assert listed(out) == expected
    # Without RENAME_EXCHANGE there is a gap of one system call: the next run puts the old directory back.
    with pytest.raises(DpctlError, match="the output exists"), artifact.writing(out):
        pytest.fail("the block ran")
    assert listed(tmp_path) == ["out"]
    assert listed(out) == (expected or OLD)


def test_a_run_that_is_alive_is_left_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with artifact.writing(out, force=True) as first:
        (first / "first").touch()
        with artifact.writing(out, force=True) as second:
            (second / "bench.json").touch()
        assert first.is_dir()
    assert listed(out) == ["first"]
    assert listed(tmp_path) == ["out"]


def test_force_replaces_nothing_that_dpctl_did_not_write(tmp_path: Path) -> None:
    out = tmp_path / "photographs"
    out.mkdir()
    (out / "holiday.jpg").touch()
    with pytest.raises(DpctlError, match="only what dpctl wrote"), artifact.writing(out, force=True):
        pytest.fail("the block ran")
    assert listed(out) == ["holiday.jpg"]


@pytest.mark.parametrize("held", [(), *((name, "another") for name in artifact.OURS)])
def test_force_replaces_an_empty_directory_and_our_own(tmp_path: Path, held: tuple[str, ...]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    for name in held:
        (out / name).touch()
    with artifact.writing(out, force=True) as directory:
        write_small(directory)
    assert "another" not in listed(out)
