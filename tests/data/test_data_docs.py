"""What docs/data.md shows is executed: its files are written, its code runs, its sources open."""

import re
from pathlib import Path

import pytest
from PIL import Image

from dpctl.data import open_data

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
INDENTED = re.findall(r"^    (\S.*)$", PAGE, re.MULTILINE)
SOURCES = [line.split(" --data ")[1].split()[0] for line in INDENTED if line.startswith("dpctl ")]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.fixture
def _shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the files that the page shows into an empty folder, and go there."""
    monkeypatch.chdir(tmp_path)
    names = [line for line in INDENTED if line.endswith(".png")]
    assert len(names) == 5
    for shade, name in enumerate(names):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (50 * shade, 0, 0)).save(name)
    (metadata,) = blocks("json")
    Path("photos/metadata.jsonl").write_text(metadata)


def run(code: str) -> None:
    if "import datasets" in code:
        pytest.importorskip("datasets", reason="the library datasets is missing (extra [data])").disable_progress_bars()
    exec(compile(code, "docs/data.md", "exec"), {})


@pytest.mark.usefixtures("_shown")
@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_code_runs(number: int) -> None:
    run(blocks("python")[number])


@pytest.mark.usefixtures("_shown")
@pytest.mark.parametrize("source", SOURCES)
def test_the_sources_open(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if source.startswith("datasets:"):
        library = pytest.importorskip("datasets", reason="the library datasets is missing (extra [data])")
        monkeypatch.setattr(library.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        library.disable_progress_bars()
    for code in blocks("python"):
        if source in code:
            run(code)
    images = open_data(source, channels=3, size=(32, 32))
    expected = {"photos": 2, "saved": 2, "digits.npz": 100}.get(source, 3)
    assert len(images) == expected
    if source in ("photos", "saved"):
        assert images.captions([0])[0].startswith("a red bicycle")
    else:
        assert images.classes == (10 if source == "digits.npz" else 2)


def test_every_kind_of_source_is_shown() -> None:
    assert SOURCES == ["insects", "photos", "digits.npz", "saved", "datasets:insects", "datasets:insects:train"]
