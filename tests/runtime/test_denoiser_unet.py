"""What a pipeline calls in place of a UNet, over a denoiser that gives back the timestep."""

import gc
import weakref
from typing import Any, Self

import pytest
import torch
from diffusers.configuration_utils import FrozenDict

from dpctl.errors import DpctlError
from runtime.backends.eager import EagerDenoiser
from runtime.pipeline import DenoiserUNet


class Recorder:
    """A Denoiser that gives back the timestep."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.config, self.closed = FrozenDict(in_channels=1), 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.closed += 1

    def __call__(self, sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        assert timestep.dtype == torch.float32
        assert timestep.is_contiguous()
        return torch.ones_like(sample) * timestep[:, None, None, None]

    def synchronize(self) -> None: ...

    def memory(self) -> dict[str, int]:
        return {}


def test_timesteps_are_broadcast_and_stay_fractional() -> None:
    unet = DenoiserUNet(Recorder())
    sample = torch.zeros(3, 1, 8, 8)
    for given in (torch.tensor(41.625, dtype=torch.float64), 41.625, torch.full((3,), 41.625)):
        assert torch.equal(unet(sample, given, return_dict=False)[0], torch.full((3, 1, 8, 8), 41.625))
    assert torch.equal(unet(sample, torch.tensor(7)).sample, torch.full((3, 1, 8, 8), 7.0))


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"down_block_additional_residuals": (torch.zeros(1),)}, "down_block_additional_residuals"),
        ({"mid_block_additional_residual": torch.zeros(1)}, "mid_block_additional_residual"),
        ({"added_cond_kwargs": {"image_embeds": torch.zeros(1)}}, "image_embeds"),
        ({"cross_attention_kwargs": {"scale": 0.5}}, "cross_attention_kwargs"),
        ({"encoder_attention_mask": torch.ones(1)}, "encoder_attention_mask"),
    ],
)
def test_inputs_outside_the_signature_are_refused_by_name(given: dict[str, Any], named: str) -> None:
    with pytest.raises(DpctlError, match="no such inputs") as refusal:
        DenoiserUNet(Recorder())(torch.zeros(1, 1, 8, 8), 1, **given)
    assert refusal.value.got == named


def test_a_closed_network_is_free_and_says_so() -> None:
    denoiser = Recorder()
    with DenoiserUNet(denoiser) as unet:
        unet(torch.zeros(1, 1, 8, 8), 1)
    unet.close()
    assert denoiser.closed == 1
    with pytest.raises(DpctlError, match="closed"):
        unet(torch.zeros(1, 1, 8, 8), 1)


def test_closing_frees_the_weights(make_unet: Any) -> None:
    network = make_unet()
    weights = weakref.ref(network.conv_in.weight)
    unet = DenoiserUNet(EagerDenoiser(network))
    del network
    assert weights() is not None
    unet.close()
    gc.collect()
    assert weights() is None
    assert unet.config.in_channels == 1
