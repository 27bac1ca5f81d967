"""The class that travels with artifacts: stock diffusers loads, saves and loads it again without dpctl."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from safetensors.torch import load_file
from torch import nn

from dpctl.models import load_model
from dpctl.prune import prune
from dpctl.pruned_unet import PrunedUNet2DModel, narrow, widths
from dpctl.recipe import PruneRecipe

ROOT = Path(__file__).resolve().parent.parent
INPUTS = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), torch.tensor([3, 90])

# What a user without dpctl writes, in a process where importing it fails. Its answers are compared with ours.
STOCK = """
import sys
sys.modules["dpctl"] = None
from pathlib import Path
import torch
from diffusers import AutoModel, DiffusionPipeline, UNet2DModel
from safetensors.torch import save_file

source, target = map(Path, sys.argv[1:])
inputs = torch.linspace(-1, 1, 128).reshape(2, 1, 8, 8), torch.tensor([3, 90])
outputs = {}

def tell(name, unet):
    assert isinstance(unet, UNet2DModel) and type(unet).__name__ == "PrunedUNet2DModel"
    with torch.no_grad():
        outputs[name] = unet.eval()(*inputs).sample.contiguous()

loaded = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
tell("pipeline", loaded.unet)
tell("unet", AutoModel.from_pretrained(str(source / "unet"), trust_remote_code=True))
loaded.save_pretrained(target / "saved")
again = DiffusionPipeline.from_pretrained(target / "saved", trust_remote_code=True)
tell("saved", again.unet)
again.save_pretrained(target / "saved twice")
tell("saved twice", DiffusionPipeline.from_pretrained(target / "saved twice", trust_remote_code=True).unet)
AutoModel.from_pretrained(str(target / "saved" / "unet"), trust_remote_code=True).save_pretrained(target / "bare")
tell("bare", AutoModel.from_pretrained(str(target / "bare"), trust_remote_code=True))
images = again(batch_size=2, num_inference_steps=2, output_type="np", generator=torch.manual_seed(0)).images
outputs["images"] = torch.from_numpy(images)
loaded.unet.save_pretrained(target / "variant", variant="fp16", max_shard_size="200KB")
tell("variant", AutoModel.from_pretrained(str(target / "variant"), variant="fp16", trust_remote_code=True))
assert not any(name.partition(".")[0] == "dpctl" and module for name, module in sys.modules.items())
save_file(outputs, target / "outputs.safetensors")
"""


@pytest.fixture(scope="module")
def pruned(toy_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("pruned") / "slim"
    prune(str(toy_pipeline), out, PruneRecipe(criterion="magnitude", ratio=0.4, align=1))
    return out


@pytest.fixture(scope="module")
def stock(pruned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run `STOCK` on the pruned toy, isolated from this checkout; return the folder it wrote."""
    target, elsewhere = tmp_path_factory.mktemp("stock"), tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_MODULES_CACHE": str(elsewhere / "modules"), "HF_HOME": str(elsewhere), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", STOCK, str(pruned), str(target)]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return target


def run(unet: Any) -> torch.Tensor:
    with torch.no_grad():
        return unet(*INPUTS).sample


# --- stock diffusers ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["pipeline", "unet", "saved", "saved twice", "bare", "variant"])
def test_stock_diffusers_gives_the_same_output(pruned: Path, stock: Path, way: str) -> None:
    assert torch.equal(load_file(stock / "outputs.safetensors")[way], run(load_model(pruned).unet))


@pytest.mark.parametrize("copy", ["saved/unet", "saved twice/unet", "bare"])
def test_stock_diffusers_saves_the_same_weights(pruned: Path, stock: Path, copy: str) -> None:
    name = "diffusion_pytorch_model.safetensors"
    assert (stock / copy / name).read_bytes() == (pruned / "unet" / name).read_bytes()
    ours, theirs = (json.loads((d / "config.json").read_text()) for d in (pruned / "unet", stock / copy))
    assert theirs | {"_name_or_path": None} == ours | {"_name_or_path": None}


@pytest.mark.parametrize("copy", ["saved/unet", "saved twice/unet", "bare"])
def test_the_source_file_travels(pruned: Path, stock: Path, copy: str) -> None:
    source = (ROOT / "dpctl" / "pruned_unet.py").read_bytes()
    assert (pruned / "unet" / "pruned_unet.py").read_bytes() == source
    assert (stock / copy / "pruned_unet.py").read_bytes() == source


def test_stock_pipelines_draw_with_it(stock: Path) -> None:
    images = load_file(stock / "outputs.safetensors")["images"]
    assert images.shape == (2, 8, 8, 1)
    assert bool(images.isfinite().all())


@pytest.mark.parametrize("copy", ["saved", "saved twice", "saved/unet", "bare"])
def test_dpctl_reads_what_stock_saved(pruned: Path, stock: Path, copy: str) -> None:
    assert torch.equal(run(load_model(stock / copy).unet), run(load_model(pruned).unet))


def test_stock_saves_no_code_where_nobody_asked(pruned: Path) -> None:
    files = {path.relative_to(pruned).as_posix() for path in pruned.rglob("*") if path.is_file()}
    assert {name for name in files if name.endswith(".py")} == {"unet/pruned_unet.py"}
    index = json.loads((pruned / "model_index.json").read_text())
    assert index["unet"] == ["pruned_unet", "PrunedUNet2DModel"]


# --- the class ---------------------------------------------------------------------------------------------------


def small(base: Any, channels: dict[str, list[int]]) -> PrunedUNet2DModel:
    return PrunedUNet2DModel(base_config=dict(base.config), channels=channels).eval()


def test_nothing_narrowed_is_the_base_model(toy_unet: Any) -> None:
    same = small(toy_unet, {})
    same.load_state_dict(toy_unet.state_dict())
    assert torch.equal(run(same), run(toy_unet))


def test_the_config_keeps_every_original_value(pruned: Path, toy_unet: Any) -> None:
    config = json.loads((pruned / "unet" / "config.json").read_text())
    original = {k: v for k, v in toy_unet.config.items() if not k.startswith("_")}
    assert config["base_config"] == json.loads(json.dumps(original))
    assert config["_class_name"] == "PrunedUNet2DModel"
    assert config["auto_map"] == {"AutoModel": "pruned_unet.PrunedUNet2DModel"}
    slim = load_model(pruned).unet
    # Pipelines and schedulers read these from the network: they are the base model's.
    assert slim.config.sample_size == 8
    assert slim.config.in_channels == 1
    assert list(slim.config.block_out_channels) == [32, 64]


def test_channels_are_the_widths_of_the_layers(pruned: Path) -> None:
    slim = load_model(pruned).unet
    assert slim.config.channels["conv_in"] == [1, 24]
    for name, expected in slim.config.channels.items():
        assert widths(slim.get_submodule(name)) == expected


def test_attention_without_the_fused_kernel_gives_the_same(pruned: Path) -> None:
    slim = load_model(pruned).unet
    expected = run(slim)
    blocks = [module for module in slim.modules() if isinstance(module, Attention)]
    for block in blocks:
        block.set_processor(AttnProcessor())  # it reads what the block remembers of its widths
        assert block.inner_dim == block.inner_kv_dim == block.to_k.out_features == block.to_out[0].in_features
        assert (block.query_dim, block.out_dim) == (block.to_q.in_features, block.to_out[0].out_features)
    assert blocks
    torch.testing.assert_close(run(slim), expected)


def test_save_and_load_is_bit_equal(pruned: Path, tmp_path: Path) -> None:
    slim = load_model(pruned).unet
    slim.save_pretrained(tmp_path / "again")
    again = PrunedUNet2DModel.from_pretrained(tmp_path / "again", local_files_only=True)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in slim.state_dict().items())
    slim.save_pretrained(tmp_path / "again")  # onto itself
    assert torch.equal(run(load_model(tmp_path / "again").unet), run(slim))


def test_from_config_and_half_precision_and_meta(pruned: Path) -> None:
    slim = load_model(pruned).unet
    shapes = {name: value.shape for name, value in slim.state_dict().items()}
    with torch.device("meta"):
        fresh = PrunedUNet2DModel.from_config(slim.config)
    assert {name: value.shape for name, value in fresh.state_dict().items()} == shapes
    half = PrunedUNet2DModel.from_pretrained(pruned / "unet", torch_dtype=torch.bfloat16, local_files_only=True)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_gradient_checkpointing_gives_the_same_gradients(pruned: Path) -> None:
    plain, checkpointed = load_model(pruned).unet.train(), load_model(pruned).unet.train()
    checkpointed.enable_gradient_checkpointing()
    for unet in (plain, checkpointed):
        unet(*INPUTS).sample.square().mean().backward()
    for (name, one), other in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=name)


# --- narrow ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "new"),
    [
        (nn.Conv2d(4, 6, (3, 1), stride=2, padding=(1, 0), dilation=2, bias=False), [3, 5]),
        (nn.Conv2d(4, 6, 1), [4, 2]),
        (nn.Linear(4, 6), [2, 6]),
        (nn.Linear(4, 6, bias=False), [2, 3]),
        (nn.GroupNorm(2, 8, eps=0.5), [6]),
        (nn.GroupNorm(2, 8, affine=False), [4]),
        (nn.Embedding(10, 8), [10, 3]),
    ],
    ids=str,
)
def test_narrow_keeps_everything_but_the_widths(layer: nn.Module, new: list[int]) -> None:
    parent = nn.ModuleDict({"layer": layer})
    before, old = layer.extra_repr(), widths(layer)
    narrow(parent, {"layer": new})
    after = parent["layer"].extra_repr()
    assert widths(parent["layer"]) == new
    assert (parent["layer"].bias is None) == (layer.bias is None) if hasattr(layer, "bias") else True
    narrow(parent, {"layer": old})
    assert parent["layer"].extra_repr() == before != after


def test_narrow_changes_the_number_of_groups_where_it_is_told() -> None:
    parent = nn.ModuleDict({"layer": nn.GroupNorm(8, 32, eps=0.5)})
    narrow(parent, {"layer": [24, 6]})
    assert parent["layer"].extra_repr() == nn.GroupNorm(6, 24, eps=0.5).extra_repr()


def test_narrow_changes_the_number_of_heads_and_not_their_width() -> None:
    parent = nn.ModuleDict({"attention": Attention(32, heads=4, dim_head=8)})
    scale = parent["attention"].scale
    projections = {f"attention.{name}": [32, 24] for name in ("to_q", "to_k", "to_v")}
    narrow(parent, projections | {"attention.to_out.0": [24, 32], "attention": [3]})
    attention = parent["attention"]
    assert (attention.heads, attention.sliceable_head_dim, attention.inner_dim) == (3, 3, 24)
    assert attention.scale == scale
    assert attention(torch.ones(1, 5, 32)).shape == (1, 5, 32)


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(4), nn.Conv1d(2, 2, 1), nn.SiLU()])
def test_narrow_refuses_what_it_does_not_know(layer: nn.Module) -> None:
    with pytest.raises(TypeError, match=type(layer).__name__):
        narrow(nn.ModuleDict({"layer": layer}), {"layer": [1, 1]})
    with pytest.raises(TypeError, match=type(layer).__name__):
        widths(layer)
