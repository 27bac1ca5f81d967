"""Plain PyTorch: the network as it was trained, without compilation. The baseline of every comparison."""

from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from dpctl.models import load_model
from dpctl.signature import CLOCKS
from runtime.denoiser import find_device, memory_used, synchronize
from runtime.network import Network

RUNS_EXPORTED = False


class EagerDenoiser:
    """A Denoiser over a UNet in memory, on the device and with the dtype that the UNet has."""

    def __init__(self, unet: Any) -> None:
        parameter = next(unet.parameters())
        self.device, self.dtype, self.config = parameter.device, parameter.dtype, unet.config
        self._network: Any = Network(unet).eval()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        del self._network

    @torch.inference_mode()
    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor:
        given = {"sample": sample, "timestep": timestep, **conditions}
        return self._network(**{name: self._taken(value, name) for name, value in given.items()}).float()

    def _taken(self, value: Tensor, name: str) -> Tensor:
        # Timesteps and sizes stay float32 (999 is not exact in bf16), and labels are whole numbers.
        narrow = value.is_floating_point() and name not in CLOCKS
        return value.to(self.device, self.dtype if narrow else None)

    def synchronize(self) -> None:
        synchronize(self.device)

    def memory(self) -> dict[str, int]:
        return memory_used(self.device)


def open_denoiser(directory: Path, *, threads: int | None = None, device: str | None = None) -> EagerDenoiser:
    """Load a model directory into PyTorch.

    `threads` is torch's setting for the whole process; without it torch's own stands. Raises a DpctlError for an
    exported directory, which holds no weights.
    """
    return EagerDenoiser(load(directory, threads, device))


def load(directory: Path, threads: int | None, device: str | None) -> Any:
    """Return the network of a model directory on a device, with torch set as asked for."""
    target = find_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if target.type == "cuda":
        # float32 means float32: TF32 is a precision of its own.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return load_model(directory).unet.to(target)
