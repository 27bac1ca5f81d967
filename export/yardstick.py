"""Torch's own error at a lower precision: what the gate measures an exported graph of that precision by."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dpctl.signature import OUTPUT, Signature
from export import golden as golden_file
from export import verify
from export.golden import Golden
from export.half import HalfNetwork, evidence


class HalfDenoiser:
    """A Denoiser, as far as the sampling loop asks for one, over torch's network at a lower precision."""

    def __init__(self, unet: Any, precision: str) -> None:
        self.config, self.device, self.dtype = unet.config, torch.device("cpu"), torch.float32
        self._network = HalfNetwork(unet, precision)

    @torch.inference_mode()
    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        return self._network(sample=sample, timestep=timestep, **conditions)


def of_torch(
    unet: Any, precision: str, golden: Golden, signature: Signature, scheduler: Mapping[str, Any]
) -> dict[str, Any]:
    """Return torch's own errors at `precision` as plain JSON values, each a list of relative L2, and `samples_ssim`.

    What the outputs of single rows are not finite for is in `first_non_finite`, see `export.half`.
    """
    denoiser: Any = HalfDenoiser(unet, precision)
    found = evidence(unet, golden.grid, precision)
    if found["first_non_finite"]:
        return found
    if verify.is_guided(golden.grid):
        output = verify.in_batches(denoiser, golden.grid, signature, 1)
        found["guided_relative_l2"] = _errors(verify.guided(output), verify.guided(golden.grid[OUTPUT]))
    if golden.other_size:
        other = verify.in_batches(denoiser, golden.other_size, signature, 1)
        found["other_size_relative_l2"] = _errors(other, golden.other_size[OUTPUT])
    if golden.samples is not None:
        samples = golden_file.sampled(denoiser, scheduler, signature, golden.grid)
        found["samples_ssim"] = -1.0 if samples is None else verify.structural_similarity(samples, golden.samples)
    return found


def _errors(output: Tensor, expected: Tensor) -> list[float]:
    return [row["relative_l2"] for row in verify.compare(output, expected)]


def verdict(own: Mapping[str, Any]) -> dict[str, Any]:
    """Return what torch's own run says of a precision: failed where it gives NaN or Inf, with the place."""
    broken = own["first_non_finite"]
    if broken:
        reason = f"NaN or Inf in {broken['module']} at timestep {broken['timestep']:g}"
        return {"verdict": verify.FAILED, "reason": reason}
    errors = [error for error in own["relative_l2"] if error is not None]
    found: dict[str, Any] = {"verdict": verify.PASSED, "largest_relative_l2": max(errors)}
    if "headroom" in own:
        found |= {f"headroom_{key}" if key != "headroom" else key: value for key, value in own["headroom"].items()}
    return found
