"""A folder is a registry: names come from file names, and a wrong one gets a hint."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpctl import registry
from dpctl.errors import DpctlError

ROOT = Path(__file__).resolve().parent.parent
REGISTRIES = {"dpctl.prune.criteria": "criterion", "runtime.backends": "backend", "dpctl.bench.metrics": "metric"}


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Yield a folder `shelf` of three entries, beside a `dpctl` that the registry believes to live in."""
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    for name in ("__init__.py", "_private.py", "plain.py", "two_words.py", "notes.md"):
        (shelf / name).write_text("value = 1\n")
    (shelf / "folder").mkdir()
    monkeypatch.setattr(registry, "__file__", str(tmp_path / "dpctl" / "registry.py"))
    registry.names.cache_clear()
    yield shelf
    registry.names.cache_clear()


def test_names_are_the_public_files(house: Path) -> None:
    assert registry.names("shelf") == ("plain", "two-words")


def test_a_known_name_passes(house: Path) -> None:
    assert registry.check("shelf", "two-words", "entry") == "two-words"


@pytest.mark.parametrize("name", ["plane", "two_words", "two-word"])
def test_a_near_name_gets_a_hint(house: Path, name: str) -> None:
    near = "plain" if name == "plane" else "two-words"
    with pytest.raises(DpctlError, match=rf"unknown entry[\s\S]*{name}[\s\S]*did you mean {near}\?"):
        registry.check("shelf", name, "entry")


@pytest.mark.parametrize("name", ["", "zzz", "__init__", "_private", "../dpctl", "os"])
def test_a_wrong_name_lists_the_right_ones(house: Path, name: str) -> None:
    with pytest.raises(DpctlError, match="choose one of: plain, two-words"):
        registry.check("shelf", name, "entry")


def test_load_imports_the_file(house: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(house.parent)
    module = registry.load("shelf", "two-words", "entry")
    assert module.__name__ == "shelf.two_words"
    assert module.value == 1


def test_load_imports_nothing_by_a_wrong_name() -> None:
    with pytest.raises(DpctlError, match="unknown backend"):
        registry.load("runtime.backends", "os", "backend")


@pytest.mark.parametrize("package", REGISTRIES)
def test_the_registries_of_the_house_have_entries(package: str) -> None:
    assert registry.names(package)


@pytest.mark.parametrize(
    ("package", "name"), [(package, name) for package in REGISTRIES for name in registry.names(package)]
)
def test_every_entry_loads_and_says_what_it_is(package: str, name: str) -> None:
    module = registry.load(package, name, REGISTRIES[package])
    assert (module.__doc__ or "").strip()


def test_asking_for_names_imports_nothing_heavy() -> None:
    asked = "; ".join(f"registry.names({package!r})" for package in REGISTRIES)
    program = f"import sys; from dpctl import registry; {asked}; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
