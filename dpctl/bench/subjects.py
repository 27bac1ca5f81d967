"""What is measured: each model on each backend. What is not exported yet is exported into a cache first."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dpctl import artifact, cost, environment, progress, registry
from dpctl.artifact import Manifest
from dpctl.bench.result import Model
from dpctl.errors import DpctlError
from dpctl.models import build_unet, decoder_of, load_model, read_config, resolve
from dpctl.recipe import BenchRecipe, EngineRecipe, ExportRecipe
from dpctl.signature import Signature, images_of, sample_size
from runtime import BACKENDS
from runtime.backends import ort

# Samples for the quality are drawn in batches of this size, where the exported range allows it.
DRAWN_TOGETHER = 64
# The backend that runs engines.
ENGINES = "trt"


@dataclass(frozen=True)
class Entry:
    """One subject before it is measured: the directory its backend opens, or why it cannot."""

    model: Model
    backend: str
    directory: Path
    runs_from: str
    refused: str | None = None
    baseline: bool = False

    @property
    def name(self) -> str:
        """Model and backend."""
        return f"{self.model.name} / {self.backend}"

    @property
    def file_bytes(self) -> int:
        """Bytes of the weights or the graph that the backend reads."""
        return cost.file_bytes(self.directory)

    @property
    def build_latency_s(self) -> float | None:
        """What the engine took to build; None for another backend, and where nothing says it."""
        manifest = artifact.read_manifest(self.directory) if self.backend == ENGINES else None
        built = [about["build_s"] for about in (manifest.stats.get("engines", {}) if manifest else {}).values()]
        return float(built[0]) if len(built) == 1 else None

    @property
    def parity(self) -> dict[str, object] | None:
        """The verdict of the export that runs, and its worst error; None where the weights themselves run."""
        manifest = artifact.read_manifest(self.directory)
        if manifest is None or manifest.parity is None:
            return None
        return {name: manifest.parity[name] for name in ("verdict", "worst") if name in manifest.parity}


def describe(recipe: BenchRecipe) -> tuple[Model, ...]:
    """Return the models of a recipe, the baseline first; raises what a missing or damaged one deserves."""
    sources = (recipe.baseline, *recipe.candidates)
    directories = [resolve(source) for source in sources]
    labels = names(sources)
    return tuple(_describe(*each) for each in zip(labels, sources, directories, strict=True))


def names(sources: Sequence[str]) -> list[str]:
    """Return a short name for each source: its last part, more of it where two would be alike, and then a number."""
    short = []
    for source in sources:
        parts = [part for part in source.split("/") if part not in ("", ".", "..")] or [source]
        others = [other for other in sources if other != source]
        length = next(
            (n for n in range(1, len(parts)) if not any(_ends(other, parts[-n:]) for other in others)), len(parts)
        )
        short.append("/".join(parts[-length:]))
    return [name if short.index(name) == i else f"{name} ({short[:i].count(name) + 1})" for i, name in enumerate(short)]


def _ends(source: str, parts: list[str]) -> bool:
    return source.rstrip("/").split("/")[-len(parts) :] == parts


def _describe(name: str, source: str, directory: Path) -> Model:
    manifest = artifact.read_manifest(directory)
    if manifest is not None and {"params", "macs", "attention_macs"} <= manifest.stats.keys():
        artifact.verify_files(directory, manifest)
        stats, digest, by_module = manifest.stats, manifest.digest, _module_macs(directory)
    else:
        loaded = load_model(directory)
        by_module = cost.macs_by_module(loaded.unet)
        stats, digest = cost.stats(loaded.unet, by_module), loaded.digest
    return Model(
        name=name,
        source=source,
        digest=digest,
        kind="foreign" if manifest is None else manifest.kind,
        params=stats["params"],
        macs=stats["macs"],
        attention_macs=stats["attention_macs"],
        file_bytes=cost.file_bytes(directory),
        lineage=() if manifest is None else _lineage(manifest),
        widths={name: tuple(pair) for name, pair in stats.get("widths", {}).items()},
        sensitivity=stats.get("sensitivity"),
        module_macs=by_module,
        latency=stats.get("latency"),
    )


def _module_macs(directory: Path) -> dict[str, int]:
    """Count the MACs by module, from the config alone: an exported directory has no weights for torch."""
    import torch

    with torch.device("meta"):
        return cost.macs_by_module(build_unet(read_config(directory)))


def _lineage(manifest: Manifest) -> tuple[dict[str, object], ...]:
    """Return what led to a model, oldest first, itself last."""
    own = {"digest": manifest.digest, "source": "", "kind": manifest.kind, "recipe": manifest.recipe}
    return tuple(
        {key: entry.get(key, {} if key == "recipe" else "") for key in own} for entry in (*manifest.lineage, own)
    )


def prepare(
    recipe: BenchRecipe, models: Sequence[Model], exported: Sequence[Path], bar: progress.Bar
) -> tuple[Entry, ...]:
    """Return every model on every backend, exported where that is needed.

    `exported` are directories that may serve: one whose parent is the model, for all the batch sizes.
    """
    more = [backend for backend in recipe.baselines if backend not in recipe.backends]
    wanted = [(model, backend) for model in models for backend in recipe.backends]
    wanted[len(recipe.backends) : len(recipe.backends)] = [(models[0], backend) for backend in more]
    return tuple(
        dataclasses.replace(_entry(*each, recipe, exported, bar), baseline=each[0] is models[0]) for each in wanted
    )


def _entry(model: Model, backend: str, recipe: BenchRecipe, exported: Sequence[Path], bar: progress.Bar) -> Entry:
    own = resolve(model.source)
    runs_exported = registry.load(BACKENDS, backend, "backend").RUNS_EXPORTED
    largest = max(recipe.batch_sizes)
    if model.kind == "exported":
        refused = _beyond(own, largest) if runs_exported else "an exported directory holds no weights for torch"
        return Entry(model, backend, own, model.source, refused)
    if not runs_exported:
        return Entry(model, backend, own, model.source)
    for directory in exported:
        manifest = artifact.read_manifest(directory)
        if manifest is not None and _serves(directory, manifest, model, largest, backend, recipe.precision):
            return Entry(model, backend, directory, str(directory))
    directory = (cached_engine if backend == ENGINES else cached_export)(model, largest, bar, recipe.precision)
    return Entry(model, backend, directory, f"exported for this measurement into {directory}")


def _images(directory: Path) -> tuple[int, int]:
    """Return the fewest and the most images that an exported directory draws at once; guidance takes two rows each.

    Raises a DpctlError for a manifest that records nonsense.
    """
    manifest = ort.exported(directory)
    low, _, high = Signature.from_json(manifest.signature).batch
    return low, images_of(read_config(directory), high)


def _beyond(directory: Path, largest: int) -> str | None:
    """Say that a batch is larger than an exported directory takes, or return None."""
    high = _images(directory)[1]
    if largest <= high:
        return None
    todo = f"export it again with --batch 1,{min(8, largest)},{largest}"
    return f"it was exported for batches of {high} at most, and {largest} was asked for: {todo}"


def _serves(directory: Path, manifest: Manifest, model: Model, largest: int, backend: str, precision: str) -> bool:
    """Tell whether a directory is an export of `model` for the backend, and takes batches of 1 to `largest`."""
    if backend == ENGINES and not manifest.stats.get("engines"):
        return False
    if manifest.recipe.get("precision") != precision:
        return False
    if manifest.kind != "exported" or manifest.parent != model.digest or manifest.signature is None:
        return False
    low, high = _images(directory)
    return low == 1 and largest <= high


def cached_export(model: Model, largest: int, bar: progress.Bar, precision: str = "fp32") -> Path:
    """Return an exported directory of `model` in the user's cache; export it there the first time."""
    from export.to_onnx import export_model

    high = max(largest, DRAWN_TOGETHER)
    versions = [environment.version(name) or "" for name in ("dpctl-diffusion", "torch", "onnx", "onnxscript")]
    key = artifact.digest(
        {"model": model.digest, "batch": str(high), "versions": " ".join(versions), "precision": precision}
    )
    directory = cache() / key[:32]
    if not _intact(directory, model, largest, "ort", precision):
        recipe = ExportRecipe(precision=precision, batch=(1, min(8, high), high))
        export_model(load_model(model.source), directory, recipe, force=True, bar=bar)
    return directory


def cached_engine(model: Model, largest: int, bar: progress.Bar, precision: str = "fp32") -> Path:
    """Return the same with an engine for the GPU here; a DpctlError without a GPU, before anything is exported."""
    from export.engines import export_engine
    from runtime.backends import trt

    gpu = trt.find_gpu(None)
    source = cached_export(model, largest, bar, precision)
    versions = [environment.version(name) or "" for name in ("tensorrt", "tensorrt-rtx")]
    key = artifact.digest({"source": source.name, "gpu": trt.name_of(gpu), "versions": " ".join(versions)})
    directory = cache() / key[:32]
    if not _intact(directory, model, largest, ENGINES, precision):
        export_engine(source, directory, EngineRecipe(), force=True, bar=bar)
    return directory


def _intact(directory: Path, model: Model, largest: int, backend: str, precision: str) -> bool:
    manifest = artifact.read_manifest(directory) if directory.is_dir() else None
    try:
        if manifest is None or not _serves(directory, manifest, model, largest, backend, precision):
            return False
    except DpctlError:  # it records nonsense: it is written again
        return False
    return artifact.hash_files(directory) == manifest.files


def cache() -> Path:
    """Return the folder of exports made for measurements."""
    return environment.cache("exported")


def largest_batch(entry: Entry, count: int) -> int:
    """Return how many samples a subject may draw at once, `count` at most."""
    manifest = artifact.read_manifest(entry.directory)
    exported = manifest is not None and manifest.kind == "exported"
    high = _images(entry.directory)[1] if exported else DRAWN_TOGETHER
    return min(high, DRAWN_TOGETHER, count)


def shape(model: Model) -> tuple[int, int, int]:
    """Return channels, height and width of the pictures that a model draws: those of its VAE, where it has one."""
    directory = resolve(model.source)
    config = read_config(directory)
    config = config.get("base_config", config)
    height, width = sample_size(config)
    decoder = decoder_of(directory)
    if decoder is None:
        return config.get("out_channels"), height, width
    vae = read_config(directory / decoder)
    levels = vae.get("block_out_channels")
    if not isinstance(levels, list):
        got = f"{directory / decoder}: {vae['_class_name']} with block_out_channels {levels}"
        raise DpctlError("the VAE's config does not say how large its pictures are", got, "use an AutoencoderKL")
    grown = 2 ** (len(levels) - 1)  # as diffusers has it
    return vae.get("out_channels", 3), grown * height, grown * width


def require_one_shape(models: Sequence[Model]) -> None:
    """Raise a DpctlError for candidates that draw other shapes than the baseline."""
    wanted = shape(models[0])
    for model in models[1:]:
        if shape(model) != wanted:
            got = f"{model.source} draws {[*shape(model)]}, the baseline {[*wanted]} (channels, height, width)"
            raise DpctlError("a candidate draws other pictures than the baseline", got, "compare models of one size")
