"""One training checkpoint = one safetensors file, written beside and renamed; never a pickle.

The file holds the network, its EMA shadow and the optimizer's moments; step, losses and the recipe are JSON in
the header. Random states need no place: all randomness is a function of (seed, global sample index).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpctl.artifact import no_space_left_explained
from dpctl.errors import DpctlError

KEEP = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state after `step` optimizer steps."""

    step: int
    recipe: dict[str, Any]
    losses: list[float]
    tensors: dict[str, Tensor]
    parent: str | None = None  # the digest of the model that the run began with

    def part(self, prefix: str) -> dict[str, Tensor]:
        """Return the tensors below `prefix.`, without it."""
        return {name[len(prefix) + 1 :]: t for name, t in self.tensors.items() if name.startswith(prefix + ".")}


def folder_for(out: Path) -> Path:
    """Return where the checkpoints of the run that writes `out` live: beside it, as `out` appears at the end."""
    return out.with_name(out.name + ".checkpoints")


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint atomically and drop all but the newest `KEEP`."""
    path = folder / f"step-{checkpoint.step:08d}.safetensors"
    temporary = path.with_suffix(".writing")
    header = {name: getattr(checkpoint, name) for name in ("step", "recipe", "losses", "parent")}
    tensors = {name: tensor.detach().contiguous() for name, tensor in checkpoint.tensors.items()}
    with no_space_left_explained(path):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, temporary, metadata={"dpctl": json.dumps(header)})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
            _remove_if_empty(folder)
        for old in sorted(folder.glob("step-*.safetensors"))[:-KEEP]:
            old.unlink()
    return path


def clear(folder: Path) -> None:
    """Remove the checkpoints in `folder`, and the folder if nothing else is in it."""
    with no_space_left_explained(folder):
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
    return Checkpoint(header["step"], header["recipe"], header["losses"], tensors, header.get("parent"))


def require_same_recipe(saved: dict[str, Any], wanted: dict[str, Any], folder: Path) -> None:
    """Raise a DpctlError that names the first entry in which a checkpoint's recipe differs from the wanted one."""
    for name in sorted(set(saved) | set(wanted)):
        if saved.get(name) != wanted.get(name):
            raise DpctlError(
                "the checkpoint belongs to another recipe",
                f"{name} was {saved.get(name)!r}, now {wanted.get(name)!r} ({folder})",
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
