"""The diffusers pipelines of model directories: which class, which components, and loading those beside the network.

Only classes of diffusers and transformers are built, from safetensors: code found in a directory is never run.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import SafetensorError

from dpctl.errors import DpctlError
from dpctl.models import read_index, refuse_non_finite

LIBRARIES = ("diffusers", "transformers")
UNLOADABLE = (
    *(OSError, ValueError, RuntimeError, TypeError, LookupError, AttributeError, ImportError),
    SafetensorError,
)
# What makes latents of pictures.
VAES = ("AutoencoderKL", "VQModel")


def pipeline_class(directory: Path) -> Any:
    """Return diffusers' class of a pipeline directory.

    Raises a DpctlError for what is none, for unconditional pipelines without a VAE, which sample through our own loop,
    and for components that need code other than diffusers' and transformers'.
    """
    import diffusers

    index = read_index(directory)
    kind: Any = getattr(diffusers, str(index.get("_class_name")), None)
    if getattr(kind, "_backends", None):  # what stands in for a class whose library is missing
        todo = "pip install 'dpctl-diffusion[text]'"
        raise DpctlError("this pipeline needs other libraries", f"{kind.__name__}: {kind._backends}", todo)
    known = isinstance(kind, type) and issubclass(kind, diffusers.DiffusionPipeline)
    if not known:
        got = f"{index.get('_class_name')!r} in {directory}"
        raise DpctlError("unknown pipeline", got, "bring one of diffusers' own; code in a directory is never run")
    modules = set(kind._get_signature_keys(kind)[0])
    if "unet" not in modules or kind._load_connected_pipes:
        raise DpctlError("this pipeline cannot run on a backend", kind.__name__, "bring one with a UNet of its own")
    if modules == {"unet", "scheduler"}:
        todo = "use runtime.sample, or `dpctl sample`: they honour every scheduler, which this pipeline does not"
        raise DpctlError("unconditional models sample through our own loop", f"{kind.__name__} in {directory}", todo)
    for name in sorted(modules - {"unet"}):
        _refuse_foreign(name, index.get(name), directory)
    return kind


def _refuse_foreign(name: str, entry: Any, directory: Path) -> None:
    """Raise a DpctlError unless an entry of the index is absent or a class of diffusers or transformers."""
    from diffusers import pipelines

    if entry is None or entry == [None, None]:
        return
    named = isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry)
    known = named and (entry[0] in LIBRARIES or isinstance(getattr(pipelines, entry[0], None), ModuleType))
    # transformers' Auto classes ask whether to run code that a config names; pipelines within one read what they like.
    if not known or "Pipeline" in entry[1] or (entry[0] == "transformers" and entry[1].startswith("Auto")):
        got = f"{name}: {entry} in {directory}"
        raise DpctlError("a component is not of diffusers or transformers", got, "save the pipeline with their classes")


def takes_text(kind: Any) -> bool:
    """Tell whether a class of pipelines draws what a text says."""
    return "prompt" in inspect.signature(kind.__call__).parameters


def load_text_parts(kind: Any, directory: Path) -> Any:
    """Return a pipeline of a class with its tokenizers and text encoders alone, in float32 on the processor.

    Raises a DpctlError for components that are missing, damaged or not safetensors.
    """
    others = [name for name in kind._get_signature_keys(kind)[0] if not name.startswith(("tokenizer", "text_encoder"))]
    left_out: dict[str, Any] = dict.fromkeys(others)
    if "requires_safety_checker" in inspect.signature(kind).parameters:
        left_out["requires_safety_checker"] = False  # it draws nothing
    try:
        pipe = kind.from_pretrained(
            directory, use_safetensors=True, local_files_only=True, dtype=torch.float32, **left_out
        )
    except UNLOADABLE as problem:
        raise cannot_be_loaded(directory, problem) from None
    for name, part in pipe.components.items():
        if isinstance(part, torch.nn.Module):
            refuse_non_finite(part, str(directory / name))
    return pipe


def load_vae(directory: Path, entry: str) -> Any:
    """Return the VAE that a pipeline's index names `entry`, in float32 on the processor.

    Raises a DpctlError for another class than `VAES`, and for weights that are missing, damaged or not finite.
    """
    import diffusers

    named = read_index(directory).get(entry)
    if named not in [["diffusers", kind] for kind in VAES]:
        got = f"{entry}: {named} in {directory}"
        raise DpctlError("this kind of VAE is not supported", got, f"bring one of: {', '.join(VAES)}")
    try:
        vae, told = getattr(diffusers, named[1]).from_pretrained(
            directory / entry,
            use_safetensors=True,
            output_loading_info=True,
            local_files_only=True,
            dtype=torch.float32,
        )
    except UNLOADABLE as problem:
        raise cannot_be_loaded(directory / entry, problem) from None
    if wrong := [*told["missing_keys"], *told["unexpected_keys"], *told["mismatched_keys"]]:
        raise cannot_be_loaded(
            directory / entry, f"{len(wrong)} tensors missing, unknown or of another shape: {wrong[0]}"
        )
    refuse_non_finite(vae, str(directory / entry))
    return vae.eval()


def cannot_be_loaded(directory: Path, problem: object) -> DpctlError:
    """Return the error of a pipeline, or a component of one, that cannot be loaded."""
    said = (str(problem).strip() or type(problem).__name__).splitlines()[0]
    todo = "install what it names, or save the pipeline again as safetensors"
    return DpctlError("the pipeline cannot be loaded", f"{directory}: {said}", todo)


def hide_progress() -> None:
    """Leave the terminal to our own progress bar."""
    import diffusers

    diffusers.utils.logging.disable_progress_bar()
    if diffusers.utils.is_transformers_available():
        from transformers.utils import logging

        logging.disable_progress_bar()


@contextmanager
def quiet() -> Iterator[None]:
    """Keep diffusers and transformers from saying the same again each time."""
    import diffusers

    loggers: list[Any] = [diffusers.utils.logging]
    if diffusers.utils.is_transformers_available():
        from transformers.utils import logging

        loggers.append(logging)
    before = [logger.get_verbosity() for logger in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity_error()
        yield
    finally:
        for logger, verbosity in zip(loggers, before, strict=True):
            logger.set_verbosity(verbosity)
