"""What the README says is executed: its commands run, in order, on a toy in an empty folder."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from dpctl.cli import app

README = Path(__file__).parent.parent / "README.md"
SHORTER = {
    "--steps 2000": "--steps 2 --batch-size 4",
    "tuned --out report": "tuned --out report --rounds 2 --samples 8",
}


def commands() -> list[str]:
    """Return the commands of the section "Use it on your model"."""
    section = README.read_text(encoding="utf-8").split("## Use it on your model")[1].split("\n## ")[0]
    return re.findall(r"^    dpctl (.+)$", section, re.MULTILINE)


def test_the_commands_run_as_written(
    toy_pipeline: Path, toy_images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("path/to").mkdir(parents=True)
    Path("path/to/model").symlink_to(toy_pipeline)
    lines = commands()
    assert [line.split()[0] for line in lines] == ["prune", "finetune", "export", "bench"]
    for line in lines:
        for long, short in SHORTER.items():
            line = line.replace(long, short)
        line = line.replace("path/to/images", str(toy_images))
        outcome = CliRunner().invoke(app, shlex.split(line), catch_exceptions=False)
        assert outcome.exit_code == 0, outcome.output
    assert Path("report/report.html").is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README.read_text(encoding="utf-8")))))
def test_links_lead_somewhere(target: str) -> None:
    assert (README.parent / target).exists()
