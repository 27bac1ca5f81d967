"""Plain PyTorch: the network as it was trained, without compilation. The baseline of every comparison."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.signature import CLOCKS, PRUNED, of_unet
from runtime.denoiser import find_device, memory_used, synchronize
from runtime.layers import LayerTime, layer_times, random_inputs
from runtime.network import Network

RUNS_EXPORTED = False
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class EagerDenoiser:
    """A Denoiser over a UNet in memory, on the device and in the precision that the UNet has.

    In half precision everything within the network is, but timesteps and sizes; outside it is float32.
    """

    def __init__(self, unet: Any) -> None:
        parameter = next(unet.parameters())
        self.device, self.dtype, self.config = parameter.device, torch.float32, unet.config
        self._weights = parameter.dtype
        self.precision = {dtype: name for name, dtype in PRECISIONS.items()}.get(self._weights, str(self._weights))
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
        return value.to(self.device, self._weights if narrow else None)

    def synchronize(self) -> None:
        synchronize(self.device)

    def memory(self) -> dict[str, int]:
        return memory_used(self.device)


def open_denoiser(
    directory: Path, *, threads: int | None = None, device: str | None = None, precision: str = "fp32"
) -> EagerDenoiser:
    """Load a model directory into PyTorch, in a precision of `PRECISIONS`.

    `threads` is torch's setting for the whole process; without it torch's own stands. Raises a DpctlError for an
    exported directory, which holds no weights, and for an unknown precision.
    """
    return EagerDenoiser(load(directory, threads, device, precision))


def load(directory: Path, threads: int | None, device: str | None, precision: str) -> Any:
    """Return the network of a model directory on a device and in a precision, with torch set as asked for."""
    if precision not in PRECISIONS:
        raise DpctlError("unknown precision", repr(precision), f"choose one of: {', '.join(PRECISIONS)}")
    target = find_device(device)
    if threads is not None:
        torch.set_num_threads(threads)
    if target.type == "cuda":
        # float32 means float32: TF32 is a precision of its own.
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
    return lowered(load_model(directory).unet, PRECISIONS[precision]).to(target)


def lowered(unet: Any, dtype: torch.dtype) -> Any:
    """Return a network with its weights in `dtype`, changed in place; what embeds the timestep stays as it is.

    Fourier features turn by frequency times timestep: rounded, a frequency of 16 is off by a part of a turn.
    """
    clock, unet.time_proj = unet.time_proj, nn.Identity()
    # Not diffusers' own `to`: it warns of layers to keep in float32, of which its UNets have none.
    nn.Module.to(unet, dtype)
    unet.time_proj = clock
    return unet


def profile(
    directory: Path,
    *,
    threads: int | None = None,
    device: str | None = None,
    precision: str = "fp32",
    batch_size: int = 1,
    runs: int = 10,
) -> tuple[LayerTime, ...]:
    """Return the time of every module in one forward pass, what its own children take left out.

    So the products of attention, the concatenations and the additions stand under the block that makes them, and all
    together are the whole pass. The hooks that take the time cost some themselves: a few microseconds per module.
    """
    with open_denoiser(directory, threads=threads, device=device, precision=precision) as denoiser:
        unet = denoiser._network.unet
        inputs = random_inputs(of_unet({**unet.config, "_class_name": type(unet).__name__}), unet.config, batch_size)
        tape = Tape(unet, denoiser.device)
        try:
            passes = [tape.record(lambda: denoiser(**inputs)) for _ in range(runs + 1)]
        finally:
            tape.close()
    return layer_times(passes[1:])


class Tape:
    """Hooks on every module of a network, which note when the turn passes from one module to another."""

    def __init__(self, network: Any, device: torch.device) -> None:
        self._device = device
        self._marks: list[tuple[Any, tuple[str, str] | None]] = []
        self._open: list[tuple[str, str]] = []
        self._hooks = []
        for name, module in network.named_modules():
            who = (name, type(module).__name__.removeprefix(PRUNED))
            self._hooks += [
                module.register_forward_pre_hook(self._enter(who)),
                module.register_forward_hook(self._leave, always_call=True),
            ]

    def record(self, run: Callable[[], Any]) -> list[LayerTime]:
        """Run once and return who had the turn for how long, in order."""
        self._marks.clear()
        run()
        synchronize(self._device)
        return [
            LayerTime(*who, self._between(began, ended))
            for (began, who), (ended, _) in zip(self._marks, self._marks[1:], strict=False)
            if who is not None
        ]

    def close(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _enter(self, who: tuple[str, str]) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            self._open.append(who)
            self._mark()

        return hook

    def _leave(self, *_: Any) -> None:
        self._open.pop()
        self._mark()

    def _mark(self) -> None:
        """Note the time, and whose turn begins; on a GPU as an event in its queue."""
        now: Any = time.perf_counter()
        if self._device.type == "cuda":
            now = torch.cuda.Event(enable_timing=True)
            now.record()
        self._marks.append((now, self._open[-1] if self._open else None))

    def _between(self, began: Any, ended: Any) -> float:
        return float(began.elapsed_time(ended) / 1000 if self._device.type == "cuda" else ended - began)
