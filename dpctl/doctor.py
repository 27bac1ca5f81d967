"""What this machine can do: one finding per part, each with what to do where it is missing.

Nothing here fails: a library that is broken is a finding like any other.
"""

import importlib
import platform
import re
import shutil
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from dpctl import environment, units

if TYPE_CHECKING:
    from rich.table import Table

OK, WARNING, MISSING = "ok", "warning", "missing"
DISK_ENOUGH, MEMORY_ENOUGH = 5e9, 4e9
TURING = (
    7,
    5,
)  # the oldest compute capability that TensorRT 10.5 and later run on ("Prerequisites" in its documentation)


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; `state` is ok, warning or missing, `todo` is empty where all is well."""

    name: str
    state: str
    found: str
    todo: str = ""


def diagnose(directory: Path | None = None) -> list[Finding]:
    """Look at this machine, and at the disk under `directory` (default: the current one)."""
    parts: list[Callable[[], Finding]] = [
        python,
        torch,
        cuda,
        driver,
        onnxruntime,
        one_onnxruntime,
        tensorrt,
        one_tensorrt,
        tensorrt_rtx,
        one_tensorrt_rtx,
        one_cuda,
        openvino,
        transformers,
        one_dpctl,
        lambda: disk(directory or Path.cwd()),
        memory,
    ]
    return [part() for part in parts]


def python() -> Finding:
    """Report the interpreter; the tested versions are 3.11 and later."""
    todo = "" if sys.version_info >= (3, 11) else "use Python 3.11 or later"
    return Finding("Python", MISSING if todo else OK, f"{platform.python_version()}, {environment.processor()}", todo)


def torch() -> Finding:
    """Report torch and how many processor threads it uses."""
    module, broken = _import("torch", "PyTorch", "pip install torch")
    if module is None:
        return broken
    return Finding("PyTorch", OK, f"{environment.version('torch')}, {module.get_num_threads()} threads")


def cuda() -> Finding:
    """Report the GPUs that torch can use."""
    module, _ = _import("torch", "CUDA", "")
    if module is None:
        return Finding("CUDA", MISSING, "unknown: torch does not load", "mend PyTorch first")
    if module.version.cuda is None:
        return Finding("CUDA", MISSING, "torch is a CPU build", "for a GPU, install torch from its CUDA index")
    if not module.cuda.is_available():
        return Finding("CUDA", MISSING, "torch sees no GPU", "check the driver below, and CUDA_VISIBLE_DEVICES")
    names = [module.cuda.get_device_name(i) for i in range(module.cuda.device_count())]
    return Finding("CUDA", OK, f"CUDA {module.version.cuda}: {', '.join(names)}")


def driver() -> Finding:
    """Report the NVIDIA driver: asked through its library, else read from the kernel."""
    todo = "for a GPU, install NVIDIA's driver; in a container, run it with --gpus all"
    asked = driver_version()
    if asked is not None:
        return Finding("NVIDIA driver", OK, asked)
    kernel = Path("/proc/driver/nvidia/version")
    if not kernel.is_file():
        return Finding("NVIDIA driver", MISSING, "no driver is loaded", todo)
    return Finding("NVIDIA driver", OK, kernel.read_text(encoding="utf-8").splitlines()[0].strip())


def driver_version() -> str | None:
    """Return the driver's version by NVML, or None without nvidia-ml-py or a driver."""
    try:
        pynvml = importlib.import_module("pynvml")
        pynvml.nvmlInit()
    except Exception:  # no library, no driver, a broken one: NVML has an error class for each
        return None
    try:
        version = pynvml.nvmlSystemGetDriverVersion()
        return version.decode() if isinstance(version, bytes) else str(version)
    finally:
        pynvml.nvmlShutdown()


def onnxruntime() -> Finding:
    """Report ONNX Runtime and its execution providers."""
    module, broken = _import("onnxruntime", "ONNX Runtime", "pip install 'dpctl-diffusion[cpu]' (or [gpu], never both)")
    if module is None:
        return broken
    providers = [name.removesuffix("ExecutionProvider") for name in module.get_available_providers()]
    unused = f"; {_tensorrt_provider(module)}" if "Tensorrt" in providers else ""
    return Finding("ONNX Runtime", OK, f"{module.__version__}: {', '.join(providers)}{unused}")


def _tensorrt_provider(module: ModuleType) -> str:
    """Say which TensorRT ONNX Runtime's own provider links, and that dpctl does not need it."""
    library = Path(module.__file__ or "").parent / "capi" / "libonnxruntime_providers_tensorrt.so"
    linked = re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes()) if library.is_file() else None
    if linked is None:
        return "dpctl does not use the Tensorrt provider"
    major, installed = linked[1].decode(), environment.version("tensorrt")
    other = f", not {installed}" if installed is not None and installed.split(".")[0] != major else ""
    return f"the Tensorrt provider is for TensorRT {major}{other}, and dpctl does not use it"


def one_onnxruntime() -> Finding:
    """Report whether the two builds of ONNX Runtime are installed over one another."""
    return _exclusive(
        "ONNX Runtime builds",
        ("onnxruntime", "onnxruntime-gpu"),
        "they overwrite one another: pip uninstall both, then install one of the extras [cpu] and [gpu]",
    )


def one_dpctl() -> Finding:
    """Report whether Intel's distribution of the name `dpctl` shares the package directory with ours."""
    return _exclusive(
        "the name dpctl",
        ("dpctl-diffusion", "dpctl"),
        "Intel's SYCL package dpctl has the same import name: pip uninstall both, then install dpctl-diffusion "
        "in an environment of its own",
    )


def tensorrt() -> Finding:
    """Report TensorRT, which builds on the GPU that it builds for."""
    module, broken = _import("tensorrt", "TensorRT", "on a GPU, pip install 'dpctl-diffusion[gpu]'")
    if module is None:
        return broken
    version, gpus = _version(module), capabilities()
    if not gpus:
        todo = "to build without a GPU, pip install 'dpctl-diffusion[rtx]'"
        return Finding(
            "TensorRT", WARNING, f"{version}: builds and runs engines on a GPU only, and there is none", todo
        )
    usable = [gpu for gpu in gpus if gpu >= TURING]
    if not usable:
        found = f"{version}: does not support this GPU, compute capability {_dotted(gpus)}"
        return Finding("TensorRT", WARNING, found, f"use a GPU of {_dotted([TURING])} or later, or the backend ort")
    return Finding(
        "TensorRT", OK, f"{version}: builds and runs engines on this GPU, compute capability {_dotted(usable)}"
    )


def one_tensorrt() -> Finding:
    """Report whether TensorRT is installed for two CUDA versions over one another."""
    return _exclusive(
        "TensorRT builds",
        ("tensorrt-cu12", "tensorrt-cu13"),
        "both are the module tensorrt: pip uninstall tensorrt and everything that begins with tensorrt_cu, then "
        "install the extra [gpu]",
    )


def tensorrt_rtx() -> Finding:
    """Report TensorRT-RTX, which builds engines without a GPU, and whether they run here."""
    module, broken = _import("tensorrt_rtx", "TensorRT-RTX", "pip install 'dpctl-diffusion[rtx]'")
    if module is None:
        return broken
    targets, gpus = rtx_targets(module), capabilities()
    found = f"{_version(module)}: builds engines without a GPU for compute capability {_dotted(targets)}"
    if not gpus:
        return Finding("TensorRT-RTX", OK, f"{found}; running one needs such a GPU")
    usable = [gpu for gpu in gpus if gpu in targets]
    if not usable:
        todo = "here, build with TensorRT: pip install 'dpctl-diffusion[gpu]'"
        return Finding("TensorRT-RTX", WARNING, f"{found}; this GPU has {_dotted(gpus)} and runs none of them", todo)
    return Finding("TensorRT-RTX", OK, f"{found}; this GPU, {_dotted(usable)}, runs them")


def one_tensorrt_rtx() -> Finding:
    """Report whether TensorRT-RTX is installed for two CUDA versions over one another."""
    return _exclusive(
        "TensorRT-RTX builds",
        ("tensorrt-rtx-cu12", "tensorrt-rtx-cu13"),
        "both are the module tensorrt_rtx: pip uninstall tensorrt-rtx and everything that begins with tensorrt_rtx_cu, "
        "then install the extra [rtx]",
    )


def one_cuda() -> Finding:
    """Report whether PyTorch, ONNX Runtime and TensorRT are built for one major version of CUDA."""
    torch_module, _ = _import("torch", "", "")
    ort, _ = _import("onnxruntime", "", "")
    built = {
        "PyTorch": torch_module.version.cuda if torch_module is not None else None,
        "ONNX Runtime": getattr(ort, "cuda_version", None),
        **{f"TensorRT {v}": cuda for cuda in ("12", "13") if (v := environment.version(f"tensorrt-cu{cuda}"))},
    }
    found = {name: cuda for name, cuda in built.items() if cuda}
    text = ", ".join(f"{name} for CUDA {cuda}" for name, cuda in found.items())
    if len({cuda.split(".")[0] for cuda in found.values()}) > 1:
        # ONNX Runtime takes cuBLAS and cuDNN from torch's packages.
        todo = "they share CUDA's libraries: install builds for one major version; the extra [gpu] asks for 13"
        return Finding("CUDA versions", WARNING, text, todo)
    return Finding("CUDA versions", OK, text or "no library here is built for CUDA")


def capabilities() -> list[tuple[int, int]]:
    """Return the compute capabilities of the GPUs that torch sees, each once."""
    module, _ = _import("torch", "", "")
    if module is None or not module.cuda.is_available():
        return []
    return sorted({module.cuda.get_device_capability(i) for i in range(module.cuda.device_count())})


def rtx_targets(module: ModuleType) -> list[tuple[int, int]]:
    """Return the compute capabilities that this TensorRT-RTX builds for: SM89 is (8, 9), SM120 is (12, 0)."""
    numbers = [name[2:] for name in module.ComputeCapability.__members__ if re.fullmatch(r"SM\d{2,}", name)]
    return sorted((int(number[:-1]), int(number[-1])) for number in numbers)


def _dotted(found: Iterable[tuple[int, int]]) -> str:
    return ", ".join(f"{major}.{minor}" for major, minor in found)


def openvino() -> Finding:
    """Report OpenVINO."""
    todo = "pip install 'dpctl-diffusion[openvino]'"
    module, broken = _import("openvino", "OpenVINO", todo, environment.import_openvino)
    return broken if module is None else Finding("OpenVINO", OK, _version(module))


def transformers() -> Finding:
    """Report transformers by its metadata: text-conditioned pipelines need it."""
    version = environment.version("transformers")
    if version is None:
        todo = "for text-conditioned pipelines, pip install 'dpctl-diffusion[text]'"
        return Finding("transformers", MISSING, "not installed", todo)
    return Finding("transformers", OK, version)


def disk(directory: Path) -> Finding:
    """Report the free space under `directory`."""
    try:
        free = shutil.disk_usage(directory).free
    except OSError as problem:
        return Finding("free disk", WARNING, f"{directory}: {problem.strerror}", "choose a readable directory")
    todo = "" if free >= DISK_ENOUGH else f"free some: models and engines take up to {units.bytes_(DISK_ENOUGH)}"
    return Finding("free disk", WARNING if todo else OK, f"{units.bytes_(free)} at {directory}", todo)


def memory() -> Finding:
    """Report the memory that this process may still take: the system's, or its control group's where that is less."""
    free = available_memory()
    if free is None:
        return Finding("memory", WARNING, "unknown: this system has no /proc/meminfo", "see that some 4 GB are free")
    todo = "" if free >= MEMORY_ENOUGH else f"close other programs: training wants {units.bytes_(MEMORY_ENOUGH)}"
    return Finding("memory", WARNING if todo else OK, f"{units.bytes_(free)} available", todo)


def available_memory() -> int | None:
    """Return available bytes, or None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
        kilobytes = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        return None
    group = Path("/sys/fs/cgroup")
    try:
        allowed = int((group / "memory.max").read_text(encoding="utf-8"))
        used = int((group / "memory.current").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no control group, or "max"
        return kilobytes * 1024
    return min(kilobytes * 1024, max(0, allowed - used))


def as_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """Return the findings as plain JSON values."""
    return [asdict(finding) for finding in findings]


def as_table(findings: Iterable[Finding]) -> "Table":
    """Return the findings as a rich table."""
    from rich.table import Table
    from rich.text import Text

    colours = {OK: "green", WARNING: "yellow", MISSING: "dim"}
    table = Table(title="What this machine can do", title_justify="left")
    for heading in ("", "state", "found", "what to do"):
        table.add_column(heading, overflow="fold")
    for finding in findings:
        # Text, not markup: "dpctl-diffusion[gpu]" is no style.
        state = Text(finding.state, style=colours[finding.state])
        table.add_row(Text(finding.name), state, Text(finding.found), Text(finding.todo))
    return table


def _import(
    module: str, name: str, todo: str, load: Callable[[], ModuleType] | None = None
) -> tuple[ModuleType | None, Finding]:
    """Return the module, or None with the finding that says why not."""
    try:
        return load() if load else importlib.import_module(module), Finding(name, OK, "")
    except ModuleNotFoundError as problem:
        if problem.name == module:
            return None, Finding(name, MISSING, "not installed", todo)
        found = f"installed, but does not load: {problem}"
    except Exception as problem:  # shared libraries that are missing or do not fit raise anything
        lines = str(problem).splitlines() or [""]
        found = f"installed, but does not load: {type(problem).__name__}: {lines[0]}"
    return None, Finding(name, WARNING, found, f"install it again: {todo}")


def _version(module: ModuleType) -> str:
    return str(getattr(module, "__version__", "of unknown version"))


def _exclusive(name: str, distributions: tuple[str, str], todo: str) -> Finding:
    """Report two distributions that write to the same files."""
    found = [f"{d} {version}" for d in distributions if (version := environment.version(d)) is not None]
    if len(found) == len(distributions):
        return Finding(name, WARNING, " and ".join(found), todo)
    return Finding(name, OK, found[0] if found else f"neither {' nor '.join(distributions)} is installed")
