"""Every family of UNets that diffusers has: cut, run, train, and loaded by stock diffusers without dpctl."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from safetensors.torch import load_file, save_file
from torch import nn

from dpctl import cost
from dpctl.models import load_model
from dpctl.prune import prune
from dpctl.recipe import PruneRecipe
from dpctl.signature import unet_arguments

NAMES = (
    *("ddpm", "ldm", "class-conditional", "ncsnpp", "resnet-resampling", "scale-shift"),
    *("stable-diffusion", "sdxl", "inpainting", "latent-consistency"),
)
# Each family is cut in parts of heads and norm groups, and in whole ones.
WHOLE = tuple(f"{name} whole" for name in NAMES)
Families = dict[str, Callable[[], Any]]
family = pytest.mark.parametrize("name", NAMES + WHOLE)


def inputs(unet: Any) -> dict[str, torch.Tensor]:
    """Return random inputs of two samples; class labels stay whole numbers."""
    generator = torch.Generator().manual_seed(1)
    drawn = {
        name: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value + 1
        for name, value in cost.example_inputs(unet, 2).items()
    }
    return drawn | {"timestep": torch.tensor([3.0, 71.0])}


@torch.no_grad()
def run(unet: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    return unet(**unet_arguments(given)).sample


@pytest.fixture(scope="module")
def slim(families: Families, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every family's toy as stock saves it, and pruned in both ways: NAME/base and NAME/slim."""
    folder = tmp_path_factory.mktemp("families")
    for name in NAMES + WHOLE:
        whole = name in WHOLE
        families[name.removesuffix(" whole")]().save_pretrained(folder / name / "base")
        recipe = PruneRecipe(criterion="magnitude", ratio=0.5, align=1, heads=whole, norm_groups=whole)
        prune(str(folder / name / "base"), folder / name / "slim", recipe)
    return folder


def test_every_family_is_tested(families: Families) -> None:
    assert set(NAMES) == set(families)


@family
def test_a_cut_is_about_what_was_asked_for(slim: Path, name: str) -> None:
    manifest = load_model(slim / name / "slim").manifest
    assert manifest is not None
    assert manifest.stats["achieved"]["params"] < 0.5
    embedded = {"time_embedding.cond_proj"} if name.startswith("latent-consistency") else set()
    assert set(manifest.stats["left_alone"]) == {"conv_out"} | embedded


@pytest.mark.parametrize("name", WHOLE)
def test_whole_heads_and_norm_groups_are_fewer_of_the_same_size(slim: Path, name: str) -> None:
    base, small = (load_model(slim / name / which).unet for which in ("base", "slim"))
    norms = {n: m for n, m in base.named_modules() if isinstance(m, nn.GroupNorm)}
    fewer = {n for n in norms if small.get_submodule(n).num_groups < norms[n].num_groups}
    assert any(n.endswith(".norm2") for n in fewer)
    assert fewer == {n for n in norms if len(small.config.channels[n]) == 2}
    for n in fewer:
        new = small.get_submodule(n)
        assert new.num_channels // new.num_groups == norms[n].num_channels // norms[n].num_groups
    for n, attention in base.named_modules():
        if isinstance(attention, Attention) and attention.heads > 1:
            assert small.config.channels[n] == [small.get_submodule(n).heads] == [attention.heads // 2]
            assert small.get_submodule(n).inner_dim == attention.inner_dim // 2


@family
def test_a_slim_network_trains(slim: Path, name: str) -> None:
    unet = load_model(slim / name / "slim").unet.train()
    unet(**unet_arguments(inputs(unet))).sample.square().mean().backward()
    learned = {key: parameter for key, parameter in unet.named_parameters() if key != "time_proj.weight"}
    assert all(parameter.grad is not None and bool(parameter.grad.isfinite().all()) for parameter in learned.values())


# What a user without dpctl writes, in a process where importing it fails.
STOCK = """
import sys
sys.modules["dpctl"] = None
from pathlib import Path
import torch
from diffusers import AutoModel
from safetensors.torch import load_file, save_file

folder = Path(sys.argv[1])
for family in sorted(folder.iterdir()):
    given = load_file(family / "inputs.safetensors")
    added = {name: given.pop(name) for name in ("text_embeds", "time_ids") if name in given}
    more = {"added_cond_kwargs": added} if added else {}
    outputs = {}
    loaded = AutoModel.from_pretrained(str(family / "slim" / "unet"), trust_remote_code=True)
    loaded.save_pretrained(family / "again")
    again = AutoModel.from_pretrained(str(family / "again"), trust_remote_code=True)
    again.save_pretrained(family / "twice")
    for name, unet in {"loaded": loaded, "again": again}.items():
        assert type(unet).__module__.endswith("pruned_unet")
        with torch.no_grad():
            outputs[name] = unet.eval()(**given, **more).sample.contiguous()
    save_file(outputs, family / "outputs.safetensors")
"""


@pytest.fixture(scope="module")
def stock(slim: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    for name in NAMES + WHOLE:
        save_file(inputs(load_model(slim / name / "slim").unet), slim / name / "inputs.safetensors")
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_MODULES_CACHE": str(elsewhere / "modules"), "HF_HOME": str(elsewhere), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-I", "-c", STOCK, str(slim)]
    done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return slim


@family
def test_stock_diffusers_gives_the_same_bits(stock: Path, name: str) -> None:
    folder = stock / name
    ours = run(load_model(folder / "slim").unet, load_file(folder / "inputs.safetensors"))
    theirs = load_file(folder / "outputs.safetensors")
    assert torch.equal(theirs["loaded"], ours)
    assert torch.equal(theirs["again"], ours)


@family
def test_stock_diffusers_saves_the_same_bytes(stock: Path, name: str) -> None:
    weights = "diffusion_pytorch_model.safetensors"
    for copy in ("again", "twice"):
        assert (stock / name / copy / weights).read_bytes() == (stock / name / "slim" / "unet" / weights).read_bytes()
    again, twice = (json.loads((stock / name / copy / "config.json").read_text()) for copy in ("again", "twice"))
    assert {**again, "_name_or_path": ""} == {**twice, "_name_or_path": ""}
