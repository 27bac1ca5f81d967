"""One training checkpoint = one safetensors file, written beside and renamed; never a pickle.

The file holds the network, its EMA shadow and the optimizer's moments; step, losses and the recipe are JSON in
the header. Random states need no place: all randomness is a function of (seed, global sample index).
"""

import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpctl.artifact import no_space_left_explained
from dpctl.errors import DpctlError
from dpctl.recipe import LoopRecipe, differing, to_dict

KEEP = 2
SHEETS = "samples"  # the folder of the sample sheets, among the checkpoints
HEADER = ("step", "recipe", "losses", "parent", "validated")


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` optimizer steps."""

    step: int
    recipe: dict[str, Any]
    losses: list[float]
    tensors: dict[str, Tensor]
    parent: str | None = None  # the digest of the model that the run began with
    validated: list[dict[str, Any]] = field(default_factory=list)

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors below `prefix.`, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


def folder_for(out: Path) -> Path:
    """Return where the checkpoints of the run that writes `out` live: beside it, as `out` appears at the end."""
    return out.with_name(out.name + ".checkpoints")


def save(folder: Path, checkpoint: Checkpoint, keep: int = KEEP) -> Path:
    """Write a checkpoint atomically and drop all but the newest `keep`."""
    path = folder / f"step-{checkpoint.step:08d}.safetensors"
    temporary = path.with_suffix(".writing")
    header = {name: getattr(checkpoint, name) for name in HEADER}
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    with no_space_left_explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, metadata={"dpctl": json.dumps(header)})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            _remove_if_empty(folder)
        for old in sorted(folder.glob("step-*.safetensors"))[:-keep]:
            old.unlink()
    return path


class Writer:
    """Writes checkpoints in a thread of its own, one after the other, while the training goes on."""

    def __init__(self, folder: Path, keep: int, pool: ThreadPoolExecutor) -> None:
        self._folder, self._keep, self._pool = folder, keep, pool
        self._pending: Future[Path] | None = None

    def save(self, checkpoint: Checkpoint) -> None:
        """Write a checkpoint, whose tensors nobody else changes; raises what the one before it failed with."""
        self.wait()
        self._pending = self._pool.submit(save, self._folder, checkpoint, self._keep)

    def wait(self) -> None:
        """Wait for what is being written; a DpctlError where it could not be."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


@contextmanager
def writing(folder: Path, keep: int) -> Iterator[Writer]:
    """Open the writer of a run's checkpoints; all are on disk at the end."""
    with ThreadPoolExecutor(1, thread_name_prefix="checkpoint") as pool:
        writer = Writer(folder, keep, pool)
        yield writer
        writer.wait()


def clear(folder: Path) -> None:
    """Remove the checkpoints and sample sheets in `folder`, and the folder if nothing else is in it."""
    sheets = folder / SHEETS
    with no_space_left_explained(folder):
        for path in (*sheets.glob("step-*.png"), *sheets.glob("step-*.writing")):
            path.unlink(missing_ok=True)
        _remove_if_empty(sheets)
        for path in (*folder.glob("step-*.safetensors"), *folder.glob("step-*.writing")):
            path.unlink(missing_ok=True)
        _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def newest(folder: Path) -> Checkpoint | None:
    """Load the newest checkpoint that can be read, or None where there is none."""
    paths = sorted(folder.glob("step-*.safetensors"), reverse=True)
    problems = []
    for path in paths:
        try:
            return _load(path)
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as problem:
            problems.append(f"{path.name}: {problem}")
    if paths:
        raise DpctlError(
            "no checkpoint can be read", "; ".join(problems), f"remove {folder} and start again without --resume"
        )
    return None


def _load(path: Path) -> Checkpoint:
    with safe_open(path, framework="pt") as stream:
        header = json.loads((stream.metadata() or {})["dpctl"])
        tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118 (not a dict)
    parent, validated = header.get("parent"), header.get("validated", [])
    return Checkpoint(header["step"], header["recipe"], header["losses"], tensors, parent, validated)


def require_same_recipe(saved: dict[str, Any], wanted: LoopRecipe, folder: Path) -> None:
    """Raise a DpctlError that names the first entry in which a checkpoint's recipe differs from the wanted one."""
    name = differing(saved, wanted)
    if name is not None:
        was, now = (values.get(name) for values in (to_dict(type(wanted)()) | saved, to_dict(wanted)))
        raise DpctlError(
            "the checkpoint belongs to another recipe",
            f"{name} was {was!r}, now {now!r} ({folder})",
            "resume with the same options, or start again with --force",
        )


def require_same_parent(checkpoint: Checkpoint, parent: str, folder: Path) -> None:
    """Raise a DpctlError if a checkpoint's run began with another model than the one of this digest."""
    if checkpoint.parent not in (None, parent):
        raise DpctlError(
            "the checkpoint belongs to another model",
            f"the model was {checkpoint.parent[:12]}, now {parent[:12]} ({folder})",
            "resume with the same model, or start again with --force",
        )
