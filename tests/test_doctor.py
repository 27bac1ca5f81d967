"""The doctor finds what is there, says what to do about the rest, and never falls ill itself."""

import importlib
import io
import json
import subprocess
import sys
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


def torch_with(cuda_version: str | None, gpus: tuple[str, ...]) -> SimpleNamespace:
    cuda = SimpleNamespace(
        is_available=lambda: bool(gpus), device_count=lambda: len(gpus), get_device_name=lambda i: gpus[i]
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
