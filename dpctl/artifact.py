"""A model directory and its manifest `dpctl.json`: read, verify, write atomically (stdlib only)."""

import ctypes
import errno
import fcntl
import glob
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from dpctl import environment
from dpctl.errors import DpctlError

MANIFEST = "dpctl.json"
# What a directory that dpctl wrote holds one of: models, benchmarks, samples.
OURS = (MANIFEST, "bench.json", "samples.json")
FORMAT_VERSION = 1
KINDS = ("trained", "pruned", "finetuned", "exported")
FULL = (errno.ENOSPC, errno.EDQUOT)
NO_SPACE = ("No space left", "Disk quota exceeded")
SHORT = re.compile(r"\d+ requested and \d+ written")
REFUSED = (
    errno.EACCES,
    errno.EEXIST,
    errno.EFBIG,
    errno.EIO,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
    errno.ENOTEMPTY,
    errno.EPERM,
    errno.EROFS,
)


@dataclass(frozen=True)
class Manifest:
    """What `dpctl.json` says of its directory; every value is plain JSON."""

    kind: str
    recipe: dict[str, Any]
    stats: dict[str, Any]
    files: dict[str, str]
    parent: str | None = None
    parent_source: str | None = None
    lineage: list[dict[str, Any]] = field(default_factory=list)
    signature: dict[str, Any] | None = None
    parity: dict[str, Any] | None = None
    environment: dict[str, Any] = field(default_factory=dict)
    created: str = ""
    format_version: int = FORMAT_VERSION

    @property
    def digest(self) -> str:
        """The digest of the directory that these files make up."""
        return digest(self.files)

    def to_json(self) -> str:
        """Return the manifest as indented JSON, keys in declared order."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, where: Path) -> "Manifest":
        """Parse and check a manifest; a DpctlError names what is wrong with `where`."""
        todo = "make the directory again with this dpctl, or restore the file from its source"
        try:
            values = json.loads(text)
        except ValueError as problem:
            raise DpctlError("the manifest is not JSON", f"{where}: {problem}", todo) from None
        if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
            found = values.get("format_version") if isinstance(values, dict) else type(values).__name__
            raise DpctlError("unknown manifest format", f"{where}: format_version {found!r}", todo)
        known = {f.name for f in fields(cls)}
        wrong = [name for name in ("recipe", "stats", "files") if not isinstance(values.get(name), dict)]
        wrong += [name for name in ("lineage",) if not isinstance(values.get(name, []), list)]
        wrong += [name for name in ("signature", "parity") if not isinstance(values.get(name), dict | None)]
        wrong += [name for name in ("parent", "parent_source") if not isinstance(values.get(name, ""), str | None)]
        wrong += ["kind"] if values.get("kind") not in KINDS else []
        wrong += [] if "files" in wrong else [name for name in values["files"] if not _inside(name)]
        if wrong or not all(isinstance(sha256, str) for sha256 in values["files"].values()):
            got = f"{where}: {', '.join(wrong) or 'files'}"
            raise DpctlError("entries of the manifest are missing or of the wrong kind", got, todo)
        return cls(**{name: value for name, value in values.items() if name in known})


def _inside(name: str) -> bool:
    """Tell whether a file of a manifest lies in its directory."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts


def digest(files: Mapping[str, str]) -> str:
    """Return the SHA-256 over the sorted (path, sha256) pairs: the identity of a directory."""
    whole = hashlib.sha256()
    for path, sha256 in sorted(files.items()):
        # A file name that is no UTF-8 is still a file name.
        whole.update(f"{path}\0{sha256}\n".encode(errors="surrogateescape"))
    return whole.hexdigest()


def hash_file(path: Path) -> str:
    """Return the SHA-256 of one file, read in pieces."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_files(directory: Path) -> dict[str, str]:
    """Return relative path -> SHA-256 for every file below `directory`, the manifest excluded."""
    paths = sorted(path for path in directory.rglob("*") if path.is_file())
    relative = {path.relative_to(directory).as_posix(): path for path in paths}
    return {name: hash_file(path) for name, path in relative.items() if name != MANIFEST}


def read_manifest(directory: Path) -> Manifest | None:
    """Return the manifest of `directory`, or None where there is none (a plain diffusers directory)."""
    path = directory / MANIFEST
    if not path.is_file():
        return None
    with reading(path):
        return Manifest.from_json(path.read_bytes(), path)


def verify_files(directory: Path, manifest: Manifest) -> None:
    """Raise a DpctlError unless every file of the manifest is there, unchanged. Extra files are ignored."""
    for name, expected in manifest.files.items():
        path = directory / name
        if not path.is_file():
            raise DpctlError("a file of the artifact is missing", str(path), "copy the whole directory again")
        with reading(path):
            found = hash_file(path)
        if found != expected:
            raise DpctlError(
                "a file differs from its digest in the manifest",
                f"{path} (expected sha256 {expected[:16]}...)",
                "the file was changed or damaged after it was written: copy it again or rebuild the artifact",
            )


def write_manifest(directory: Path, **values: Any) -> Manifest:
    """Hash what is in `directory`, add environment and time, write `dpctl.json`, return the manifest."""
    manifest = Manifest(
        files=hash_files(directory),
        environment=environment.describe(),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        **values,
    )
    (directory / MANIFEST).write_text(manifest.to_json(), encoding="utf-8")
    return manifest


def descent(parent: Manifest | None, parent_digest: str, source: str) -> dict[str, Any]:
    """Return the manifest entries that tie an artifact to what it was made from: parent and lineage, oldest first."""
    lineage = list(parent.lineage) if parent is not None else []
    entry = (
        {"kind": parent.kind, "recipe": parent.recipe, "stats": parent.stats}
        if parent is not None
        else {"kind": "foreign"}
    )
    return {
        "parent": parent_digest,
        "parent_source": source,
        "lineage": [*lineage, {"digest": parent_digest, "source": source, **entry}],
    }


@contextmanager
def writing(out: Path, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary sibling directory that becomes `out` when the block ends without an error.

    With `force` an existing `out` is exchanged in one step; without, it is refused before any work.
    A killed process leaves either the old directory or the new one, never a mixture.
    """
    with no_space_left_explained(out):
        target = Path(os.path.realpath(out))
        target.parent.mkdir(parents=True, exist_ok=True)
        _clear_abandoned(target)
        refuse_existing(out, force=force)
        temporary = target.parent / f".{target.name}.writing-{secrets.token_hex(4)}"
        temporary.mkdir()
        claim = _claim(temporary)
    try:
        with no_space_left_explained(out):
            yield temporary
            refuse_existing(out, force=force)
            _ordinary_modes(temporary)
            _flush(temporary)
            _publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(claim)


def _ordinary_modes(directory: Path) -> None:
    """Give files and directories the modes that the umask allows: safetensors writes 0600, copies keep read-only."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (directory, *directory.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def refuse_existing(out: Path, *, force: bool) -> None:
    """Raise a DpctlError if `out` exists and must not be replaced."""
    with no_space_left_explained(out):
        exists = out.exists()
    if not exists:
        return
    if not force:
        raise DpctlError("the output exists", str(out), "choose another --out, or replace it with --force")
    if not out.is_dir():
        raise DpctlError("the output is not a directory", str(out), "choose another --out")
    if out.resolve() in (Path.cwd(), *Path.cwd().parents) or out.is_mount():
        raise DpctlError("the output is where you are, or a whole disk", str(out), "choose a directory of its own")
    if any(out.iterdir()) and not any((out / name).is_file() for name in OURS):
        got = f"{out} holds none of {', '.join(OURS)}"
        raise DpctlError("--force replaces only what dpctl wrote", got, "choose another --out, or remove it yourself")


@contextmanager
def no_space_left_explained(out: Path, otherwise: str = "choose another --out") -> Iterator[None]:
    """Turn the system's refusals to write (disk full, quota, permissions) into a DpctlError.

    `otherwise` is what to do where no space can be freed.
    """
    try:
        yield
    except shutil.Error as problem:  # of a copied tree: a list of (source, target, the system's text)
        if not isinstance(problem.args[0], list):
            raise
        reasons = [str(reason) for *_, reason in problem.args[0]]
        if any(words in reason for reason in reasons for words in NO_SPACE):
            raise _full(out, otherwise) from None
        raise _refused(out, reasons[0]) from None
    except OSError as problem:
        # numpy tells of a full disk without the system's number.
        if problem.errno in FULL or (problem.errno is None and SHORT.fullmatch(str(problem))):
            raise _full(out, otherwise) from None
        if problem.errno in REFUSED:
            where = problem.filename2 or problem.filename or out
            raise _refused(out, f"{where}: {problem.strerror}") from None
        raise
    except Exception as problem:  # safetensors reports a full disk as its own error, with the system's text
        if any(words in str(problem) for words in NO_SPACE):
            raise _full(out, otherwise) from None
        raise


def _refused(out: Path, got: str) -> DpctlError:
    return DpctlError("a file cannot be read or written", got, f"mend it, or choose another --out than {out}")


def _full(out: Path, otherwise: str) -> DpctlError:
    return DpctlError("no space left to write the output", str(out), f"free disk space or {otherwise}")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the system's refusals to read `path` into a DpctlError."""
    try:
        yield
    except OSError as problem:
        got = f"{path}: {problem.strerror}"
        raise DpctlError(
            "a file of the artifact cannot be read", got, "mend its permissions, or copy it again"
        ) from None


def _claim(directory: Path) -> int:
    """Lock a directory for as long as this process lives; return the descriptor that holds the lock.

    A process number would not do: in a container every run is number 1.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    with suppress(OSError):  # a file system without locks: what a killed run leaves there stays
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return descriptor


def _abandoned(directory: Path) -> bool:
    """Tell whether the process that claimed `directory` is gone."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _clear_abandoned(out: Path) -> None:
    """Remove the temporary siblings of killed runs; put `out` back where one died between two renames."""
    pattern = f".{glob.escape(out.name)}.writing-*"
    for path in sorted(out.parent.glob(pattern), key=lambda path: path.suffix != ".old"):
        if not _abandoned(path):
            continue
        if path.suffix == ".old" and not out.exists():
            path.rename(out)
        shutil.rmtree(path, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Have every file on the disk before the directory takes its name: a power cut leaves no empty weights."""
    for path in (*directory.rglob("*"), directory):
        if path.is_symlink():
            continue
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(temporary: Path, out: Path) -> None:
    """Rename onto `out`; exchange the two where `out` exists, since renaming onto a full directory fails."""
    if not out.exists():
        temporary.rename(out)
    elif not _exchange(temporary, out):
        # No RENAME_EXCHANGE on this system or file system: the shortest possible gap instead.
        old = temporary.with_name(temporary.name + ".old")
        out.rename(old)
        temporary.rename(out)
        shutil.rmtree(old, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories atomically (renameat2 with RENAME_EXCHANGE); False where that is not offered."""
    at_fdcwd, rename_exchange = -100, 2
    with suppress(OSError, AttributeError):
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
        return bool(renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0)
    return False
