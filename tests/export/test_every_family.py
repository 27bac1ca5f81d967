"""Every family of UNets that can be pruned can be exported, pruned or not, at sizes other than its own."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from diffusers import DDIMScheduler

from dpctl import artifact
from dpctl.models import load_model, write_pipeline
from dpctl.prune import prune
from dpctl.recipe import ExportRecipe, PruneRecipe
from dpctl.signature import of_unet
from export import export_model
from runtime import open_denoiser
from runtime.network import Network

# One that takes texts always; an export takes about ten seconds.
ALWAYS = ("stable-diffusion",)
NAMES = (
    "ddpm", "ldm", "class-conditional", "ncsnpp", "resnet-resampling", "scale-shift",
    "stable-diffusion", "sdxl", "inpainting", "latent-consistency",
)  # fmt: skip
CASES = [
    pytest.param(name, pruned, marks=() if name in ALWAYS and pruned else pytest.mark.slow, id=f"{name}-{pruned}")
    for name in NAMES
    for pruned in ("pruned", "")
]


def test_no_family_is_forgotten(families: dict[str, Any]) -> None:
    assert set(NAMES) == set(families)


@pytest.mark.parametrize(("name", "pruned"), CASES)
def test_a_family_passes_the_gate_at_sizes_of_its_own_and_others(
    name: str, pruned: str, families: dict[str, Callable[[], Any]], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    write_pipeline(source, unet=families[name](), scheduler=DDIMScheduler(clip_sample=False))
    if pruned:
        prune(str(source), tmp_path / "slim", PruneRecipe(criterion="magnitude", ratio=0.5))
        source = tmp_path / "slim"
    model = load_model(source)

    manifest = export_model(model, tmp_path / "out", ExportRecipe(batch=(1, 2, 3), size=(8, 8, 16)))

    parity = manifest.parity or {}
    verdicts = {check: found["verdict"] for check, found in parity["checks"].items()}
    assert verdicts["grid"] == verdicts["other size"] == "passed"
    guided = model.unet.config.get("cross_attention_dim") is not None
    assert verdicts["guidance"] == ("passed" if guided else "not run here")
    assert verdicts["sampling"] == ("not run here" if name in ("inpainting", "scale-shift") else "passed")
    assert "tensor" in parity["worst"]
    _runs_at_a_size_of_its_own(model, tmp_path / "out")
    _has_the_names_of_its_modules(model, tmp_path / "out")


def _runs_at_a_size_of_its_own(model: Any, directory: Path) -> None:
    signature = of_unet({**model.unet.config, "_class_name": type(model.unet).__name__}, (1, 2, 3), (8, 8, 16))
    torch.manual_seed(0)
    given = {
        tensor.name: torch.randint(0, 3, tensor.at(3))
        if tensor.dtype == "int64"
        else torch.randn(tensor.at(3, (12, 8)))
        for tensor in signature.inputs
    }
    given["timestep"] = torch.tensor([1.0, 7.5, 99.0])
    with torch.no_grad():
        expected = Network(model.unet)(**given)
    with open_denoiser(directory, "ort") as denoiser:
        torch.testing.assert_close(denoiser(**given), expected, rtol=1e-3, atol=1e-4)


def _has_the_names_of_its_modules(model: Any, directory: Path) -> None:
    graph = onnx.load(directory / "unet/model.fp32.onnx").graph
    modules = {name for name, _ in model.unet.named_modules()}
    names = [node.name for node in graph.node]
    assert len(set(names)) == len(names)
    assert {name.rpartition("/")[0] for name in names} <= modules
    convolutions = {name for name, module in model.unet.named_modules() if isinstance(module, torch.nn.Conv2d)}
    # Beside them, NCSN++ resamples by a fixed convolution, which is no layer.
    assert {node.name.rpartition("/")[0] for node in graph.node if node.op_type == "Conv"} >= convolutions


def test_guidance_doubles_the_batch_of_the_network(families: dict[str, Callable[[], Any]]) -> None:
    from dpctl.signature import rows_of

    def rows(name: str) -> Any:
        return rows_of(families[name]().config, (1, 2, 4))

    assert rows("stable-diffusion") == (1, 4, 8)
    assert rows("latent-consistency") == rows("ddpm") == (1, 2, 4)


def test_the_manifest_keeps_both_batches(families: dict[str, Callable[[], Any]]) -> None:
    """The images that were asked for, and the rows of the UNet; see `dpctl inspect`."""
    from dpctl.inspect import report

    manifest = artifact.Manifest(
        kind="exported",
        recipe={"batch": [1, 2, 4]},
        stats={},
        files={},
        signature=of_unet(
            {**families["stable-diffusion"]().config, "_class_name": "UNet2DConditionModel"}, (1, 4, 8), (8, 8, 16)
        ).to_json(),
    )
    told = [str(line) for line in report(manifest, Path("out")).renderables]
    assert "1 to 4 images, best 2; the UNet's batch 1 to 8, best 4; height and width 8 to 16, best 8" in told
