"""The doctor finds what is there, says what to do about the rest, and never falls ill itself."""

import importlib
import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from rich.console import Console

from dpctl import doctor, environment
from dpctl.doctor import MISSING, OK, WARNING, Finding

ROOT = Path(__file__).resolve().parent.parent


def modules(monkeypatch: pytest.MonkeyPatch, **stand_ins: ModuleType | SimpleNamespace | Exception) -> None:
    """Let importlib.import_module give the stand-ins, or raise them."""
    real = importlib.import_module

    def import_module(name: str) -> ModuleType | SimpleNamespace:
        if name not in stand_ins:
            return real(name)
        found = stand_ins[name]
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(doctor.importlib, "import_module", import_module)


def versions(monkeypatch: pytest.MonkeyPatch, **installed: str) -> None:
    """Let exactly these distributions be installed (underscores for hyphens)."""
    known = {name.replace("_", "-"): version for name, version in installed.items()}
    monkeypatch.setattr(environment, "version", known.get)


def test_this_machine_has_its_findings() -> None:
    findings = doctor.diagnose()
    named = {finding.name: finding for finding in findings}
    assert len(named) == len(findings)
    assert named["Python"].state == named["PyTorch"].state == OK
    assert "threads" in named["PyTorch"].found
    for finding in findings:
        assert finding.found
        assert bool(finding.todo) == (finding.state != OK), finding


def test_json_and_table_hold_the_same() -> None:
    findings = [
        Finding("TensorRT", MISSING, "not installed", "pip install 'dpctl-diffusion[gpu]'"),
        Finding("a", OK, "b"),
    ]
    plain = json.loads(json.dumps(doctor.as_json(findings)))
    assert plain[0] == {"name": "TensorRT", "state": "missing", "found": "not installed", "todo": findings[0].todo}
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(doctor.as_table(findings))
    text = console.export_text()
    for finding in findings:
        assert all(part in text for part in (finding.name, finding.state, finding.found, finding.todo))


PARTS = {
    "torch": doctor.torch,
    "onnxruntime": doctor.onnxruntime,
    "tensorrt": doctor.tensorrt,
    "tensorrt_rtx": doctor.tensorrt_rtx,
    "openvino": doctor.openvino,
}


@pytest.mark.parametrize("module", PARTS)
def test_what_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    modules(monkeypatch, **{module: ModuleNotFoundError(f"No module named {module!r}", name=module)})
    finding = PARTS[module]()
    assert (finding.state, finding.found) == (MISSING, "not installed")
    assert "pip install" in finding.todo


@pytest.mark.parametrize("module", PARTS)
@pytest.mark.parametrize(
    "problem",
    [
        ImportError("libnvinfer.so.11: cannot open shared object file"),
        ModuleNotFoundError("No module named 'inner'", name="inner"),
        OSError("undefined symbol: nope"),
        RuntimeError(""),
        AttributeError("partially initialized"),
    ],
)
def test_what_is_broken_is_a_finding(monkeypatch: pytest.MonkeyPatch, module: str, problem: Exception) -> None:
    modules(monkeypatch, **{module: problem})
    finding = PARTS[module]()
    assert finding.state == WARNING
    assert "does not load" in finding.found
    assert str(problem) in finding.found
    assert finding.todo


def torch_with(
    cuda_version: str | None, gpus: tuple[str, ...] = (), capabilities: tuple[tuple[int, int], ...] = ()
) -> SimpleNamespace:
    count = max(len(gpus), len(capabilities))
    cuda = SimpleNamespace(
        is_available=lambda: count > 0,
        device_count=lambda: count,
        get_device_name=lambda i: gpus[i],
        get_device_capability=lambda i: capabilities[i],
    )
    return SimpleNamespace(version=SimpleNamespace(cuda=cuda_version), cuda=cuda, get_num_threads=lambda: 4)


@pytest.mark.parametrize(
    ("module", "state", "found"),
    [
        (torch_with(None, ()), MISSING, "CPU build"),
        (torch_with("13.0", ()), MISSING, "sees no GPU"),
        (torch_with("13.0", ("H200", "L4")), OK, "CUDA 13.0: H200, L4"),
        (ImportError("broken"), MISSING, "torch does not load"),
    ],
)
def test_cuda(monkeypatch: pytest.MonkeyPatch, module: SimpleNamespace | Exception, state: str, found: str) -> None:
    modules(monkeypatch, torch=module)
    finding = doctor.cuda()
    assert finding.state == state
    assert found in finding.found


@pytest.mark.parametrize("version", ["580.95.05", b"580.95.05"])
def test_the_driver_is_asked_by_nvml(monkeypatch: pytest.MonkeyPatch, version: str | bytes) -> None:
    shut: list[bool] = []
    nvml = SimpleNamespace(
        nvmlInit=lambda: None, nvmlSystemGetDriverVersion=lambda: version, nvmlShutdown=lambda: shut.append(True)
    )
    modules(monkeypatch, pynvml=nvml)
    assert doctor.driver() == Finding("NVIDIA driver", OK, "580.95.05")
    assert shut


def test_nvml_without_a_driver_is_no_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise RuntimeError("NVML Shared Library Not Found")

    modules(monkeypatch, pynvml=SimpleNamespace(nvmlInit=refuse))
    assert doctor.driver_version() is None
    assert doctor.driver().name == "NVIDIA driver"


def test_providers_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    modules(monkeypatch, onnxruntime=SimpleNamespace(__version__="1.2", get_available_providers=lambda: providers))
    assert doctor.onnxruntime() == Finding("ONNX Runtime", OK, "1.2: CUDA, CPU")


def test_two_onnxruntimes_are_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, onnxruntime="1.32.0")
    assert doctor.one_onnxruntime().state == OK
    versions(monkeypatch, onnxruntime="1.32.0", onnxruntime_gpu="1.31.0")
    finding = doctor.one_onnxruntime()
    assert finding.state == WARNING
    assert finding.found == "onnxruntime 1.32.0 and onnxruntime-gpu 1.31.0"
    assert "[cpu] and [gpu]" in finding.todo


def test_onnxruntimes_own_tensorrt_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    module = SimpleNamespace(
        __version__="1.2", __file__=str(tmp_path / "__init__.py"), get_available_providers=lambda: providers
    )
    modules(monkeypatch, onnxruntime=module)
    versions(monkeypatch)
    assert doctor.onnxruntime().found == "1.2: Tensorrt, CUDA, CPU; dpctl does not use the Tensorrt provider"
    (tmp_path / "capi").mkdir()
    # The name as it lies in the library's table of what it needs.
    library = tmp_path / "capi" / "libonnxruntime_providers_tensorrt.so"
    library.write_bytes(b"\x7fELF\0libcudart.so.13\0libnvinfer.so.10\0libnvonnxparser.so.10\0")
    assert "is for TensorRT 10, and dpctl does not use it" in doctor.onnxruntime().found
    versions(monkeypatch, tensorrt="10.16.1.11")
    assert "is for TensorRT 10, and dpctl does not use it" in doctor.onnxruntime().found
    versions(monkeypatch, tensorrt="11.4.0.106")
    finding = doctor.onnxruntime()
    assert "is for TensorRT 10, not 11.4.0.106, and dpctl does not use it" in finding.found
    assert finding.state == OK


@pytest.mark.parametrize(
    ("capabilities", "state", "found", "todo"),
    [
        ((), WARNING, "there is none", "[rtx]"),
        (((7, 0),), WARNING, "does not support this GPU, compute capability 7.0", "7.5 or later"),
        (((7, 5),), OK, "on this GPU, compute capability 7.5", ""),
        (((9, 0), (9, 0), (7, 0)), OK, "on this GPU, compute capability 9.0", ""),
    ],
)
def test_tensorrt_needs_its_gpu(
    monkeypatch: pytest.MonkeyPatch, capabilities: tuple[tuple[int, int], ...], state: str, found: str, todo: str
) -> None:
    modules(monkeypatch, tensorrt=SimpleNamespace(__version__="11.4.0"), torch=torch_with("13.0", (), capabilities))
    finding = doctor.tensorrt()
    assert finding.state == state
    assert finding.found.startswith("11.4.0: ")
    assert finding.found.endswith(found)
    assert todo in finding.todo


@pytest.mark.parametrize(
    ("capabilities", "state", "found", "todo"),
    [
        ((), OK, "running one needs such a GPU", ""),
        (((8, 9),), OK, "this GPU, 8.9, runs them", ""),
        (((9, 0), (12, 0)), OK, "this GPU, 12.0, runs them", ""),
        (((9, 0),), WARNING, "this GPU has 9.0 and runs none of them", "[gpu]"),
    ],
)
def test_tensorrt_rtx_builds_anywhere(
    monkeypatch: pytest.MonkeyPatch, capabilities: tuple[tuple[int, int], ...], state: str, found: str, todo: str
) -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    modules(monkeypatch, torch=torch_with("13.0", (), capabilities))
    finding = doctor.tensorrt_rtx()
    assert finding.state == state
    assert finding.found.startswith(f"{rtx.__version__}: builds engines without a GPU for compute capability 7.5, 8.")
    assert finding.found.endswith(found)
    assert todo in finding.todo


def test_the_targets_are_those_of_the_library() -> None:
    rtx = pytest.importorskip("tensorrt_rtx", reason="tensorrt-rtx is not installed")
    targets = doctor.rtx_targets(rtx)
    names = {f"SM{major}{minor}" for major, minor in targets}
    assert names == set(rtx.ComputeCapability.__members__) - {"NONE", "CURRENT"}
    assert (8, 9) in targets
    assert (12, 0) in targets


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (doctor.one_tensorrt, ("tensorrt_cu12", "tensorrt_cu13")),
        (doctor.one_tensorrt_rtx, ("tensorrt_rtx_cu12", "tensorrt_rtx_cu13")),
    ],
)
def test_two_cuda_flavors_are_a_conflict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, part: Callable[[], Finding], names: tuple[str, str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])  # nothing is installed but what is written here
    importlib.invalidate_caches()
    assert part().state == OK
    for name, state in zip(names, (OK, WARNING), strict=True):
        (tmp_path / f"{name}-1.7.dist-info").mkdir()
        (tmp_path / f"{name}-1.7.dist-info" / "METADATA").write_text(f"Name: {name}\nVersion: 1.7\n")
        importlib.invalidate_caches()
        finding = part()
        assert finding.state == state
        assert f"{name.replace('_', '-')} 1.7" in finding.found
    assert "pip uninstall" in finding.todo


@pytest.mark.parametrize(
    ("torch_cuda", "ort_cuda", "installed", "state", "found"),
    [
        (None, "", {}, OK, "no library here is built for CUDA"),
        ("13.0", "13.0", {"tensorrt_cu13": "11.4"}, OK, "PyTorch for CUDA 13.0, ONNX Runtime for CUDA 13.0, TensorRT"),
        ("13.2", "13.0", {}, OK, "PyTorch for CUDA 13.2, ONNX Runtime for CUDA 13.0"),
        ("12.8", "13.0", {}, WARNING, "PyTorch for CUDA 12.8, ONNX Runtime for CUDA 13.0"),
        ("13.0", "", {"tensorrt_cu12": "10.8"}, WARNING, "PyTorch for CUDA 13.0, TensorRT 10.8 for CUDA 12"),
    ],
)
def test_one_major_version_of_cuda(
    monkeypatch: pytest.MonkeyPatch,
    torch_cuda: str | None,
    ort_cuda: str,
    installed: dict[str, str],
    state: str,
    found: str,
) -> None:
    modules(monkeypatch, torch=torch_with(torch_cuda), onnxruntime=SimpleNamespace(cuda_version=ort_cuda))
    versions(monkeypatch, **installed)
    finding = doctor.one_cuda()
    assert finding.state == state
    assert finding.found.startswith(found)
    assert ("one major version" in finding.todo) == (state == WARNING)


def test_onnxruntime_says_its_cuda() -> None:
    import onnxruntime

    # What one_cuda reads: "13.0" in the build for a GPU, empty in the one for the processor.
    assert bool(onnxruntime.cuda_version) == ("CUDAExecutionProvider" in onnxruntime.get_available_providers())


def test_without_any_library_there_is_nothing_to_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    modules(monkeypatch, torch=ImportError("broken"), onnxruntime=ImportError("broken"))
    versions(monkeypatch)
    assert doctor.one_cuda().state == OK
    assert doctor.capabilities() == []


def test_intels_dpctl_is_a_conflict(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, dpctl_diffusion="0.1.0")
    assert doctor.one_dpctl().state == OK
    versions(monkeypatch, dpctl_diffusion="0.1.0", dpctl="0.20")
    finding = doctor.one_dpctl()
    assert finding.state == WARNING
    assert "SYCL" in finding.todo


def test_without_transformers_there_is_no_text(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch)
    finding = doctor.transformers()
    assert finding.state == MISSING
    assert "[text]" in finding.todo


@pytest.mark.parametrize(("free", "state"), [(10**12, OK), (10**6, WARNING)])
def test_disk_and_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, free: int, state: str) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    monkeypatch.setattr(doctor, "available_memory", lambda: free)
    assert doctor.disk(tmp_path).state == state
    assert doctor.memory().state == state


def test_a_directory_that_is_not_there_is_a_finding(tmp_path: Path) -> None:
    assert doctor.disk(tmp_path / "missing").state == WARNING


def test_importing_the_doctor_imports_nothing_heavy() -> None:
    program = "import sys, dpctl.doctor; print({'torch', 'onnxruntime', 'rich', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
