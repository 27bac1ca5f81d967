"""The house is as it was drawn: what the wheel holds, how long files are, what may stand where, what --help imports."""

import ast
import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpctl import environment, registry

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("dpctl", "export", "runtime")
REGISTRIES = ("dpctl.prune.criteria", "runtime.backends", "dpctl.bench.metrics")
HEAVY = {
    *("torch", "diffusers", "torch_pruning", "torchmetrics", "accelerate", "transformers", "safetensors"),
    *("onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "polygraphy"),
    *("numpy", "scipy", "matplotlib", "PIL", "jinja2", "huggingface_hub"),
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources() -> list[Path]:
    return [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# --- the wheel ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Build the wheel with the installed hatchling: no network, no build environment."""
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(target.glob("*.whl"))) as archive:
        yield archive


def test_the_wheels_top_level_is_three_packages(wheel: zipfile.ZipFile) -> None:
    top = {name.split("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)


def test_the_wheel_holds_what_the_packages_hold(wheel: zipfile.ZipFile) -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip("no git, or no checkout: nothing to compare the wheel with")
    files = {name for name in done.stdout.splitlines() if (ROOT / name).is_file()}
    assert files <= set(wheel.namelist())


def test_the_wheel_is_typed_and_holds_no_pickle_and_no_cache(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(names)
    suffixes = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle", ".pyc"}
    assert [name for name in names if Path(name).suffix in suffixes] == []


def test_the_wheel_carries_the_licence_and_the_command(wheel: zipfile.ZipFile) -> None:
    names = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}
    assert {"LICENSE", "NOTICE"} <= set(names)
    assert "dpctl = dpctl.cli:main" in wheel.read(names["entry_points.txt"]).decode()
    assert "Name: dpctl-diffusion" in wheel.read(names["METADATA"]).decode()


# --- the tree ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "LICENSE", "NOTICE", "Makefile", "Dockerfile"),
        *("constraints.txt", "pyproject.toml", ".dockerignore", ".gitignore", ".ci/run"),
        *("dpctl/__main__.py", "dpctl/cli.py", "export/__init__.py", "runtime/__init__.py"),
    ],
)
def test_a_stranger_finds_it(name: str) -> None:
    assert (ROOT / name).is_file()


def test_ci_can_be_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


def test_files_and_functions_are_short() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "check_sizes.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_no_module_has_a_name_that_says_nothing_or_hides_another() -> None:
    empty = {"utils.py", "helpers.py", "common.py", "misc.py"}
    shadows = {"onnx.py", "onnxruntime.py", "tensorrt.py", "torch.py", "types.py", "diffusers.py", "openvino.py"}
    assert [name_of(path) for path in sources() if path.name in empty | shadows] == []


def test_nothing_hides_the_package_export() -> None:
    found = [name_of(p) for p in sources() if "from torch import export" in p.read_text(encoding="utf-8")]
    assert found == []


def test_tests_are_no_packages() -> None:
    assert list((ROOT / "tests").rglob("__init__.py")) == []


def test_tests_mirror_the_tree_by_names_that_differ() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)


def test_every_module_has_its_place_in_the_layers() -> None:
    layers = next(c["layers"] for c in PROJECT["tool"]["importlinter"]["contracts"] if c["id"] == "layers")
    placed = {name.strip(" ()") for layer in layers for name in re.split(r"[|:]", layer)}
    modules = {f"dpctl.{path.stem}" for path in (ROOT / "dpctl").glob("*.py") if path.stem != "__init__"}
    modules |= {f"dpctl.{path.parent.name}" for path in (ROOT / "dpctl").glob("*/__init__.py")}
    assert modules - placed == set()


def test_pruned_unet_travels_with_torch_and_diffusers_only() -> None:
    tree = ast.parse((ROOT / "dpctl" / "pruned_unet.py").read_text(encoding="utf-8"))
    imported = {alias.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for alias in n.names}
    imported |= {(n.module or "").split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) <= {"torch", "diffusers"}


# --- versions ----------------------------------------------------------------------------------------------------


def plain(requirement: str) -> str:
    return re.split(r"[^A-Za-z0-9._-]", requirement)[0].lower().replace("_", "-")


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {plain(name): version for name, version in pairs}


def test_every_requirement_that_is_tested_is_pinned() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    wanted = [*PROJECT["project"]["dependencies"], *extras["cpu"], *extras["text"], *extras["dev"]]
    assert {plain(requirement) for requirement in wanted} - set(pins()) == set()


def test_the_tests_run_with_the_pinned_versions() -> None:
    installed = {name: (environment.version(name) or "none").split("+")[0] for name in pins()}
    if installed != pins():
        different = {name: found for name, found in installed.items() if found != pins()[name]}
        pytest.skip(f"not the versions of constraints.txt: {different}")


# --- documentation -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in REGISTRIES for name in registry.names(package)]
)
def test_every_registry_name_is_documented(package: str, name: str) -> None:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages if page.is_file())
    assert re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text), f"{name} of {package} is in no document"


# --- the command line --------------------------------------------------------------------------------------------


def imported_by(*arguments: str) -> set[str]:
    """Return the top-level names of all modules that a run of the command imports."""
    command = [sys.executable, "-X", "importtime", "-m", "dpctl", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().split(".")[0] for line in lines}


def test_help_imports_nothing_heavy() -> None:
    imported = imported_by("--help")
    assert "dpctl" in imported
    assert imported & HEAVY == set()


COMMANDS = ("prune", "finetune", "train", "export", "refit", "verify", "bench", "run", "sample", "inspect", "doctor")


@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_imports_nothing_heavy(command: str) -> None:
    assert imported_by(command, "--help") & HEAVY == set()
