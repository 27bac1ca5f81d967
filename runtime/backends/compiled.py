"""torch.compile of the network that eager runs: one graph without a break, compiled by inductor."""

import importlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpctl.errors import DpctlError
from runtime.backends import eager
from runtime.backends.eager import EagerDenoiser
from runtime.denoiser import find_device

RUNS_EXPORTED = False


class CompiledDenoiser(EagerDenoiser):
    """A Denoiser over a compiled UNet.

    The first batch size is compiled by itself, and so is 1; the next other one is compiled for all that follow. Each
    of these first calls takes seconds to minutes, less where inductor finds what it compiled before on the disk.
    """

    def __init__(self, unet: Any) -> None:
        super().__init__(unet)
        # A part that cannot be compiled, or one variant too many, is an error and does not run in eager instead.
        self._network = torch.compile(self._network, fullgraph=True)

    def _taken(self, value: Tensor, name: str) -> Tensor:
        # Another order in memory would be compiled again.
        return super()._taken(value, name).contiguous()


def open_denoiser(
    directory: Path, *, threads: int | None = None, device: str | None = None, precision: str = "fp32"
) -> CompiledDenoiser:
    """Load a model directory into PyTorch, to be compiled in the first call; the rest is as in eager.

    Raises a DpctlError, before anything is loaded, where there is nothing to compile with.
    """
    require(find_device(device).type)
    return CompiledDenoiser(eager.load(directory, threads, device, precision))


def require(device: str = "cpu") -> None:
    """Import inductor; a DpctlError names what it needs to compile for a device and does not find."""
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
        if device == "cuda":
            importlib.import_module("triton")
    except exc.InvalidCxxCompiler as problem:
        todo = "install a C++ compiler (Debian and Ubuntu: g++) or name one in CXX, or use the backend eager"
        raise DpctlError("torch.compile needs a C++ compiler", _first_line(problem), todo) from None
    except ImportError as problem:
        todo = "install torch with its CUDA build, which brings triton, or use the backend eager"
        raise DpctlError("torch.compile needs triton for a GPU", _first_line(problem), todo) from None


def _first_line(problem: Exception) -> str:
    return (str(problem).splitlines() or [type(problem).__name__])[0]
