"""`dpctl inspect`: what it says is what the files say."""

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from safetensors.torch import load_file

from dpctl import artifact
from dpctl.blocks import within
from dpctl.errors import DpctlError
from dpctl.inspect import Report, inspect, parity_report, report
from dpctl.prune import prune
from dpctl.recipe import PruneRecipe


@pytest.fixture(scope="module")
def pruned(toy_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model pruned twice. Shared: copy it before changing a file."""
    directory = tmp_path_factory.mktemp("inspect")
    prune(str(toy_pipeline), directory / "once", PruneRecipe("magnitude", target_macs=0.7))
    prune(str(directory / "once"), directory / "twice", PruneRecipe("random", target_params=0.5))
    return directory / "twice"


def shown(found: Report) -> str:
    """Return what the command prints for people."""
    stream = io.StringIO()
    console = Console(file=stream, markup=False, width=800, color_system=None)
    for renderable in found.renderables:
        console.print(renderable)
    return stream.getvalue()


def parameters(directory: Path) -> int:
    tensors = load_file(directory / "unet" / "diffusion_pytorch_model.safetensors")
    return sum(tensor.numel() for tensor in tensors.values())


def test_a_foreign_model_is_counted(toy_pipeline: Path) -> None:
    found = inspect(str(toy_pipeline))
    assert (found.json["kind"], found.json["lineage"]) == ("foreign", [])
    assert found.json["stats"]["params"] == parameters(toy_pipeline)
    weights = toy_pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    assert found.json["stats"]["bytes"] == weights.stat().st_size
    assert found.json["digest"] == artifact.digest(artifact.hash_files(toy_pipeline))
    assert found.json["directory"] == str(toy_pipeline)
    assert "(foreign, " in shown(found)
    assert "params" in shown(found)
    json.dumps(found.json)


def test_an_artifact_is_described_from_its_manifest(pruned: Path) -> None:
    found = inspect(str(pruned))
    assert found.json == {
        **json.loads((pruned / "dpctl.json").read_text()),
        "digest": artifact.digest(artifact.hash_files(pruned)),
        "directory": str(pruned),
    }
    assert found.json["stats"]["params"] == parameters(pruned)
    assert [entry["kind"] for entry in found.json["lineage"]] == ["foreign", "pruned"]


def test_people_see_figures_lineage_and_widths(pruned: Path, toy_pipeline: Path) -> None:
    text = shown(inspect(str(pruned)))
    manifest = artifact.read_manifest(pruned)
    assert manifest is not None
    share = manifest.stats["params"] / parameters(toy_pipeline)
    assert f"({100 * share:.1f} % of the unpruned" in text
    assert "target params 0.5" in text
    assert f"params {share:.4f}" in text
    for entry in manifest.lineage:
        assert entry["digest"][:12] in text
    assert "this directory" in text


def test_every_group_is_drawn_with_its_widths(pruned: Path) -> None:
    manifest = artifact.read_manifest(pruned)
    assert manifest is not None
    drawn = shown(inspect(str(pruned))).partition("widths per block")[2]
    for name, (before, after) in manifest.stats["widths"].items():
        assert re.search(rf"^ *{re.escape(within(name) or name)} +{before} -> {after} ", drawn, re.MULTILINE), name
    assert "left alone, it is the network's output: conv_out" in drawn


def test_a_model_that_was_not_pruned_has_no_widths_to_draw(toy_pipeline: Path) -> None:
    assert " -> " not in shown(inspect(str(toy_pipeline)))


def test_a_scan_of_the_model_itself_is_shown_and_told(pruned: Path) -> None:
    scan = {
        "base_loss": 0.1,
        "fractions": [0.5],
        "measured_on": {"data": "d", "images": 1, "timesteps": [1], "align": 8, "seed": 0},
        "rows": [{"group": "conv_in", "block": "conv_in", "width": 32, "kept": 16, "loss": 0.3}],
    }
    found = inspect(str(pruned), scan)
    assert found.json["stats"]["sensitivity"] == scan
    assert "+200 %" in shown(found)
    assert "sensitivity" not in inspect(str(pruned)).json["stats"]


def of_stats(**stats: Any) -> str:
    """Return what is printed of a pruned model with these figures."""
    return shown(report(artifact.Manifest(kind="pruned", recipe={}, stats=stats, files={}), Path("x")))


@pytest.mark.parametrize(
    ("used", "compensated", "expected"),
    [
        (True, {"compensated": 0.1382}, "│ compensated │ denoising loss 0.165 -> 0.138, unpruned 0.127 │"),
        (False, {"compensated": 0.2}, "│ not compensated │ denoising loss 0.165 -> 0.2, unpruned 0.127 │"),
        (False, {}, "│ not compensated │ denoising loss 0.165 -> not finite, unpruned 0.127 │"),
    ],
)
def test_compensation_is_a_line(used: bool, compensated: dict[str, float], expected: str) -> None:
    loss = {"unpruned": 0.1274, "cut": 0.1649} | compensated
    assert expected in of_stats(compensation={"used": used, "loss": loss})


def test_what_the_cut_did_to_norms_is_a_line_each_however_many() -> None:
    one = of_stats(in_parts={"conv_in": "a reason"}, regrouped_norms={"a.norm1": 0.125})
    assert re.search(r"│ cut in parts +│ conv_in \(a reason\) +│", one)
    assert re.search(r"│ norms regrouped +│ a\.norm1 \(12\.5 % of its channels\) +│", one)
    reasons, moved = {f"g{i}.conv": "a reason" for i in range(100)}, {f"n{i}.norm": i / 100 for i in range(1, 100)}
    many = of_stats(in_parts=reasons, regrouped_norms=moved)
    assert "g0.conv (a reason), " in many
    assert ", and 96 more" in many
    assert "norms regrouped │ n99.norm (99.0 % of its channels), n98.norm" in many  # the most first
    assert ", and 95 more" in many
    assert len(many.splitlines()) == len(one.splitlines())
    none = of_stats(in_parts={}, regrouped_norms={})
    assert not {"parts", "regrouped", "compensated"} & set(none.split())


def test_a_changed_file_is_refused(pruned: Path, tmp_path: Path) -> None:
    shutil.copytree(pruned, tmp_path / "copy")
    (tmp_path / "copy" / "unet" / "config.json").write_text("{}")
    with pytest.raises(DpctlError, match="differs from its digest"):
        inspect(str(tmp_path / "copy"))


@pytest.mark.parametrize("name", ["missing", "no-such-owner/no-such-model"])
def test_what_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(DpctlError):
        inspect(name)


@pytest.mark.parametrize("name", ["[red]x", "a[/b]", "[link=x]y"])
def test_a_name_that_looks_like_markup_is_shown_as_it_is(tmp_path: Path, name: str) -> None:
    with artifact.writing(tmp_path / name.replace("/", "_")) as directory:
        manifest = artifact.write_manifest(
            directory,
            kind="pruned",
            recipe={"data": name},
            stats={"params": 10, "widths": {"conv_in": [8, 4]}, "left_alone": {name: "a reason"}},
            **artifact.descent(None, "0" * 64, name),
        )
    text = shown(report(manifest, Path(name)))
    assert text.count(name) == 4


@pytest.mark.parametrize(("verdict", "style"), [("passed", "green"), ("failed", "red")])
def test_a_verdict_is_said_in_words_and_colour(verdict: str, style: str) -> None:
    parity: dict[str, Any] = {
        "verdict": verdict,
        "worst": {"timestep": 7.0, "tensor": "mid_block/Conv", "finite": False},
        "checks": {
            "grid": {"verdict": "failed", "error": 1.234e-3, "allowed": 1e-4},
            "sampling": {"verdict": "passed", "ssim": 0.99951, "at_least": 0.999, "steps": 8},
            "device": {"verdict": "not run here", "reason": "no GPU"},
        },
    }
    found = parity_report(parity)
    assert found.json == parity
    assert shown(found) == (
        f"parity {verdict}; worst at timestep 7, tensor mid_block/Conv, NaN or Inf\n"
        "  grid      failed: error 1.2e-03, allowed 1.0e-04\n"
        "  sampling  passed: SSIM 0.9995, at least 0.9990; 8 steps of DDIM\n"
        "  device    not run here: no GPU\n"
    )
    assert shown(parity_report({"verdict": verdict})) == f"parity {verdict}\n"


def test_an_artifact_with_a_verdict_shows_it(tmp_path: Path) -> None:
    with artifact.writing(tmp_path / "out") as directory:
        artifact.write_manifest(
            directory, kind="exported", recipe={}, stats={}, parity={"verdict": "passed", "worst": {"timestep": 5.0}}
        )
    assert "parity passed; worst at timestep 5" in shown(inspect(str(tmp_path / "out")))


def test_a_trained_model_shows_its_steps_and_loss(tmp_path: Path) -> None:
    with artifact.writing(tmp_path / "out") as directory:
        artifact.write_manifest(directory, kind="trained", recipe={}, stats={"steps": 300, "loss": 0.123456})
    assert "300 steps, loss of the last 50: 0.1235" in shown(inspect(str(tmp_path / "out")))
