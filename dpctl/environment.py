"""What a figure or an artifact was made with: library versions, processor, threads, GPU (stdlib only)."""

import importlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

LIBRARIES = (
    "torch",
    "diffusers",
    "accelerate",
    "torch-pruning",
    "safetensors",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "tensorrt-rtx",
    "numpy",
)


def version(distribution: str) -> str | None:
    """Return the installed version of `distribution`, or None; imports nothing."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def cache(name: str) -> Path:
    """Return the user's folder of what can be made again: below $XDG_CACHE_HOME, or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "dpctl" / name


def import_openvino() -> ModuleType:
    """Import OpenVINO without its telemetry: left alone, importing it reports that to Google Analytics.

    Where the package of its telemetry is missing, OpenVINO uses a stub of its own.
    """
    kept = sys.modules.get("openvino_telemetry")
    sys.modules["openvino_telemetry"] = None  # type: ignore[assignment]
    try:
        return importlib.import_module("openvino")
    finally:
        if kept is None:
            del sys.modules["openvino_telemetry"]
        else:
            sys.modules["openvino_telemetry"] = kept


def processor() -> str:
    """Return the processor's model name as the kernel gives it, with the core count."""
    name = platform.processor() or platform.machine()
    try:
        with Path("/proc/cpuinfo").open(encoding="utf-8") as lines:
            name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def gpu() -> str | None:
    """Return the first GPU's name if torch is already imported and sees one (never imports torch)."""
    torch = sys.modules.get("torch")
    return str(torch.cuda.get_device_name(0)) if torch is not None and torch.cuda.is_available() else None


def describe() -> dict[str, Any]:
    """Return the environment as plain JSON values, the same shape on every machine."""
    return {
        "libraries": {name: found for name in LIBRARIES if (found := version(name))},
        "dpctl": version("dpctl-diffusion"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor(),
        "gpu": gpu(),
    }
