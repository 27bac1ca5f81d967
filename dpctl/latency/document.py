"""The file of a latency model: what was run, where, and for which network; a model made elsewhere says so."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dpctl import artifact, environment
from dpctl.errors import DpctlError
from dpctl.latency.model import Sample
from dpctl.recipe import LatencyRecipe

FORMAT_VERSION = 2
# What a prediction is of: another of these is another latency.
CONDITIONS = ("backend", "precision", "batch_size", "rows", "size", "threads")
# What makes two machines unlike, of what `environment.describe` says, and what runs the networks of each backend.
MACHINE = ("processor", "gpu")
RUNTIMES = {
    "ort": ("onnxruntime", "onnxruntime-gpu"),
    "ov": ("openvino",),
    "trt": ("tensorrt", "tensorrt-rtx"),
}


@dataclass(frozen=True)
class Profile:
    """A latency file: the conditions, the unpruned network's latency, and the networks that were run.

    `architecture` is the digest of the network's class and config: weights do not matter to the time. `unpruned` is
    that of the network that `baseline_s` is of; None in a file from before that was noted. `held_out` are networks to
    judge the fit by. The machine's speed drifts: all latencies are as if the unpruned network took
    `baseline_s` every time.
    """

    architecture: str
    conditions: Mapping[str, Any]
    environment: Mapping[str, Any]
    seed: int
    baseline_s: float
    samples: tuple[Sample, ...] = ()
    held_out: tuple[Sample, ...] = ()
    unpruned: str | None = None
    format_version: int = FORMAT_VERSION

    @property
    def is_from_here(self) -> bool:
        """Tell whether it was made on a machine like this one: what it predicts can be measured here."""
        return not _differing(self.environment, environment.describe(), MACHINE)

    def elsewhere(self) -> str:
        """Return in words what is not as it was where it was made: the machine, and the version of what runs networks.

        Empty where all is.
        """
        there, here = self.environment, environment.describe()
        libraries = [each.get("libraries", {}) for each in (there, here)]
        runtimes = RUNTIMES.get(self.conditions["backend"], ())
        return "; ".join([*_differing(there, here, MACHINE), *_differing(libraries[0], libraries[1], runtimes)])

    @property
    def digest(self) -> str:
        """The SHA-256 of the file's text."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def _text(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def with_sample(self, sample: Sample, *, held_out: bool) -> "Profile":
        """Return the file with another network that was run."""
        if held_out:
            return replace(self, held_out=(*self.held_out, sample))
        return replace(self, samples=(*self.samples, sample))

    def write(self, path: Path) -> None:
        """Write the file: whole or not at all. Raises a DpctlError where the system refuses."""
        temporary = path.with_name(f".{path.name}.writing")
        with artifact.no_space_left_explained(path):
            try:
                temporary.write_text(self._text(), encoding="utf-8")
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)


def _differing(there: Mapping[str, Any], here: Mapping[str, Any], names: Iterable[str]) -> list[str]:
    pairs = ((name, there.get(name), here.get(name)) for name in names)
    return [f"{name} {one or 'none'}, here {other or 'none'}" for name, one, other in pairs if one != other]


def read_profile(path: Path) -> Profile:
    """Read a latency file, strictly. Raises a DpctlError for anything that is none."""
    todo = "give a file that `dpctl profile` wrote"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DpctlError("no such latency file", str(path), "make one with `dpctl profile`") from None
    except (OSError, ValueError) as problem:
        raise DpctlError("the latency file cannot be read", f"{path}: {problem}", todo) from None
    try:
        if values["format_version"] != FORMAT_VERSION:
            got = f"{path}: version {values['format_version']}, this dpctl reads {FORMAT_VERSION}"
            raise DpctlError("the latency file is of another version", got, "make it again with `dpctl profile`")
        unpruned = values.get("unpruned")
        if not (isinstance(values["architecture"], str) and isinstance(values["seed"], int)):
            raise TypeError("architecture or seed")
        if not isinstance(unpruned, str | None):
            raise TypeError("unpruned")
        samples, held_out = (tuple(_sample(each) for each in values[name]) for name in ("samples", "held_out"))
        conditions, made_on = dict(values["conditions"]), dict(values["environment"])
        described = (values["architecture"], conditions, made_on, values["seed"], _latency(values["baseline_s"]))
        if missing := [name for name in CONDITIONS if name not in conditions]:
            raise ValueError(f"no {missing[0]}")
        return Profile(*described, samples, held_out, unpruned)
    except (KeyError, TypeError, AttributeError, ValueError) as problem:
        raise DpctlError("the latency file is damaged", f"{path}: {problem}", todo) from None


def _sample(values: Mapping[str, Any]) -> Sample:
    widths, layers = values["widths"], values["layers"]
    if not all(type(width) is int and width >= 0 for width in widths.values()):
        raise ValueError("a width that is none")
    if not all(isinstance(took, float) and 0 <= took < math.inf for took in layers.values()):
        raise ValueError("a layer's time that is none")
    return Sample(widths, layers, _latency(values["latency_s"]))


def _latency(value: Any) -> float:
    if not (isinstance(value, float) and 0 < value < math.inf):
        raise ValueError(f"a latency of {value}")
    return value


def require_writable(path: Path) -> None:
    """Raise a DpctlError where a latency file cannot be written, before anything is timed."""
    if path.is_dir():
        raise DpctlError("the output is a directory", str(path), "give a file, such as latency.json")
    with artifact.no_space_left_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f".{path.name}.writing")
        try:
            probe.touch()
        finally:
            probe.unlink(missing_ok=True)


def architecture_of(unet: Any) -> str:
    """Return the digest of a network's class and config, without what diffusers notes of files and versions in it."""
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    told = json.dumps([type(unet).__name__, config], sort_keys=True, default=str)
    return hashlib.sha256(told.encode()).hexdigest()


def require_fitting(profile: Profile, architecture: str, unpruned: str, wanted: Mapping[str, Any], path: Path) -> None:
    """Raise a DpctlError that names what of a latency file is not what is wanted: a network of it or a condition.

    `unpruned` is the architecture that `architecture` was cut from, or the same.
    """
    pairs = {"": (profile.architecture, architecture), "unpruned ": (profile.unpruned or unpruned, unpruned)}
    for which, (one, other) in pairs.items():
        if one != other:
            got = f"{path}: of the {which}architecture {one[:12]}, and this is {other[:12]}"
            raise DpctlError("the latency file is of another model", got, "make one of this model with `dpctl profile`")
    for name in CONDITIONS:
        if profile.conditions.get(name) != wanted[name]:
            got = f"{path}: {name.replace('_', ' ')} {profile.conditions.get(name)}, asked for {wanted[name]}"
            todo = "ask for what it was made for, or make another with `dpctl profile`"
            raise DpctlError("the latency file is of another measurement", got, todo)


def conditions(recipe: LatencyRecipe, rows: int, size: Sequence[int], threads: int) -> dict[str, Any]:
    """Return what a latency of the network depends on, beside the network and the machine."""
    return {
        "backend": recipe.backend,
        "precision": recipe.precision,
        "batch_size": recipe.batch_size,
        "rows": rows,
        "size": list(size),
        "threads": threads,
    }
