import base64
import dataclasses
import io
import re
import shlex
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from dpctl import report
from dpctl.bench.document import read_result, write_result
from dpctl.bench.result import BenchResult
from dpctl.report import page, tables

Make = Callable[..., BenchResult]
VOID = {"meta", "link", "img", "input"}


class Page(HTMLParser):
    """What a browser would build: open tags must be closed, and every address is collected."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def shown(result: BenchResult, width: int = 140) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(report.table(result))
    return console.export_text()


def test_the_terminal_shows_every_subject_and_the_verdict(make_result: Make) -> None:
    text = shown(make_result(warnings=("the machine was busy",)))
    flowing = " ".join(text.split())
    assert page.verdicts(make_result())[0] in flowing
    assert text.count("eager") >= 4
    assert "1.50x" in text
    assert "10 [9.62, 10.4]" in text
    assert "warning: the machine was busy" in flowing
    assert "a short finetune of 100 steps (2.5 % of the training)" in flowing
    assert "24 samples per model" in flowing


def test_no_line_is_wider_than_the_terminal(make_result: Make) -> None:
    assert max(len(line) for line in shown(make_result(), 100).splitlines()) <= 100


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "It is faster, at a price in quality."),
        ({"fid": 10.1}, "no significant difference. It is faster, and no worse by these samples."),
        ({"fid": 8.0}, "It is faster, and no worse by these samples."),
        ({"speed": {1: 1.0, 8: 1.5}}, "It is faster at batch 8 only, at a price in quality."),
        ({"speed": {1: 1.0, 8: 0.8}}, "It is not faster."),
        ({"quality": ()}, "It is faster; its quality was not judged."),
    ],
)
def test_the_verdict_says_what_was_bought(given: dict[str, Any], said: str, make_result: Make) -> None:
    verdict = page.verdicts(make_result(**given))[0]
    assert verdict.startswith("slim takes 50.0 % of reference's MACs; its speed in ort, relative to reference, is ")
    assert verdict.endswith(said)


def test_an_interval_that_holds_one_is_no_difference(make_result: Make) -> None:
    result = make_result(speed={1: 1.0, 8: 1.5})
    assert "not significantly different" in page.verdicts(result)[0]
    cells = [cell for row in tables.speed(result).rows for cell in row]
    assert sum(cell.startswith("no significant difference [") for cell in cells) == 3  # slim / eager against itself too


def test_a_model_from_random_weights_is_called_that(make_result: Make) -> None:
    result = make_result()
    slim = result.models[1]
    scratch = {**slim.lineage[-1], "recipe": {"steps": 100, "from_scratch": True}}
    result = dataclasses.replace(
        result, models=(result.models[0], dataclasses.replace(slim, lineage=(*slim.lineage[:-1], scratch)))
    )
    assert any("trained from random weights for 100 steps" in line for line in page.labels(result))


def test_the_page_needs_nothing_but_itself(make_result: Make, out: Path) -> None:
    report.write_report(make_result(), out)
    text = (out / "report.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert parsed.open == []
    assert re.findall("<script[^>]*>", text) == ["<script>"]
    assert "default-src 'none'; img-src data:" in text
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses)
    assert "url(" not in re.sub(r"url\(#\w+\)", "", text)
    assert "@import" not in text
    for said in ("Pictures, 20 steps", "dpctl run --out demo", "a processor", "diff-pruning", "prefers-color-scheme"):
        assert said in text


def test_names_cannot_break_the_page(make_result: Make, out: Path) -> None:
    result = make_result()
    bad = "<script>alert(1)</script>|x"
    models = (result.models[0], dataclasses.replace(result.models[1], name=bad))
    subjects = tuple(s if s.model == "reference" else dataclasses.replace(s, model=bad) for s in result.subjects)
    quality = (result.quality[0], dataclasses.replace(result.quality[1], model=bad))
    report.write_report(dataclasses.replace(result, models=models, subjects=subjects, quality=quality), out)
    assert Page((out / "report.html").read_text(encoding="utf-8")).tags.count("script") == 1
    rows = [line for line in (out / "report.md").read_text(encoding="utf-8").splitlines() if bad[:8] in line]
    assert any(line.startswith("| <script>alert(1)</script>\\|x |") for line in rows)


def test_the_same_noise_stands_in_one_column_the_baseline_above(make_result: Make, out: Path) -> None:
    report.write_report(make_result(), out)
    uris = re.findall(r'src="data:image/png;base64,([^"]+)"', (out / "report.html").read_text(encoding="utf-8"))
    tiles = [np.array(Image.open(io.BytesIO(base64.b64decode(uri)))) for uri in uris]
    assert {tile.shape for tile in tiles} == {(8, 8)}
    assert [set(tile.flat) for tile in tiles] == [{first + column} for first in (0, 100) for column in range(20)]
    sheet = np.array(Image.open(out / "samples-20-steps.png"))
    assert (sheet[0, 0], sheet[12, 0]) == (0, 100)


def test_markdown_says_the_same_and_its_pictures_are_there(make_result: Make, out: Path) -> None:
    report.write_report(make_result(), out)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert page.verdicts(make_result())[0] in text
    for name in re.findall(r"!\[\w+\]\(([^)]+)\)", text):
        assert (out / name).is_file()
    widths = {line.count("|") for line in re.findall(r"## Speed\n\n((?:\|.*\n)+)", text)[0].splitlines()}
    assert widths == {10}


def test_what_a_training_drew_is_shown_and_stays_when_the_model_is_gone(
    make_result: Make, out: Path, tmp_path: Path
) -> None:
    slim = tmp_path / "slim"
    slim.mkdir()
    Image.new("L", (40, 20), 77).save(slim / "progress.png")
    drawn = (slim / "progress.png").read_bytes()
    plain, model = make_result().models
    result = make_result(models=(plain, dataclasses.replace(model, source=str(slim))))
    for _ in range(2):
        report.write_report(result, out)
        assert (out / "progress-1.png").read_bytes() == drawn
        assert (
            "![samples of slim while it was trained, from the same noise: a row each, the last one below]("
            "progress-1.png)" in (out / "report.md").read_text(encoding="utf-8")
        )
        html = (out / "report.html").read_text(encoding="utf-8")
        assert Page(html).open == []
        assert f'<img src="data:image/png;base64,{base64.b64encode(drawn).decode()}" alt="samples of slim while' in html
        (slim / "progress.png").unlink(missing_ok=True)


def test_it_is_a_function_of_the_file(make_result: Make, out: Path) -> None:
    names = ("report.md", "report.html", "latency.svg", "samples-20-steps.png")
    report.write_report(make_result(), out)
    first = [(out / name).read_bytes() for name in names]
    write_result(make_result(), out)
    report.write_report(read_result(out / "bench.json"), out)
    assert [(out / name).read_bytes() for name in names] == first


def test_without_samples_and_candidates_there_is_still_a_page(make_result: Make, out: Path) -> None:
    result = make_result()
    alone = make_result(models=result.models[:1], subjects=result.subjects[:2], quality=(), features=None)
    report.write_report(alone, out)
    assert Page((out / "report.html").read_text(encoding="utf-8")).open == []
    assert "Only the baseline" in (out / "report.md").read_text(encoding="utf-8")
    assert shown(alone)


def test_a_subject_without_turns_leaves_the_chart_whole(make_result: Make, out: Path) -> None:
    result = make_result()
    dead = dataclasses.replace(result.subjects[-1], turns=(), failure="it died")
    report.write_report(make_result(subjects=(*result.subjects[:-1], dead)), out)
    assert "slim / ort" in (out / "latency.svg").read_text(encoding="utf-8")
    assert "in eager" in page.verdicts(make_result(subjects=(*result.subjects[:-1], dead)))[0]


@pytest.mark.parametrize("more", [{}, {"features": "it's.onnx", "real_images": "real.npz", "clip": "clip"}])
def test_the_command_measures_the_same_again(
    more: dict[str, str], make_result: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from dpctl import chain, cli
    from dpctl.recipe import BenchRecipe, to_dict

    asked: list[BenchRecipe] = []

    def bench(recipe: BenchRecipe, *_: Any, **__: Any) -> None:
        asked.append(recipe)
        raise SystemExit(0)

    monkeypatch.setattr(chain, "bench", bench)
    recipe = make_result().recipe | more
    words = shlex.split(page.repeat_command(make_result(recipe=recipe)))
    assert words[0] == "dpctl"
    CliRunner().invoke(cli.app, words[1:])
    assert to_dict(asked[0]) == recipe | {"threads": 2}


def test_the_environment_says_what_the_gpu_s_clock_did(make_result: Make, full_result: BenchResult) -> None:
    state = {"clock_hz": 1_980_000_000, "highest_clock_hz": 1_980_000_000, "held_back_by": []}
    slower = state | {"clock_hz": 1_410_000_000, "held_back_by": ["SwPowerCap"]}
    for states, said in (([state], "1.98GHz"), ([state, slower], "1.41G to 1.98GHz, held back by SwPowerCap")):
        result = make_result(environment=make_result().environment | {"gpu_states": {"slim / eager": states}})
        assert dict(page.environment(result))["GPU clock"] == said
    assert "GPU clock" not in dict(page.environment(make_result()))
    assert dict(page.environment(full_result))["large matrix product, float32"] == "400G to 500GFLOP/s"
