"""The pictures of channel groups: in the page and in Markdown where the manifests tell, and as files of their own."""

import dataclasses
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from matplotlib.colors import to_hex
from PIL import Image

from dpctl import report
from dpctl.bench.result import BenchResult
from dpctl.errors import DpctlError
from dpctl.report import architecture, charts

Make = Callable[..., BenchResult]
WIDTHS = {"up_blocks.0.resnets.0.conv1": (64, 16), "conv_in": (32, 24), "mid_block.resnets.0.conv1": (64, 64)}
SCAN = {
    "base_loss": 0.1,
    "fractions": [0.25, 0.5],
    "measured_on": {"data": "reference", "images": 8, "timesteps": [125, 375], "align": 8, "seed": 0},
    "rows": [
        {"group": "conv_in", "block": "conv_in", "width": 32, "kept": 24, "loss": 0.11},
        {"group": "conv_in", "block": "conv_in", "width": 32, "kept": 16, "loss": 0.2},
        {"group": "mid_block.resnets.0.conv1", "block": "mid_block", "width": 64, "kept": 48, "loss": 0.0999},
    ],
}


def written(make_result: Make, out: Path, *slim: dict[str, Any]) -> tuple[str, str, set[str]]:
    """Write the report of candidates that have these entries; return page, Markdown and the names of pictures."""
    base, candidate = make_result().models
    models = [dataclasses.replace(candidate, name=f"slim {i}", **entries) for i, entries in enumerate(slim)]
    report.write_report(make_result(models=(base, *models), subjects=(), quality=()), out)
    names = {path.name for path in out.iterdir() if path.suffix == ".svg"} - {"latency.svg"}
    return (out / "report.html").read_text(), (out / "report.md").read_text(), names


def test_without_widths_and_scan_there_are_no_pictures_of_them(make_result: Make, out: Path) -> None:
    page, markdown, names = written(make_result, out, {})
    assert names == set()
    assert "Widths" not in page + markdown
    assert "Sensitivity" not in page + markdown


def test_page_and_markdown_show_the_pictures(make_result: Make, out: Path) -> None:
    page, markdown, names = written(make_result, out, {"widths": WIDTHS, "sensitivity": SCAN})
    assert names == {"widths-1.svg", "sensitivity-1.svg"}
    for name, title in (("widths-1.svg", "Widths"), ("sensitivity-1.svg", "Sensitivity")):
        assert f"]({name})" in markdown
        assert f"## {title}\n" in markdown
        assert f">{title}</h2>" in page
    assert 'aria-label="widths before and after"' in page
    assert 'aria-label="rise of the loss by group"' in page
    assert "8 images of reference with fixed noise, each at the timesteps 125, 375" in page
    HTMLParser().feed(page)
    assert page.count("<svg") == page.count("</svg>") == 2
    assert charts.INK not in page


def test_what_is_alike_is_drawn_once_and_a_single_entry_by_itself(make_result: Make, out: Path) -> None:
    tuned, scratch, other = {"widths": WIDTHS}, {"widths": WIDTHS}, {"widths": {"conv_in": (32, 8)}}
    page, _, names = written(make_result, out, tuned, scratch, other, {"sensitivity": SCAN})
    assert names == {"widths-1.svg", "widths-3.svg", "sensitivity-4.svg"}
    assert "slim 0 and slim 1" in page


def bars_of(figure: Any) -> list[tuple[float, float]]:
    return [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in figure.axes[0].patches]


def test_bars_are_as_high_as_the_widths_in_the_order_of_data() -> None:
    figure = architecture.widths(WIDTHS)
    before, after = bars_of(figure)[:3], bars_of(figure)[3:]
    assert [height for _, height in before] == [32, 64, 64]
    assert [height for _, height in after] == [24, 64, 16]
    assert [place for place, _ in before] == pytest.approx([place for place, _ in after])
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [
        *("conv_in", "mid_block.resnets.0.conv1", "up_blocks.0.resnets.0.conv1")
    ]


def test_dots_stand_at_the_rise_of_the_loss() -> None:
    figure = architecture.reactions(SCAN)
    dots = {
        scatter.get_label(): (to_hex(scatter.get_facecolor()[0]), scatter.get_offsets()[:, 1].tolist())
        for scatter in figure.axes[0].collections
    }
    assert dots["25 % cut"] == (charts.COLOURS[0], pytest.approx([0.1, architecture.FLOOR]))
    assert dots["50 % cut"] == (charts.COLOURS[1], pytest.approx([1.0]))


def overlaps(figure: Any) -> list[str]:
    figure.canvas.draw()
    labels = [label for label in figure.axes[0].get_xticklabels() if label.get_text()]
    boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.x0)
    return [f"{left} {right}" for left, right in zip(boxes, boxes[1:], strict=False) if left.x1 > right.x0]


@pytest.mark.parametrize("layers", [1, 4, 6, 10, 40])
def test_labels_do_not_overlap_however_many_groups_there_are(layers: int) -> None:
    blocks = [*(f"down_blocks.{i}" for i in range(4)), "mid_block", *(f"up_blocks.{i}" for i in range(4))]
    names = [f"{block}.attentions.{i}.transformer_blocks.0.attn1.to_v" for block in blocks for i in range(layers)]
    names += ["conv_in", "time_embedding.linear_1", "add_embedding.linear_1"]
    figure = architecture.widths(dict.fromkeys(names, (320, 160)))
    assert overlaps(figure) == []
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert len(labels) == (len(names) if len(names) <= architecture.NAMED else len(blocks) + 3)


def test_a_name_that_looks_like_a_formula_or_markup_is_shown_as_it_is(tmp_path: Path) -> None:
    architecture.write(tmp_path / "a.svg", {"widths": {r"$\frac{<b>": [8, 4]}}, None)
    assert r"$\frac{&lt;b&gt;" in (tmp_path / "a.svg").read_text()


# --- files of their own ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scan", [None, SCAN])
def test_a_picture_is_an_svg_or_a_png_and_the_same_every_time(tmp_path: Path, scan: Any) -> None:
    for name in ("a.svg", "a.png"):
        for folder in ("one", "other"):
            (tmp_path / folder).mkdir(exist_ok=True)
            architecture.write(tmp_path / folder / name, {"widths": WIDTHS}, scan)
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()
    assert re.search(r"<svg.*conv_in.*</svg>", (tmp_path / "one" / "a.svg").read_text(), re.DOTALL)
    with Image.open(tmp_path / "one" / "a.png") as picture:
        assert picture.width == 1500
        assert len(picture.convert("RGB").getcolors(maxcolors=2**20) or []) > 10


@pytest.mark.parametrize(
    ("name", "stats", "said"),
    [
        ("a.pdf", {"widths": WIDTHS}, "unknown kind"),
        ("a", {"widths": WIDTHS}, "unknown kind"),
        ("taken.svg", {"widths": WIDTHS}, "exists"),
        ("missing/a.svg", {"widths": WIDTHS}, "folder does not exist"),
        ("a.svg", {}, "no widths to draw"),
    ],
)
def test_a_picture_that_cannot_be_is_explained(tmp_path: Path, name: str, stats: Any, said: str) -> None:
    (tmp_path / "taken.svg").write_text("mine")
    with pytest.raises(DpctlError, match=said):
        architecture.write(tmp_path / name, stats, None)
    assert (tmp_path / "taken.svg").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["taken.svg"]
