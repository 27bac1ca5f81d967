"""The image says what it is: its command exists, and its versions belong together as docs/docker.md has it."""

import json
import re
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from typer.testing import CliRunner

from dpctl.cli import app

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# `| `torch` | 2.13.0 | 13.0 | its wheel ...`: name, version, CUDA.
ROW = re.compile(r"^\| `([\w/-]+)` \| ([\w.-]+) \| ([\d.]+) \|", re.MULTILINE)


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions, comments left out and continued lines joined."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def last(instruction: str) -> str:
    return [rest for word, rest in instructions() if word == instruction][-1]


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def table() -> dict[str, tuple[str, str]]:
    """Return the documented versions: name -> version, CUDA."""
    rows = ROW.findall((ROOT / "docs" / "docker.md").read_text(encoding="utf-8"))
    return {name: (version, cuda) for name, version, cuda in rows}


def requirements() -> list[Requirement]:
    """Return what the image may be built with: the base and the extras of a GPU machine."""
    named = [*PROJECT["dependencies"], *EXTRAS["gpu"], *EXTRAS["rtx"], *EXTRAS["text"]]
    return [Requirement(text) for text in named]


# --- the command -------------------------------------------------------------------------------------------------


def test_by_default_the_doctor_looks_at_the_machine() -> None:
    assert json.loads(last("ENTRYPOINT")) == ["dpctl"]
    assert "dpctl" in PROJECT["scripts"]
    outcome = CliRunner().invoke(app, json.loads(last("CMD")), catch_exceptions=False)
    assert outcome.exit_code == 0
    assert "What this machine can do" in outcome.stdout


def test_it_serves_nothing_and_is_not_root() -> None:
    words = [word for word, _ in instructions()]
    assert {"HEALTHCHECK", "EXPOSE"} & set(words) == set()
    assert last("USER") not in {"root", "0"}
    assert "USER" in words[words.index("ARG") :]  # whatever is installed belongs to root


def test_its_extras_exist_and_hold_one_onnxruntime() -> None:
    chosen = last("ARG").removeprefix("EXTRAS=").split(",")
    assert set(chosen) <= set(EXTRAS)
    assert len({"cpu", "gpu"} & set(chosen)) == 1
    assert "dev" not in chosen


def test_what_is_copied_reaches_the_builder() -> None:
    passed = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    assert {"constraints.txt", "constraints-gpu.txt"} <= set(copied)
    for name in {*copied, *PROJECT["license-files"], PROJECT["readme"]} - {"."}:
        assert f"!{name}" in passed
        assert (ROOT / name).is_file()


# --- the versions ------------------------------------------------------------------------------------------------


def test_no_extra_asks_for_both_builds_of_onnxruntime() -> None:
    for name, asked in EXTRAS.items():
        builds = {Requirement(text).name for text in asked} & {"onnxruntime", "onnxruntime-gpu"}
        assert builds == {"cpu": {"onnxruntime"}, "gpu": {"onnxruntime-gpu"}}.get(name, set()), name


def test_the_two_constraint_files_agree() -> None:
    plain, gpu = pins("constraints.txt"), pins("constraints-gpu.txt")
    assert {name: gpu[name] for name in plain.keys() & gpu.keys()} == {
        name: plain[name] for name in plain.keys() & gpu.keys()
    }


@pytest.mark.parametrize("requirement", requirements(), ids=str)
def test_every_pin_is_in_the_range_of_the_project(requirement: Requirement) -> None:
    pinned = pins("constraints.txt") | pins("constraints-gpu.txt")
    assert pinned[requirement.name.lower().replace("_", "-")] in requirement.specifier


def test_the_documented_versions_are_the_pinned_ones() -> None:
    pinned = pins("constraints.txt") | pins("constraints-gpu.txt")
    documented = table()
    assert {"torch", "onnxruntime-gpu", "tensorrt", "tensorrt-rtx", "nvidia-cudnn-cu13"} <= set(documented)
    image, _ = documented.pop("nvidia/cuda")
    assert last("FROM") == f"nvidia/cuda:{image}"
    assert {name: version for name, (version, _) in documented.items()} == {name: pinned[name] for name in documented}


def test_everything_is_built_for_the_cuda_of_the_image() -> None:
    documented = table()
    major = str(Version(documented["nvidia/cuda"][0].partition("-")[0]).major)
    assert {name: cuda.partition(".")[0] for name, (_, cuda) in documented.items()} == dict.fromkeys(documented, major)
    # torch's own packages carry CUDA's version, the others its major version in their name.
    pinned = pins("constraints-gpu.txt")
    assert Version(pinned["cuda-toolkit"]).release[:2] == Version(pinned["nvidia-cuda-runtime"]).release[:2]
    assert documented["nvidia/cuda"][0].startswith(Version(pinned["cuda-toolkit"]).base_version.removesuffix(".0"))
    flavors = {name: found[1] for name in pinned if (found := re.search(r"-cu(\d+)\b", name))}
    assert len(flavors) >= 4
    assert set(flavors.values()) == {major}


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_the_installed_package_is_of_the_documented_flavor(name: str) -> None:
    version, cuda = table()[name]
    try:
        found = metadata.distribution(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    if found.version != version:
        pytest.skip(f"{name} {found.version} is installed, {version} is documented")
    flavors = [Requirement(text).name.replace("_", "-") for text in found.requires or ()]
    assert flavors == [f"{name}-cu{cuda}"]
