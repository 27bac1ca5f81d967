"""A diffusers pipeline or bare UNet <-> a model directory; one door for directories, Hub ids and `reference`.

Nothing found in a directory is executed: the network is built from our own or diffusers' class, its weights are
safetensors, and files other than the network are copied, not loaded.
"""

import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from dpctl import artifact
from dpctl.artifact import MANIFEST, Manifest
from dpctl.errors import DpctlError

REFERENCE = Path(__file__).parent / "reference" / "model"
INDEX = "model_index.json"
DECODERS = ("vae", "vqvae")  # their entries in it
LOSSES = "losses.json"  # of every step of a training, beside what it trained
PROGRESS = "progress.png"  # its sample sheets
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model"]


@dataclass(frozen=True)
class Model:
    """A loaded model: `unet` is in eval mode, float32, on the CPU."""

    unet: Any
    scheduler: Any
    directory: Path
    source: str
    manifest: Manifest | None
    digest: str


def resolve(name: str | Path) -> Path:
    """Return the local directory of a model: a path, the word ``reference`` or a Hub id."""
    if name == "reference":
        return REFERENCE
    path = Path(name)
    # An empty name is a variable that was not set, not the folder one is in.
    if str(name) and path.is_dir():
        return path
    if str(name) and path.exists():
        raise DpctlError("not a model directory", f"the file {path}", "give the directory that holds unet/config.json")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return _from_hub(str(name))
    raise DpctlError(
        "no such model",
        str(name) or "an empty name",
        "give a model directory, a Hub id (owner/name) or the word reference",
    )


def load_model(name: str | Path, *, verify: bool = True) -> Model:
    """Load the UNet and scheduler of a model.

    With `verify` the files are checked against the manifest where there is one. Raises a DpctlError for a directory
    that is no model, an unknown class, and weights that are missing, damaged or of another shape.
    """
    directory = resolve(name)
    manifest = artifact.read_manifest(directory)
    if manifest is not None and verify:
        artifact.verify_files(directory, manifest)
    if manifest is not None and manifest.kind == "exported":
        raise DpctlError(
            "an exported directory holds no weights for torch",
            str(directory),
            "give the model it was exported from (`dpctl export --trt` takes it as it is)",
        )
    unet = _load_unet(unet_directory(directory))
    digest = manifest.digest if manifest is not None else artifact.digest(artifact.hash_files(directory))
    # A path is remembered whole, so that what was made from it finds it again from any working directory.
    source = str(name) if name == "reference" or not Path(name).is_dir() else str(Path(name).resolve())
    return Model(unet, load_scheduler(directory), directory, source, manifest, digest)


def unet_directory(directory: Path) -> Path:
    """Return where `config.json` of the network lies: `unet/` of a pipeline, or the directory of a bare UNet."""
    for candidate in (directory / "unet", directory):
        if (candidate / "config.json").is_file():
            return candidate
    raise DpctlError(
        "not a model directory",
        f"{directory} has neither unet/config.json nor config.json",
        "give a diffusers pipeline or UNet directory",
    )


def read_config(directory: Path) -> dict[str, Any]:
    """Return the network's config as plain JSON values."""
    path = unet_directory(directory) / "config.json"
    config = _read_object(path, "the network's config")
    if "_class_name" not in config:
        raise DpctlError("not a diffusers config", str(path), "give a directory saved by diffusers (save_pretrained)")
    return config


def read_index(directory: Path) -> dict[str, Any]:
    """Return what `model_index.json` says of a pipeline directory; a DpctlError where there is none."""
    path = directory / INDEX
    if not path.is_file():
        raise DpctlError("not a pipeline", f"{directory} has no {INDEX}", "give a diffusers pipeline directory")
    return _read_object(path, "the pipeline's index")


def decoder_of(directory: Path) -> str | None:
    """Return the name of a pipeline's VAE, which is its folder's; None where the network itself draws pictures."""
    index = read_index(directory) if (directory / INDEX).is_file() else {}
    return next((name for name in DECODERS if index.get(name) not in (None, [None, None])), None)


def load_scheduler(directory: Path) -> Any:
    """Return the directory's own scheduler, or diffusers' default DDPM scheduler for a bare UNet."""
    import diffusers

    path = directory / "scheduler" / "scheduler_config.json"
    if not path.is_file():
        return diffusers.DDPMScheduler()
    config = _read_object(path, "the scheduler's config")
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    known = isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)
    if not known:
        raise DpctlError(
            "unknown scheduler", f"{config.get('_class_name')!r} in {path}", "use a scheduler that diffusers has"
        )
    try:
        return kind.from_config(config)
    except (ValueError, TypeError, NotImplementedError) as problem:
        raise DpctlError("the scheduler cannot be built", f"{path}: {problem}", "correct its config") from None


def _read_object(path: Path, what: str) -> dict[str, Any]:
    """Return the JSON object in `path`; a DpctlError says that `what` is none."""
    try:
        with artifact.reading(path):
            values = json.loads(path.read_bytes())
    except ValueError as problem:
        raise DpctlError(f"{what} is not JSON", f"{path}: {problem}", "restore the file from its source") from None
    if not isinstance(values, dict):
        raise DpctlError(f"{what} is not a JSON object", str(path), "give a directory saved by diffusers")
    return values


def build_unet(config: dict[str, Any]) -> Any:
    """Build a UNet, pruned or not, with random weights from its config."""
    return _unet_class(str(config.get("_class_name")), "the given config").from_config(config)


def _unet_class(name: str, where: str) -> Any:
    import diffusers

    from dpctl.pruned_unet import PrunedUNet2DConditionModel, PrunedUNet2DModel

    families = (diffusers.UNet2DModel, diffusers.UNet2DConditionModel, PrunedUNet2DModel, PrunedUNet2DConditionModel)
    classes = {family.__name__: family for family in families}
    if name not in classes:
        raise DpctlError(
            "this kind of network is not supported yet", f"{name} in {where}", f"bring one of: {', '.join(classes)}"
        )
    return classes[name]


def _load_unet(directory: Path) -> Any:
    kind = _unet_class(read_config(directory)["_class_name"], str(directory))
    if not any(directory.glob("*.safetensors")):
        raise DpctlError(
            "no safetensors weights",
            str(directory),
            "save them with save_pretrained(..., safe_serialization=True); pickles are never read",
        )
    try:
        unet, info = kind.from_pretrained(
            directory, use_safetensors=True, output_loading_info=True, local_files_only=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, SafetensorError) as problem:
        said = str(problem).strip() or type(problem).__name__
        raise _damaged(directory, said.splitlines()[0]) from None
    wrong = [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]
    if wrong:
        raise _damaged(directory, f"{len(wrong)} tensors missing, unknown or of another shape, first: {wrong[0]}")
    refuse_non_finite(unet, str(directory))
    # Diffusers notes where it loaded from and would save that path: digests would depend on it, and others read it.
    unet.register_to_config(_name_or_path="")
    return unet.eval()


def refuse_non_finite(unet: Any, where: str) -> None:
    """Raise a DpctlError that names the first tensor of a network with NaN or Inf in it."""
    bad = next((name for name, values in unet.state_dict().items() if not bool(values.isfinite().all())), None)
    if bad is not None:
        raise DpctlError(
            "the weights hold NaN or Inf", f"{bad} in {where}", "use an earlier checkpoint, or train it again"
        )


def _damaged(directory: Path, problem: str) -> DpctlError:
    return DpctlError(
        "the weights cannot be loaded",
        f"{directory}: {problem}",
        "copy or download the model again; config and weights must belong together",
    )


def save_model(directory: Path, *, model: Model, unet: Any) -> None:
    """Write a pipeline directory: `unet` and, untouched, every other component of `model`."""
    copy_components(model.directory, directory)
    write_pipeline(directory, unet=unet, scheduler=model.scheduler)


def write_pipeline(directory: Path, *, unet: Any, scheduler: Any) -> None:
    """Write unet/, scheduler/ and their entries in model_index.json; other entries are kept as they are."""
    unet.save_pretrained(directory / "unet", safe_serialization=True)
    write_index(directory, unet=unet, scheduler=scheduler)


def write_index(directory: Path, *, unet: Any, scheduler: Any) -> None:
    """Write scheduler/ where it is missing, and the entries of network and scheduler in model_index.json."""
    import diffusers

    if not (directory / "scheduler").is_dir():
        scheduler.save_pretrained(directory / "scheduler")
    path = directory / INDEX
    index: dict[str, Any] = {"_class_name": "DDPMPipeline"}
    if path.is_file():
        index = _read_object(path, "the pipeline's index")
    index["_diffusers_version"] = diffusers.__version__
    # A class that travels with its artifact is named by the module file beside its weights.
    module = type(unet).__module__
    index["unet"] = ["diffusers" if module.startswith("diffusers.") else module, type(unet).__name__]
    index.setdefault("scheduler", ["diffusers", type(scheduler).__name__])
    path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def copy_components(source: Path, target: Path) -> None:
    """Copy everything of a pipeline directory but the network, what dpctl wrote beside it, and hidden files."""
    if not (source / INDEX).is_file():
        return
    for path in sorted(source.iterdir()):
        if path.name in ("unet", MANIFEST, LOSSES, PROGRESS) or path.name.startswith("."):
            continue
        if path.is_dir():
            shutil.copytree(path, target / path.name)
        else:
            shutil.copy2(path, target / path.name)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as problem:  # the client raises its own, requests' and the system's errors alike
        raise DpctlError(
            "the model is neither a directory nor to be had from the Hub",
            f"{name}: {type(problem).__name__}",
            "check the spelling and the network, or download the model and give its directory",
        ) from None
