"""A narrowed graph is the graph that an export of the slim network gives; what cannot be narrowed is refused."""

import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
import torch
from diffusers import DDPMScheduler, UNet2DModel
from toys import seeded

from dpctl import artifact
from dpctl.errors import DpctlError
from dpctl.models import load_model, read_config, write_pipeline
from dpctl.prune import prune
from dpctl.pruned_unet import Removed
from dpctl.recipe import ExportRecipe, PruneRecipe
from dpctl.signature import Signature
from export import export_model, graph, verify
from export.narrow import narrow
from export.precision import PRECISIONS
from runtime import open_denoiser
from runtime.network import Network

BATCH = (1, 2, 4)
Base = tuple[Path, Path]  # a model, and an export of it


def slim(model: Path, out: Path, **changed: Any) -> Any:
    """Return the network of `model` cut to about half its widths."""
    prune(str(model), out, PruneRecipe(**({"criterion": "magnitude", "ratio": 0.5} | changed)))
    return load_model(out).unet


@pytest.fixture(scope="session")
def base(
    plain: Any,
    plain_exported: Path,
    saved_pipeline: Callable[[str], Path],
    families: dict[str, Callable[[], Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[str], Base]:
    """Return a model and its export, made once: `plain`, that in a precision, a toy pipeline or one of `families`."""
    made: dict[str, Base] = {"plain": (plain.directory, plain_exported)}

    def make(name: str) -> Base:
        if name not in made:
            folder = tmp_path_factory.mktemp("narrow")
            if name in PRECISIONS:
                source = plain.directory
            else:
                source = _saved(folder / "model", families[name]) if name in families else saved_pipeline(name)
            precision = name if name in PRECISIONS else "fp32"
            export_model(load_model(source), folder / "exported", ExportRecipe(precision=precision, batch=BATCH))
            made[name] = source, folder / "exported"
        return made[name]

    return make


def _saved(directory: Path, build: Callable[[], Any]) -> Path:
    write_pipeline(directory, unet=build(), scheduler=DDPMScheduler())
    return directory


def inputs(signature: Signature, rows: int = 3, size: tuple[int, int] | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    found = {
        tensor.name: torch.randint(0, 3, (rows,), generator=generator)
        if tensor.dtype == "int64"
        else torch.randn(signature.shape(tensor, rows, size), generator=generator)
        for tensor in signature.inputs
    }
    return found | {"timestep": torch.tensor([1.0, 7.5, 99.0])[:rows]}


def output(directory: Path, given: Mapping[str, Any]) -> torch.Tensor:
    with open_denoiser(directory, "ort", device="cpu") as denoiser:
        return denoiser(**given)


def of_torch(unet: Any, given: Mapping[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return Network(unet).eval()(**given)


def signature_of(directory: Path) -> Signature:
    manifest = artifact.read_manifest(directory)
    assert manifest is not None
    return Signature.from_json(manifest.signature)


def content(path: Path) -> tuple[Any, Any, Any]:
    """Return what a graph consists of: its nodes, its constants by name, and the shapes of its values."""
    model = onnx.load(path)
    constants = {
        t.name: (t.data_type, list(t.dims), onnx.numpy_helper.to_array(t).tobytes()) for t in model.graph.initializer
    }
    shapes = {v.name: v.type.SerializeToString(deterministic=True) for v in model.graph.value_info}
    return [node.SerializeToString(deterministic=True) for node in model.graph.node], constants, shapes


# Deep enough for whole branches to go.
DEEP: dict[str, Any] = {"ratio": None, "target_macs": 0.1, "scope": "global", "depth": True, "align": 1}
# The attention heads of all three get narrower; the first attends over pixels, the others over words too.
FAMILIES = ["plain", "sd", pytest.param("sdxl", marks=pytest.mark.slow)]
FAMILIES += [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("ddpm", "class-conditional", "ncsnpp", "resnet-resampling", "scale-shift", "latent-consistency")
]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_narrowed_graph_is_that_of_an_export(name: str, base: Callable[[str], Base], tmp_path: Path) -> None:
    model, whole = base(name)
    unet = slim(model, tmp_path / "slim")
    narrow(whole, unet, tmp_path / "narrow")

    export_model(load_model(tmp_path / "slim"), tmp_path / "real", ExportRecipe(batch=BATCH))
    given = inputs(signature_of(whole))
    found, expected = (output(tmp_path / each, given) for each in ("narrow", "real"))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    nodes, constants, shapes = content(tmp_path / "narrow/unet/model.fp32.onnx")
    real = content(tmp_path / "real/unet/model.fp32.onnx")
    assert [onnx.NodeProto.FromString(node).op_type for node in nodes] == [
        onnx.NodeProto.FromString(node).op_type for node in real[0]
    ]
    assert sorted(value[1:] for value in constants.values()) == sorted(value[1:] for value in real[1].values())
    if name == "plain":  # no constant is shared by layers that differ: the very same graph
        assert (nodes, constants, shapes) == real
    assert read_config(tmp_path / "narrow") == read_config(tmp_path / "real")


def test_a_class_conditional_graph_takes_widths_that_differ_within_a_block(
    pruned: Any, pruned_exported: Path, tmp_path: Path
) -> None:
    base = load_model(_saved(tmp_path / "base", lambda: UNet2DModel(**pruned.unet.config.base_config)))
    export_model(base, tmp_path / "whole", ExportRecipe(batch=BATCH))
    narrow(tmp_path / "whole", pruned.unet, tmp_path / "narrow")
    given = inputs(signature_of(pruned_exported))
    torch.testing.assert_close(output(tmp_path / "narrow", given), output(pruned_exported, given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        pytest.param("sd", {"heads": True}, id="fewer-heads"),
        pytest.param("sd", {"norm_groups": True}, id="fewer-norm-groups"),
        pytest.param("class-conditional", {"layout": "stock"}, id="stock", marks=pytest.mark.slow),
        pytest.param("plain", DEEP, id="fewer-branches"),
        pytest.param("sd", DEEP, id="fewer-branches-sd"),
        pytest.param("sdxl", DEEP, id="fewer-branches-sdxl", marks=pytest.mark.slow),
        pytest.param("fp16", DEEP, id="fewer-branches-fp16"),
    ],
)
def test_heads_groups_and_whole_levels_may_go(
    name: str, changed: Any, base: Callable[[str], Base], tmp_path: Path
) -> None:
    model, whole = base(name)
    unet = slim(model, tmp_path / "slim", **changed)
    narrow(whole, unet, tmp_path / "narrow")
    given = inputs(signature_of(whole))
    close = {"rtol": 0.0, "atol": 5e-3} if name in PRECISIONS else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(output(tmp_path / "narrow", given), of_torch(unet, given), **close)
    if "depth" in changed:
        assert any(isinstance(module, Removed) for module in unet.modules())


def test_one_graph_serves_cut_after_cut(base: Callable[[str], Base], tmp_path: Path) -> None:
    model, whole = base("plain")
    slim(model, tmp_path / "once", ratio=0.25)
    unet = slim(tmp_path / "once", tmp_path / "twice")
    narrow(whole, unet, tmp_path / "narrow")
    narrow(tmp_path / "narrow", load_model(model).unet, tmp_path / "back")
    given = inputs(signature_of(whole))
    torch.testing.assert_close(output(tmp_path / "narrow", given), of_torch(unet, given), rtol=1e-4, atol=1e-5)
    assert content(tmp_path / "back/unet/model.fp32.onnx") == content(whole / "unet/model.fp32.onnx")


def test_dynamic_sizes_stay_dynamic(base: Callable[[str], Base], tmp_path: Path) -> None:
    model, _ = base("plain")
    export_model(load_model(model), tmp_path / "whole", ExportRecipe(batch=BATCH, size=(8, 8, 16)))
    unet = slim(model, tmp_path / "slim")
    narrow(tmp_path / "whole", unet, tmp_path / "narrow")
    # And once more from there: the lengths that were put in are constants like others.
    once_more = slim(tmp_path / "slim", tmp_path / "slimmer")
    narrow(tmp_path / "narrow", once_more, tmp_path / "narrower")
    for size in ((8, 8), (16, 11)):
        given = inputs(signature_of(tmp_path / "whole"), size=size)
        for name, network in (("narrow", unet), ("narrower", once_more)):
            torch.testing.assert_close(output(tmp_path / name, given), of_torch(network, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_lower_precision_is_that_of_an_export(precision: str, base: Callable[[str], Base], tmp_path: Path) -> None:
    model, whole = base(precision)
    unet = slim(model, tmp_path / "slim")
    narrow(whole, unet, tmp_path / "narrow")

    signature, name = signature_of(whole), f"unet/model.{precision}.onnx"
    graph.write_graph(Network(unet).eval(), signature, tmp_path / "real.onnx", {}, precision)
    assert content(tmp_path / "narrow" / name)[:2] == content(tmp_path / "real.onnx")[:2]
    types = {tensor.dtype for tensor in ir.load(tmp_path / "narrow" / name).graph.initializers.values()}
    assert PRECISIONS[precision].dtype in types
    parity = getattr(artifact.read_manifest(tmp_path / "narrow"), "parity", None) or {}
    assert 1e-5 < parity["checks"]["one input"]["error"] <= parity["checks"]["one input"]["allowed"]


def test_the_manifest_says_what_it_is(base: Callable[[str], Base], tmp_path: Path, dpctl: Callable[..., Any]) -> None:
    model, whole = base("sd")
    unet = slim(model, tmp_path / "slim")
    narrow(whole, unet, tmp_path / "narrow")
    old, new = artifact.read_manifest(whole), artifact.read_manifest(tmp_path / "narrow")
    assert old is not None
    assert new is not None
    assert (new.kind, new.signature, new.recipe) == ("exported", old.signature, old.recipe)
    assert new.stats["narrowed_from"] == new.parent == old.digest
    assert new.stats["params"] == sum(parameter.numel() for parameter in unet.parameters())
    parity = new.parity or {}
    assert (parity["verdict"], parity["precision"], parity["opset"]) == (verify.NOT_RUN, "fp32", graph.OPSET)
    # Of the network there is its graph alone; the other components are those of the pipeline.
    assert {name for name in new.files if name.startswith("unet/")} == {"unet/config.json", "unet/model.fp32.onnx"}
    others = {name: sha for name, sha in old.files.items() if not name.startswith(("unet/", "model_index"))}
    assert others.items() <= new.files.items()
    told = dpctl("inspect", tmp_path / "narrow")
    assert told.code == 0
    assert re.search(rf"narrowed from\s+│ {old.digest[:12]}, checked on one input", told.out)
    assert "parity not run here" in told.out
    with pytest.raises(DpctlError, match="nothing says that the golden outputs are the model's"):
        verify.verify_directory(tmp_path / "narrow")


def test_openvino_opens_it_too(base: Callable[[str], Base], tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="openvino is not installed: see [dev] in pyproject.toml")
    model, whole = base("plain")
    unet = slim(model, tmp_path / "slim")
    narrow(whole, unet, tmp_path / "narrow")
    given = inputs(signature_of(whole))
    with open_denoiser(tmp_path / "narrow", "ov", device="cpu") as denoiser:
        torch.testing.assert_close(denoiser(**given), of_torch(unet, given), rtol=1e-3, atol=1e-4)


def test_weights_beyond_a_protobufs_size_lie_beside_the_narrowed_graph(
    base: Callable[[str], Base], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, whole = base("plain")
    monkeypatch.setattr(graph, "LARGEST_GRAPH", 1000)
    narrow(whole, slim(model, tmp_path / "slim"), tmp_path / "beside")
    manifest = artifact.read_manifest(tmp_path / "beside")
    assert manifest is not None
    assert "unet/model.fp32.onnx.data" in manifest.files
    unet = load_model(model).unet
    narrow(tmp_path / "beside", unet, tmp_path / "again")  # from such a graph, too
    given = inputs(signature_of(whole))
    torch.testing.assert_close(output(tmp_path / "again", given), of_torch(unet, given), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        pytest.param({"out_channels": 2}, r"other inputs or outputs.*\n.*out_sample \['batch', 2", id="signature"),
        pytest.param({"layers_per_block": 2}, "has no place in the graph", id="more-layers"),
        pytest.param({"down_block_types": ("DownBlock2D",)}, "no such module", id="fewer-layers"),
        pytest.param({"block_out_channels": (16,)}, "time_embedding", id="wider-sinusoid"),
        pytest.param({"act_fn": "gelu"}, "does not give the network's outputs", id="other-function"),
    ],
)
def test_a_network_of_another_base_is_refused(
    changed: Any, words: str, plain: Any, plain_exported: Path, tmp_path: Path
) -> None:
    unet = seeded(lambda: UNet2DModel.from_config({**plain.unet.config, **changed})).eval()
    with pytest.raises(DpctlError, match=words):
        narrow(plain_exported, unet, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_weights_that_float16_cannot_hold_are_refused(base: Callable[[str], Base], tmp_path: Path) -> None:
    model, whole = base("fp16")
    unet = slim(model, tmp_path / "slim")
    with torch.no_grad():
        unet.conv_in.weight[0, 0, 0, 0] = 1e5
    with pytest.raises(DpctlError, match=r"conv_in/Conv: weights that float16 cannot hold"):
        narrow(whole, unet, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"slim"}


def test_a_changed_export_is_refused(plain: Any, plain_exported: Path, tmp_path: Path) -> None:
    shutil.copytree(plain_exported, tmp_path / "whole")
    with (tmp_path / "whole/unet/model.fp32.onnx").open("ab") as stream:
        stream.write(b"\0")
    with pytest.raises(DpctlError, match="differs from its digest"):
        narrow(tmp_path / "whole", plain.unet, tmp_path / "out")
    assert not (tmp_path / "out").exists()
