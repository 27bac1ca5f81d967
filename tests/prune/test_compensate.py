"""Compensation, layer by layer: what is left gives what it gave in the whole network, as far as it can tell."""

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from dpctl import cost
from dpctl.prune import compensate as module
from dpctl.prune.compensate import Fit, compensate, fittable
from dpctl.prune.groups import ChannelGroup, find_groups
from dpctl.prune.plan import PruningPlan
from dpctl.prune.surgery import Kept, kept_indices, slim
from dpctl.signature import unet_arguments

NAMES = (
    *("ddpm", "ldm", "class-conditional", "ncsnpp", "resnet-resampling", "scale-shift"),
    *("stable-diffusion", "sdxl", "inpainting", "latent-consistency"),
)
# So little ridge that the fit is exact, and not so little that single precision fails.
EXACT = 1e-5
Families = dict[str, Callable[..., Any]]
# The widest toy takes as long as all the others together.
family = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "ncsnpp" else ()) for name in NAMES]
)


def inputs(unet: Any, count: int = 64, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    drawn = {
        name: torch.randn(value.shape, generator=generator)
        if value.is_floating_point()
        else torch.randint(5, value.shape, generator=generator)
        for name, value in cost.example_inputs(unet, count).items()
    }
    return drawn | {"timestep": torch.linspace(1, 99, count)}


@torch.no_grad()
def run(unet: Any, given: Mapping[str, Tensor]) -> Tensor:
    return unet(**unet_arguments(given)).sample


def error(unet: Any, small: Any) -> float:
    """Return |slim - whole| / |whole| of the outputs for inputs that nothing was fitted on."""
    fresh = inputs(unet, 8, seed=2)
    expected = run(unet, fresh)
    return float((run(small, fresh) - expected).norm() / expected.norm())


def state(network: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


def cut(unet: Any, keep: Mapping[str, tuple[int, ...]]) -> tuple[Any, Kept]:
    kept = kept_indices(unet, find_groups(unet), PruningPlan(dict(keep)))
    return slim(unet, kept), kept


def halves(unet: Any) -> dict[str, tuple[int, ...]]:
    """Return random channels to keep of every group: half of each of its segments."""
    generator, keep = torch.Generator().manual_seed(0), {}
    for group in find_groups(unet).prunable:
        part = group.width // group.segments
        starts = range(0, group.width, part)
        drawn = torch.cat([start + torch.randperm(part, generator=generator)[: -(-part // 2)] for start in starts])
        keep[group.name] = tuple(drawn.sort().values.tolist())
    return keep


def only(unet: Any, name: str) -> dict[str, tuple[int, ...]]:
    """Return the channels to keep where one group alone is cut: the even ones."""
    groups = find_groups(unet).prunable
    return {group.name: tuple(range(0, group.width, 2 if group.name == name else 1)) for group in groups}


# --- oracles -----------------------------------------------------------------------------------------------------


def is_inner(group: ChannelGroup) -> bool:
    return any(member.module.endswith(".to_q") and member.side == "out" for member in group.members)


def odd_channels_repeat(unet: Any) -> dict[str, tuple[int, ...]]:
    """Make each odd channel of `unet` a copy of its even neighbour, whose readers stay; return the even ones.

    Values under attention are a copy plus a constant, so that biases have to change. Queries and keys are multiplied
    with one another, and no linear layer makes up for those: the odd ones are zero.
    """
    even = {}
    for group in find_groups(unet).prunable:
        for member in (member for member in group.members if member.side == "out"):
            layer = unet.get_submodule(member.module)
            odd = [i for i, channel in zip(member.index, member.channel, strict=True) if channel % 2]
            for parameter in layer.parameters():
                view = parameter.data.movedim(1, 0) if isinstance(layer, nn.Embedding) else parameter.data
                view[odd] = 0.0 if is_inner(group) else view[[i - 1 for i in odd]]
            if member.module.endswith(".to_v") and layer.bias is not None:
                layer.bias.data[odd] += 1.0
        even[group.name] = tuple(range(0, group.width, 2))
    return even


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
@family
def test_copies_of_channels_that_stay_are_made_up_for(
    families: Families, monkeypatch: pytest.MonkeyPatch, name: str, wide: bool
) -> None:
    monkeypatch.setattr(module, "RIDGE", EXACT)
    monkeypatch.setattr(module, "WIDEST", 0 if wide else 10_000)
    unet = families[name]()
    small, kept = cut(unet, odd_channels_repeat(unet))
    assert error(unet, small) > 0.5
    compensate(unet, small, kept, inputs(unet, 128))
    assert error(unet, small) < 0.02


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
def test_the_ridge_holds_the_weights_back_a_little(
    make_unet: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, wide: bool
) -> None:
    monkeypatch.setattr(module, "WIDEST", 0 if wide else module.WIDEST)
    unet = make_unet()
    small, kept = cut(unet, odd_channels_repeat(unet))
    compensate(unet, small, kept, inputs(unet, 128))
    assert 0.01 < error(unet, small) < 0.1


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
def test_queries_keep_the_softmax_temperature(toy_unet: Any, monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    """The slim attention divides by the root of half the head width; its queries are smaller by that factor."""
    monkeypatch.setattr(module, "RIDGE", EXACT)
    monkeypatch.setattr(module, "WIDEST", 0 if wide else 10_000)
    small, kept = cut(toy_unet, odd_channels_repeat(toy_unet))
    compensate(toy_unet, small, kept, inputs(toy_unet, 128))
    seen: list[Tensor] = []
    for network in (toy_unet, small):
        to_q = network.mid_block.attentions[0].to_q
        to_q.register_forward_hook(lambda *called: seen.append(called[2]))
        run(network, inputs(toy_unet, 8, seed=2))
    torch.testing.assert_close(seen[1], 0.5**0.5 * seen[0][..., ::2], rtol=1e-2, atol=1e-2)


@family
def test_a_random_cut_comes_nearer_to_every_family(families: Families, name: str) -> None:
    unet = families[name]()
    small, kept = cut(unet, halves(unet))
    before = error(unet, small)
    fits = compensate(unet, small, kept, inputs(unet))
    assert error(unet, small) < 0.75 * before
    assert list(fits) == [layer for layer in fittable(unet, small) if layer in fits]
    assert all(fit.after < fit.before for fit in fits.values())


def test_every_family_is_tested(families: Families) -> None:
    assert set(NAMES) == set(families)


@pytest.mark.parametrize("wide", [False, True], ids=["", "wide"])
def test_nothing_cut_changes_no_bit(toy_unet: Any, monkeypatch: pytest.MonkeyPatch, wide: bool) -> None:
    monkeypatch.setattr(module, "WIDEST", 0 if wide else module.WIDEST)
    small, kept = cut(toy_unet, only(toy_unet, "no group"))
    assert compensate(toy_unet, small, kept, inputs(toy_unet)) == {}
    assert same(state(small), state(toy_unet))


def test_a_linear_layer_gets_the_ridge_solution(toy_unet: Any) -> None:
    name = "time_embedding.linear_1"
    small, kept = cut(toy_unet, only(toy_unet, name))
    given, layer, whole = inputs(toy_unet, 200), small.time_embedding.linear_2, toy_unet.time_embedding
    with torch.no_grad():
        hidden = nn.functional.silu(whole.linear_1(toy_unet.time_proj(given["timestep"])))
        wanted = whole.linear_2(hidden).double().numpy()
    read = np.c_[hidden[:, ::2].double().numpy(), np.ones(200)]
    start = np.r_[layer.weight.detach().double().numpy().T, layer.bias.detach().double().numpy()[None]]
    before = state(small)
    fits = compensate(toy_unet, small, kept, given)

    # Least squares over more rows: each unknown's change, weighted, should be zero.
    ridge = np.sqrt(module.RIDGE * np.mean(np.sum(read**2, 0))) * np.eye(read.shape[1])
    error = wanted - read @ start
    change = np.linalg.lstsq(np.r_[read, ridge], np.r_[error, np.zeros((len(ridge), error.shape[1]))], rcond=None)[0]
    found = np.r_[layer.weight.detach().numpy().T, layer.bias.detach().numpy()[None]]
    np.testing.assert_allclose(found, start + change, rtol=0, atol=1e-4)
    assert np.abs(change).max() > 0.1
    left = [np.linalg.norm(wanted - read @ weights) / np.linalg.norm(wanted) for weights in (start, start + change)]
    fit = fits["time_embedding.linear_2"]
    assert (fit.before, fit.after) == pytest.approx(left, rel=1e-3)
    # What comes before the cut is as it was, and what does not change is not among the fits.
    assert next(iter(fits)) == "time_embedding.linear_2"
    changed = {
        key.rpartition(".")[0] for key, tensor in small.state_dict().items() if not torch.equal(tensor, before[key])
    }
    assert changed == set(fits)
    assert not changed & {"conv_in", name, "down_blocks.0.resnets.0.conv1"}


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("most", [40, 100_000])
def test_what_is_read_times_the_weights_is_the_output(
    make_unet: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, padding: int, most: int
) -> None:
    monkeypatch.setattr(module, "MOST_ROWS", most)
    unet = make_unet(downsample_padding=padding)
    names = fittable(unet, unet)
    assert unet.get_submodule("down_blocks.0.downsamplers.0.conv").stride == (2, 2)
    assert "down_blocks.0.downsamplers.0.conv" in names
    seen: list[tuple[str, int]] = []

    def compare(name: str, layer: Any) -> Any:
        def hook(_: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            rows = module._Rows(name, layer, layer, seed=0)
            found = rows.read(given[0]) @ layer.weight.flatten(1).T
            torch.testing.assert_close(
                found + (0 if layer.bias is None else layer.bias), rows.pick(output), rtol=1e-4, atol=1e-4
            )
            seen.append((name, len(found)))
            assert len(found) == min(most, output.numel() // cost.width_out(layer))

        return hook

    for name in names:
        unet.get_submodule(name).register_forward_hook(compare(name, unet.get_submodule(name)))
    run(unet, inputs(unet, 3))
    assert [name for name, _ in seen] == names
    assert (40 if most == 40 else 3 * 64) in {rows for _, rows in seen}


# --- how it is done ----------------------------------------------------------------------------------------------


def fitted(unet: Any, seed: int = 0, **more: Any) -> tuple[Any, dict[str, Fit]]:
    small, kept = cut(unet, halves(unet))
    return small, compensate(unet, small, kept, inputs(unet), seed=seed, **more)


def test_a_little_remembered_at_a_time_gives_the_same(toy_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[int] = []
    toy_unet.conv_in.register_forward_hook(lambda *seen: runs.append(1) if seen[2].device.type == "cpu" else None)
    at_once, _ = fitted(toy_unet)
    assert len(runs) == 1
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 1)
    one_by_one, _ = fitted(toy_unet)
    assert len(runs) == 1 + len(fittable(toy_unet, at_once))
    for name, tensor in at_once.state_dict().items():
        torch.testing.assert_close(one_by_one.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


def test_portions_hold_no_more_than_may_be_remembered_unless_it_is_one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REMEMBERED_BYTES", 6)
    layers: Any = [SimpleNamespace(bytes=count) for count in (3, 3, 3, 10, 1, 5)]
    found = [[rows.bytes for rows in portion] for portion in module._portions(layers)]
    assert found == [[3, 3], [3], [10], [1, 5]]
    assert list(module._portions([])) == []


def test_a_seed_gives_the_same_bits_and_another_one_others(toy_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LEAST_ROWS", 100)
    monkeypatch.setattr(module, "ROWS_PER_UNKNOWN", 1)
    one, again, other = (state(fitted(toy_unet, seed)[0]) for seed in (3, 3, 4))
    assert same(one, again)
    assert not same(one, other)


def hooks(network: Any) -> Iterator[int]:
    yield from (len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


def test_the_whole_network_is_not_changed(toy_unet: Any) -> None:
    before = state(toy_unet)
    small, _ = fitted(toy_unet.train())
    assert same(before, state(toy_unet))
    assert toy_unet.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in toy_unet.parameters())
    assert sum(hooks(toy_unet)) == sum(hooks(small)) == 0


@pytest.mark.parametrize("which", ["whole", "slim"])
def test_a_pass_that_fails_leaves_no_hooks(toy_unet: Any, which: str) -> None:
    small, kept = cut(toy_unet, halves(toy_unet))

    def fail(_: Any, given: tuple[Tensor, ...]) -> None:
        if given[0].device.type != "meta":
            raise RuntimeError("on purpose")

    broken = (toy_unet if which == "whole" else small).mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        compensate(toy_unet, small, kept, inputs(toy_unet))
    broken.remove()
    assert sum(hooks(toy_unet)) == sum(hooks(small)) == 0


def test_progress_counts_every_layer(toy_unet: Any) -> None:
    told: list[int] = []
    small, _ = fitted(toy_unet, advance=lambda steps=1, **_: told.append(steps))
    assert told == [1] * len(fittable(toy_unet, small))


def test_a_layer_that_is_called_twice_stays_as_it_was_cut(toy_unet: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    small, kept = cut(toy_unet, halves(toy_unet))
    once = ResnetBlock2D.forward

    def twice(self: Any, given: Tensor, temb: Tensor) -> Tensor:
        output = once(self, given, temb)
        return once(self, output, temb) if self.conv_shortcut is None else output

    monkeypatch.setattr(ResnetBlock2D, "forward", twice)
    shared = {
        f"{n}.{part}"
        for n, m in small.named_modules()
        if isinstance(m, ResnetBlock2D) and m.conv_shortcut is None
        for part in ("conv1", "conv2", "time_emb_proj")
    }
    assert len(shared) == 9
    before, far = state(small), error(toy_unet, small)
    fits = compensate(toy_unet, small, kept, inputs(toy_unet))
    assert not shared & set(fits)
    assert all(torch.equal(before[f"{n}.weight"], small.get_submodule(n).weight) for n in shared)
    assert error(toy_unet, small) < far


def test_a_dead_layer_gives_the_mean(toy_unet: Any) -> None:
    """All that it reads is zero, in the slim network: there is nothing to fit but the bias."""
    name = "mid_block.resnets.0"
    with torch.no_grad():
        norm = toy_unet.get_submodule(f"{name}.norm2")
        norm.weight[::2], norm.bias[::2] = 0.0, 0.0
    small, kept = cut(toy_unet, only(toy_unet, f"{name}.conv1"))
    before, given, outputs = state(small), inputs(toy_unet), list[Tensor]()
    conv2 = f"{name}.conv2"
    toy_unet.get_submodule(conv2).register_forward_hook(lambda *seen: outputs.append(seen[2]))
    fits = compensate(toy_unet, small, kept, given)
    assert torch.equal(small.get_submodule(conv2).weight, before[f"{conv2}.weight"])
    mean = outputs[-1].mean((0, 2, 3))
    torch.testing.assert_close(small.get_submodule(conv2).bias, mean, rtol=1e-3, atol=1e-3)
    assert fits[conv2].after < fits[conv2].before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_cannot_be_fitted_stays(bad: float) -> None:
    start, read, wanted = torch.randn(3, 2), torch.randn(9, 3), torch.full((9, 2), bad)
    assert module._ridge(read, start, wanted) == (start, None)
    found, fit = module._ridge(torch.zeros(9, 3), start, torch.ones(9, 2))
    assert torch.equal(found, start)
    assert fit == Fit(1.0, 1.0)
