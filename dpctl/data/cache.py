"""What is made of a data set once and read many times: arrays on disk, a row for each image or text.

A cache is a folder whose name is the digest of everything that decides what is in it. While it is made it has another
name, and rows are appended; a run that was cut off goes on after the last rows that it noted. Folders may be removed.
"""

import fcntl
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from dpctl import artifact, progress, units
from dpctl.errors import DpctlError
from dpctl.progress import say

# Raise it when the same images, captions and networks come to mean other rows: old caches are not read then.
VERSION = "1"
MAKING, NOTED, LOCK = ".making", "rows.json", "lock"
TODO = "set XDG_CACHE_HOME to a folder on a larger disk, or bring fewer images"
NOTE_EVERY = 16  # batches: then what was appended is on the disk for certain, and noted

Rows = Mapping[str, np.ndarray]
# Opens what makes rows: given their numbers it returns one array for each column, [len(numbers), ...].
Maker = Callable[[], AbstractContextManager[Callable[[range], Rows]]]


@dataclass(frozen=True)
class Setting:
    """A pipeline's directory, and what its components run with: the device, the folder of caches, a progress bar."""

    directory: Path
    device: torch.device
    folder: Path
    bar: progress.Bar = progress.no_bar


def key(**parts: str) -> str:
    """Return the name of the cache that these parts decide."""
    return artifact.digest({**parts, "version": VERSION})[:32]


def rows(
    folder: Path,
    columns: Sequence[str],
    count: int,
    maker: Maker,
    *,
    what: str,
    together: int = 1,
    bar: progress.Bar = progress.no_bar,
    report: Callable[[str], None] = say,
) -> Rows:
    """Return the columns of a cache, [count, ...] each, mapped from the disk; make it where it is not there yet.

    The disk that it needs is reported before it is made, `together` rows at a time. Of several processes one makes it
    and the others wait. Raises a DpctlError where the disk has too little space.
    """
    if not folder.is_dir():
        with artifact.no_space_left_explained(folder, TODO):
            _make(folder, count, maker, what, together, bar, report)
    found = {name: _mapped(folder, name) for name in columns}
    if wrong := [name for name, values in found.items() if len(values) != count]:
        raise _damaged(folder, f"{wrong[0]} has {len(found[wrong[0]])} rows, not {count}")
    return found


def _make(
    folder: Path,
    count: int,
    maker: Maker,
    what: str,
    together: int,
    bar: progress.Bar,
    report: Callable[[str], None],
) -> None:
    making = folder.with_name(folder.name + MAKING)
    with alone(making, what, report):
        if folder.is_dir():  # another process has made it while this one waited
            shutil.rmtree(making, ignore_errors=True)
            return
        with maker() as make, ExitStack() as stack:
            first = {name: values[0] for name, values in make(range(1)).items()}
            done = _noted(making, first, count)
            require_space(making, folder, sum(row.nbytes for row in first.values()) * (count - done), what, report)
            files = {name: stack.enter_context(_appending(making, name, first[name], count, done)) for name in first}
            advance = stack.enter_context(bar(what, count, done=done))
            for number, start in enumerate(range(done, count, together)):
                batch = range(start, min(start + together, count))
                for name, values in make(batch).items():
                    files[name].write(np.ascontiguousarray(values, first[name].dtype).tobytes())
                if number % NOTE_EVERY == NOTE_EVERY - 1 or batch.stop == count:
                    _note(making, files.values(), batch.stop)
                advance(len(batch))
        making.rename(folder)


@contextmanager
def alone(making: Path, what: str, report: Callable[[str], None] = say) -> Iterator[None]:
    """Hold the lock of a cache that is being made; wait for who holds it."""
    making.mkdir(parents=True, exist_ok=True)
    with (making / LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report(f"waiting for another process: {what}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as problem:
            report(f"{making} cannot be locked ({problem.strerror}): let no other process make it meanwhile")
        yield


def _noted(making: Path, first: Rows, count: int) -> int:
    """Return how many rows a run that was cut off has left for certain."""
    with suppress(OSError, ValueError, TypeError, KeyError):
        done = json.loads((making / NOTED).read_bytes())["rows"]
        starts = {name: _header(first[name], count) for name in first}
        paths = {name: making / f"{name}.npy" for name in first}
        for name, path in paths.items():
            with path.open("rb") as stream:
                if stream.read(len(starts[name])) != starts[name]:
                    return 0
            if path.stat().st_size < len(starts[name]) + done * first[name].nbytes:
                return 0
        return done if 0 <= done <= count else 0
    return 0


def _note(making: Path, files: Iterable[BinaryIO], done: int) -> None:
    for file in files:
        file.flush()
        os.fsync(file.fileno())
    written = making / f"{NOTED}.new"
    written.write_text(json.dumps({"rows": done}), encoding="utf-8")
    written.replace(making / NOTED)


def require_space(making: Path, folder: Path, needed: int, what: str, report: Callable[[str], None] = say) -> None:
    """Report the disk that the rest needs, and refuse to begin what cannot end."""
    free = shutil.disk_usage(making).free
    report(f"{what}: {units.bytes_(needed)} in {folder} ({units.bytes_(free)} free)")
    if needed > free:
        got = f"{what} needs {units.bytes_(needed)}, {folder.parent} has {units.bytes_(free)}"
        raise DpctlError("the disk has too little space", got, f"free some, {TODO}")


@contextmanager
def _appending(making: Path, name: str, row: np.ndarray, count: int, done: int) -> Iterator[BinaryIO]:
    """Open a column behind its first `done` rows."""
    path, header = making / f"{name}.npy", _header(row, count)
    with path.open("r+b" if done else "wb") as file:
        if not done:
            file.write(header)
        file.truncate(len(header) + done * row.nbytes)
        file.seek(0, os.SEEK_END)
        yield file


def _header(row: np.ndarray, count: int) -> bytes:
    stream = io.BytesIO()
    described = {"descr": np.lib.format.dtype_to_descr(row.dtype), "fortran_order": False, "shape": (count, *row.shape)}
    np.lib.format.write_array_header_1_0(stream, described)
    return stream.getvalue()


def _mapped(folder: Path, name: str) -> np.ndarray:
    try:
        return np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as problem:
        raise _damaged(folder, f"{name}.npy: {problem}") from None


def _damaged(folder: Path, problem: str) -> DpctlError:
    return DpctlError("the cache is damaged", f"{folder}: {problem}", f"remove it (rm -r {folder}); it is made again")
