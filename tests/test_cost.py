"""The static costs, against torch's own counter and against arithmetic."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.configuration_utils import FrozenDict
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dpctl import cost
from dpctl.errors import DpctlError
from dpctl.prune.groups import find_groups
from dpctl.prune.network import describe
from dpctl.prune.plan import select, uniform
from dpctl.prune.surgery import kept_indices, slim
from dpctl.signature import unet_arguments

SHAPES: list[dict[str, Any]] = [
    {},
    {"sample_size": (8, 12)},
    {"attention_head_dim": None},
    {"layers_per_block": 2, "add_attention": False},
    {"num_class_embeds": 3},
    {"resnet_time_scale_shift": "scale_shift"},
    {"time_embedding_type": "learned", "num_train_timesteps": 100},
]


def counted_by_torch(unet: Any) -> int:
    """Return half of torch's FLOPs: its multiply-accumulates."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        unet(**unet_arguments(cost.example_inputs(unet)))
    assert counter.get_total_flops() % 2 == 0
    return counter.get_total_flops() // 2


def on_meta(unet: Any) -> Any:
    return unet.to("meta")


@pytest.mark.parametrize("changed", SHAPES, ids=lambda changed: ",".join(changed) or "toy")
def test_macs_are_torchs(make_unet: Callable[..., Any], changed: dict[str, Any]) -> None:
    unet = make_unet(**changed)
    found = cost.macs(unet)
    # On the CPU torch counts attention as nothing, on the meta device in full.
    assert found.linear == counted_by_torch(unet)
    assert found.linear + found.attention == counted_by_torch(on_meta(unet))


def test_macs_of_a_slim_network_are_torchs(toy_unet: Any) -> None:
    groups = find_groups(toy_unet)
    network = describe(toy_unet, groups)
    scores = {span.name: [float(i) for i in range(span.width)] for span in network.spans}
    plan = select(network, scores, uniform(network, 0.4, 1))
    small = slim(toy_unet, kept_indices(toy_unet, groups, plan))
    found = cost.macs(small)
    assert found.linear == counted_by_torch(small)
    assert found.linear + found.attention == counted_by_torch(on_meta(small))
    assert found.attention == cost.macs(toy_unet).attention * 40 // 64  # heads of 16 became heads of 10


def test_macs_by_module_are_the_whole(families: dict[str, Callable[..., Any]]) -> None:
    for name, make in families.items():
        unet = make()
        found, whole = cost.macs_by_module(unet), cost.macs(unet)
        assert sum(found.values()) == whole.linear + whole.attention, name
        assert all(found.values()), name
        assert found.keys() <= dict(unet.named_modules()).keys(), name


def test_macs_of_one_module_are_its_own(toy_unet: Any) -> None:
    found = cost.macs_by_module(toy_unet)
    assert found["conv_in"] == 8 * 8 * toy_unet.conv_in.weight.numel()
    (attention,) = [name for name in found if name == "mid_block.attentions.0"]
    tokens, width = 4 * 4, toy_unet.mid_block.attentions[0].to_q.out_features
    assert found[attention] == 2 * tokens**2 * width


def test_the_count_does_not_depend_on_device_or_precision(toy_unet: Any) -> None:
    expected = cost.stats(toy_unet)
    assert cost.stats(toy_unet.to(torch.bfloat16)) == expected
    assert cost.stats(on_meta(toy_unet)) == expected


def test_counting_leaves_nothing_behind(toy_unet: Any) -> None:
    before = {name: value.clone() for name, value in toy_unet.state_dict().items()}
    cost.stats(toy_unet)
    assert not any(module._forward_hooks for module in toy_unet.modules())
    assert all(torch.equal(before[name], value) for name, value in toy_unet.state_dict().items())


def test_hooks_go_even_where_the_network_fails(toy_unet: Any) -> None:
    toy_unet.conv_out = nn.Conv2d(5, 1, 1)
    with pytest.raises(RuntimeError):
        cost.positions(toy_unet)
    assert not any(module._forward_hooks for module in toy_unet.modules())


def test_the_reference_shape_costs_what_is_known(make_unet: Callable[..., Any]) -> None:
    # FIELD section 5: 2.73M parameters and 288 MMACs.
    blocks = ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D")
    unet = make_unet(
        sample_size=28,
        block_out_channels=(32, 64, 128),
        down_block_types=blocks[0],
        up_block_types=blocks[1],
        attention_head_dim=32,
    )
    found = cost.stats(on_meta(unet))
    assert found["params"] == sum(p.numel() for p in unet.parameters()) == pytest.approx(2.73e6, rel=2e-3)
    assert found["macs"] == pytest.approx(288e6, rel=2e-3)


def test_a_layer_that_runs_twice_costs_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)
            self.config = FrozenDict(in_channels=1, out_channels=1, sample_size=(4, 6))

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            return self.conv(self.conv(sample))

    Twice.__name__ = "UNet2DModel"  # the signature goes by the class
    assert cost.macs(Twice()) == cost.Macs(linear=2 * 9 * 24, attention=0)


# --- inputs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
def test_example_inputs_fit(make_unet: Callable[..., Any], batch: int) -> None:
    for changed in SHAPES:
        unet = make_unet(**changed)
        inputs = cost.example_inputs(unet, batch)
        with torch.no_grad():
            output = unet(**unet_arguments(inputs)).sample
        assert output.shape == inputs["sample"].shape
        assert len(output) == batch
        assert bool(output.isfinite().all())


def test_fourier_embeddings_are_finite_at_the_example_timestep(make_unet: Callable[..., Any]) -> None:
    unet = make_unet(time_embedding_type="fourier")
    with torch.no_grad():
        assert bool(unet(**cost.example_inputs(unet)).sample.isfinite().all())


def test_a_network_without_an_image_size_is_explained(make_unet: Callable[..., Any]) -> None:
    with pytest.raises(DpctlError, match=r"(?s)image size.*sample_size"):
        cost.stats(make_unet(sample_size=None))


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_an_unknown_class_input_is_explained(make_unet: Callable[..., Any], kind: str) -> None:
    with pytest.raises(DpctlError, match=f"class_embed_type '{kind}'"):
        cost.stats(make_unet(class_embed_type=kind))


def test_a_copy_without_weights_has_every_shape_and_leaves_the_original_alone(make_unet: Callable[..., Any]) -> None:
    unet = make_unet()
    before = {name: (value, value.clone()) for name, value in unet.state_dict(keep_vars=True).items()}
    twin = cost.without_weights(unet)
    assert {name: value.shape for name, value in twin.state_dict().items()} == {
        n: v.shape for n, (v, _) in before.items()
    }
    assert all(value.device.type == "meta" for value in twin.state_dict().values())
    cost.positions(unet)
    after = unet.state_dict(keep_vars=True)
    assert all(after[name] is value and torch.equal(value, copy) for name, (value, copy) in before.items())
    assert not any(module._forward_hooks for module in unet.modules())


# --- bytes -------------------------------------------------------------------------------------------------------


def test_bytes_are_those_of_weights_graphs_and_engines(tmp_path: Path) -> None:
    unet = tmp_path / "unet"
    unet.mkdir()
    counted = {"a.safetensors": 10, "model.fp32.onnx": 200, "model.fp32.onnx.data": 3000, "m.sm90.engine": 40000}
    beside = {"kept.safetensors": 1, "golden.safetensors": 1, "config.json": 1, "pruned_unet.py": 1}
    for name, size in (counted | beside).items():
        (unet / name).write_bytes(bytes(size))
    (tmp_path / "vae.safetensors").write_bytes(bytes(7))
    assert cost.file_bytes(tmp_path) == 43210
