"""An engine's manifest: what it was built from, by and for; read and checked before any byte of the engine is loaded.

It lies beside the engine, as `<engine>.json`. Nothing here needs TensorRT or a GPU.
"""

import json
import re
import shlex
import types
import typing
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dpctl import artifact
from dpctl.errors import DpctlError
from dpctl.recipe import EngineRecipe, from_dict, to_dict
from dpctl.signature import Signature

FORMAT_VERSION = 1
NAMES = {"tensorrt": "TensorRT", "rtx": "TensorRT-RTX"}
# Of a target: this compute capability and every later one.
LATER = "+"
# A compute capability, and a file beside the engine.
TARGET, FILE = re.compile(r"[0-9]{1,3}\.[0-9]{1,3}\+?"), re.compile(r"\w[\w.+-]*")
# Options that are not called like the entry of the recipe.
OPTIONS = {"flavor": "trt-flavor", "workspace_gib": "workspace"}


@dataclass(frozen=True)
class EngineManifest:
    """What `<engine>.json` says; every value is plain JSON.

    `targets` are compute capabilities, "8.9", or "8.0+" for that and every later one; `gpu` is the one model that the
    engine is for, where it is no more portable than that. `onnx` names the files of the graph with their digests,
    `profile` the smallest, best and largest shape of every input.
    """

    flavor: str
    version: str
    targets: list[str]
    gpu: str | None
    precision: str
    profile: dict[str, list[list[int]]]
    weights_bytes: int | None
    activation_bytes: int | None
    build_s: float
    sha256: str
    size_bytes: int
    onnx: dict[str, str]
    recipe: dict[str, Any]
    built_on: dict[str, Any]
    format_version: int = FORMAT_VERSION

    @property
    def engine_recipe(self) -> EngineRecipe:
        """What was asked of the builder."""
        return from_dict(EngineRecipe, self.recipe, "the engine's manifest")

    def to_json(self) -> str:
        """Return the manifest as indented JSON, keys in declared order."""
        return json.dumps(asdict(self), indent=2) + "\n"


def sidecar(engine: Path) -> Path:
    """Return where the manifest of an engine lies."""
    return engine.with_name(f"{engine.name}.json")


def layers(engine: Path) -> Path:
    """Return where the layers of an engine are written down."""
    return engine.with_name(f"{engine.name}.layers.json")


def name(precision: str, flavor: str, targets: Sequence[str]) -> str:
    """Return the file name of an engine: ``model.fp32.rtx-sm89+sm120.engine``, ``model.fp16.rtx-sm80up.engine``."""
    target = "+".join(f"sm{target.replace('.', '').replace(LATER, 'up')}" for target in targets)
    return f"model.{precision}.{flavor}-{target}.engine"


def _named(engine: Path) -> EngineRecipe:
    """Return what the name of an engine says of its recipe; of another name, the default."""
    found = re.fullmatch(r"model\.(\w+)\.(\w+)-(.+)\.engine", engine.name)
    if found is None or found[2] not in NAMES:
        return EngineRecipe()
    precision, flavor, targets = found.groups()
    listed = re.findall(r"sm(\d+)(\d)(?=\+|$)", targets) if flavor == "rtx" else []
    return EngineRecipe(
        flavor=flavor,
        compute_capability=tuple(f"{major}.{minor}" for major, minor in listed),
        hardware_compatible=flavor == "tensorrt" and targets.endswith("up"),
        tf32=precision == "tf32",
    )


def graph_digests(graph: Path) -> dict[str, str]:
    """Return the files of an ONNX graph, weights beside it included, with their SHA-256."""
    parts = [graph, graph.with_name(f"{graph.name}.data")]
    return {part.name: artifact.hash_file(part) for part in parts if part.is_file()}


def read(engine: Path) -> EngineManifest:
    """Return the manifest of an engine; a DpctlError where it is missing or damaged."""
    path, todo = sidecar(engine), f"build the engine again: {rebuild(engine, _named(engine))}"
    if not path.is_file():
        raise DpctlError("the engine has no manifest, so nothing says what it is", str(path), todo)
    with artifact.reading(path):
        text = path.read_bytes()
    try:
        values = json.loads(text)
        manifest = EngineManifest(**values)
        _check_values(manifest)
    except (DpctlError, TypeError, ValueError) as problem:
        got = f"{path}: {problem.got if isinstance(problem, DpctlError) else problem}"
        raise DpctlError("the engine's manifest cannot be read", got, todo) from None
    return manifest


def _check_values(manifest: EngineManifest) -> None:
    """Raise a ValueError or a DpctlError for a manifest of values that are none."""
    for entry, hint in typing.get_type_hints(EngineManifest).items():
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        kinds = tuple(typing.get_origin(option) or option for option in options)
        if not isinstance(getattr(manifest, entry), kinds):
            raise ValueError(f"{entry} is {getattr(manifest, entry)!r}")
    if manifest.format_version != FORMAT_VERSION or manifest.flavor not in NAMES:
        raise ValueError(f"format_version {manifest.format_version}, flavor {manifest.flavor}")
    if any(not isinstance(sha256, str) or not FILE.fullmatch(part) for part, sha256 in manifest.onnx.items()):
        raise ValueError(f"onnx is {manifest.onnx}")
    if not any(part.endswith(".onnx") for part in manifest.onnx):
        raise ValueError("onnx names no graph")
    if not manifest.targets or not all(isinstance(t, str) and TARGET.fullmatch(t) for t in manifest.targets):
        raise ValueError(f"targets are {manifest.targets}")
    if manifest.engine_recipe.flavor not in (manifest.flavor, "auto"):
        raise ValueError(f"flavor {manifest.flavor}, and {manifest.engine_recipe.flavor} in the recipe")


def check(engine: Path, manifest: EngineManifest, *, version: str, capability: str, gpu: str) -> None:
    """Raise a DpctlError unless this is the engine of the manifest and of its graph, for this library and GPU.

    `version` is the installed library's, `capability` and `gpu` are the GPU's compute capability and name.
    """
    check_version(engine, manifest, version)
    check_target(engine, manifest, capability, gpu)
    check_files(engine, manifest)


def check_files(engine: Path, manifest: EngineManifest) -> None:
    """Raise a DpctlError unless the engine and the graph it was built from are unchanged."""
    todo = f"build the engine again: {rebuild(engine, manifest.engine_recipe)}"
    with artifact.reading(engine):
        found = artifact.hash_file(engine)
    if found != manifest.sha256:
        got = f"{engine}: sha256 {found[:16]}..., expected {manifest.sha256[:16]}..."
        raise DpctlError("the engine differs from its manifest: changed or damaged", got, todo)
    for part, expected in manifest.onnx.items():
        path = engine.with_name(part)
        with artifact.reading(path):
            found = artifact.hash_file(path)
        if found != expected:
            got = f"{path}: sha256 {found[:16]}..., built from {expected[:16]}..."
            raise DpctlError("the graph is not the one that the engine was built from", got, todo)


def check_version(engine: Path, manifest: EngineManifest, version: str) -> None:
    """Raise a DpctlError unless the engine runs under this version of its library, or of the lean runtime."""
    recipe = manifest.engine_recipe
    if version == manifest.version or (recipe.version_compatible and _runs_under(manifest.version, version)):
        return
    got = f"{engine.name}: built by {NAMES.get(manifest.flavor, manifest.flavor)} {manifest.version}, here is {version}"
    todo = f"build it again with this version: {rebuild(engine, recipe)}"
    raise DpctlError("the engine is of another version of its library", got, todo)


def _runs_under(built: str, version: str) -> bool:
    """Tell whether a version-compatible engine runs under a lean runtime: the same major version, no older."""
    old, new = ([int(number) for number in re.findall(r"\d+", text)] for text in (built, version))
    return old[:1] == new[:1] and old <= new


def check_target(engine: Path, manifest: EngineManifest, capability: str, gpu: str) -> None:
    """Raise a DpctlError unless the engine was built for such a GPU."""
    suits = any(_covers(target, capability) for target in manifest.targets)
    if suits and manifest.gpu in (None, gpu):
        return
    made_for = manifest.gpu or f"compute capability {', '.join(manifest.targets)}"
    got = f"{engine.name}: for {made_for}; this is {gpu}, compute capability {capability}"
    todo = f"build one for this GPU: {rebuild(engine, manifest.engine_recipe, capability)}"
    raise DpctlError("the engine is for another GPU", got, todo)


def check_profile(engine: Path, manifest: EngineManifest, signature: Signature) -> None:
    """Raise a DpctlError unless the engine was built for the shapes of a signature."""
    wanted = profile_of(signature)
    if manifest.profile == wanted:
        return
    odd = [name for name in {**wanted, **manifest.profile} if manifest.profile.get(name) != wanted.get(name)]
    got = f"{engine.name}: {odd[0]} {manifest.profile.get(odd[0])}, the signature {wanted.get(odd[0])}"
    todo = f"build the engine again: {rebuild(engine, manifest.engine_recipe)}"
    raise DpctlError("the engine is for other shapes than the signature", got, todo)


def profile_of(signature: Signature) -> dict[str, list[list[int]]]:
    """Return the smallest, best and largest shape of every input, as an engine's manifest holds them."""
    return {tensor.name: [list(shape) for shape in signature.bounds(tensor)] for tensor in signature.inputs}


def precedence(manifest: EngineManifest) -> tuple[bool, int, bool, bool]:
    """Return what sorts engines that all run on one GPU: the most specific first.

    For named compute capabilities before all later ones, for fewer of them before more, TensorRT's before
    TensorRT-RTX's, one for its own version before one for others too.
    """
    portable = any(target.endswith(LATER) for target in manifest.targets)
    lenient = manifest.engine_recipe.version_compatible
    return portable, len(manifest.targets), manifest.flavor != "tensorrt", lenient


def _covers(target: str, capability: str) -> bool:
    if not target.endswith(LATER):
        return target == capability
    return _numbers(capability) >= _numbers(target.removesuffix(LATER))


def _numbers(capability: str) -> list[int]:
    return [int(number) for number in capability.split(".")]


def rebuild(engine: Path, recipe: EngineRecipe, capability: str | None = None) -> str:
    """Return the command that builds an engine again, in place; `capability` takes the place of a rtx engine's own."""
    directory = str(engine.parent.parent)
    words = ["dpctl", "export", directory, "--out", directory, "--force", "--trt"]
    values = to_dict(recipe)
    if capability is not None and recipe.flavor == "rtx":
        values["compute_capability"] = [capability]
    for entry, value in values.items():
        option = f"--{OPTIONS.get(entry, entry.replace('_', '-'))}"
        if isinstance(value, bool):
            words += [option] if value else []
        elif value != [] and value != "auto":
            words += [option, ",".join(value) if isinstance(value, list) else f"{value}"]
    return shlex.join(words)
