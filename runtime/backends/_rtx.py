"""What TensorRT-RTX alone has: it captures by itself, and its compiled kernels are kept for the next start."""

import os
from pathlib import Path
from types import ModuleType
from typing import Any

from dpctl import artifact
from runtime.engine import EngineManifest


def cache_path(about: EngineManifest, gpu: str) -> Path:
    """Return where the kernels compiled for an engine are kept: below $XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    both = artifact.digest({"engine": about.sha256, "gpu": gpu})
    return Path(base) / "dpctl" / "rtx" / f"{both[:32]}.cache"


def settings_of(library: ModuleType, engine: Any, kept: Path, *, capture: bool = True) -> tuple[Any, Any]:
    """Return the configuration of a context and its cache of compiled kernels, filled from `kept` where that fits."""
    settings = engine.create_runtime_config()
    strategies = library.CudaGraphStrategy
    settings.cuda_graph_strategy = strategies.WHOLE_GRAPH_CAPTURE if capture else strategies.DISABLED
    # Compiled before the first run of a shape, not behind its back: an idle denoiser uses no processor time, and all
    # runs but the first take equally long.
    settings.dynamic_shapes_kernel_specialization_strategy = library.DynamicShapesKernelSpecializationStrategy.EAGER
    compiled = settings.create_runtime_cache()
    if kept.is_file():
        compiled.deserialize(kept.read_bytes())  # False where it does not fit: then it is compiled again
    settings.set_runtime_cache(compiled)
    return settings, compiled


def keep(compiled: Any, kept: Path) -> None:
    """Write the compiled kernels for the next start, whole or not at all; without room for them it is slower."""
    temporary = kept.with_name(f"{kept.name}.{os.getpid()}")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(bytes(compiled.serialize()))
        temporary.replace(kept)
    except OSError:
        temporary.unlink(missing_ok=True)
