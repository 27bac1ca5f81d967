"""The Denoiser: one network behind one call, whatever runs it, and what it promises.

* It is a context manager; what it holds (threads, device memory) is free after the block.
* ``denoiser(sample, timestep, **conditions)`` takes `sample` [B, C, H, W] and `timestep` [B], both float32, with the
  conditions its signature names, and returns the model output [B, C, H, W], float32, on `device`. The output belongs
  to the caller: no later call overwrites it (multistep schedulers keep earlier outputs).
* On a device that works behind the caller's back the call may return early: `synchronize` waits until all is done.
* `config` reads like the network's config.json: ``config.in_channels``, ``config.sample_size``.
* An idle denoiser uses no processor time.
"""

import re
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from dpctl.errors import DpctlError


class Denoiser(Protocol):
    """A network that predicts, from a noisy sample, what its scheduler needs."""

    device: torch.device
    dtype: torch.dtype
    config: Any

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def __call__(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Tensor: ...

    def synchronize(self) -> None: ...

    def memory(self) -> dict[str, int]: ...


def find_device(name: str | None) -> torch.device:
    """Return the device called `name` (default: the processor); a DpctlError where this machine has none such."""
    try:
        device = torch.device(name or "cpu")
    except RuntimeError:
        raise DpctlError("unknown device", repr(name), "use cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise DpctlError("unsupported device", repr(name), "use cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        got = f"{name}; torch {torch.__version__} sees {torch.cuda.device_count()} of them"
        raise DpctlError("no such GPU", got, "use cpu, or see `dpctl doctor`")
    return device


def memory_used(device: torch.device) -> dict[str, int]:
    """Return the bytes this process holds now and held at most; on a GPU also what is taken of the whole device."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    kibibytes = {name: int(number) for name, number in re.findall(r"^(Vm\w+):\s+(\d+) kB$", status, re.MULTILINE)}
    used = {"resident_bytes": kibibytes["VmRSS"] * 1024, "peak_resident_bytes": kibibytes["VmHWM"] * 1024}
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used |= {"device_bytes": total - free, "peak_torch_device_bytes": torch.cuda.max_memory_allocated(device)}
    return used


def begin(denoiser: Denoiser) -> None:
    """Say that another trajectory begins, to a denoiser that keeps something from one call to the next."""
    restart = getattr(denoiser, "restart", None)
    if restart is not None:
        restart()


def synchronize(device: torch.device) -> None:
    """Wait until everything given to `device` is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
