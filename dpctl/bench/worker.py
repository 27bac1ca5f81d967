"""One subject in one process: `python -m dpctl.bench.worker` answers requests, one JSON line each, on its pipes.

Between two requests it blocks on its pipe and uses no processor. Nothing that a library prints can reach the pipe.
"""

import importlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from dpctl import registry
from dpctl.bench import painter
from dpctl.bench.gpu import Meter
from dpctl.bench.light import peak_flops
from dpctl.data import to_bytes
from dpctl.errors import DpctlError
from runtime import BACKENDS, open_denoiser
from runtime.denoiser import memory_used
from runtime.layers import random_inputs

CPU = torch.device("cpu")
# Calls of a network that take so long together say enough.
LONG_S = 1.0


class Subject:
    """An open model on its backend, and what can be asked of it; every answer is plain JSON."""

    def __init__(self, directory: str, backend: str, threads: int, precision: str | None = None, **asked: Any) -> None:
        self._directory, self._backend, self._threads = Path(directory), backend, threads
        self._precision = precision
        painter.require(self._directory, backend)
        torch.set_num_threads(threads)
        self._base = memory_used(CPU)["resident_bytes"]
        self._device_base = device_memory()
        reset = reset_peak()
        began = time.perf_counter()
        asked |= {"threads": threads, "precision": precision}
        self._painter = painter.open_painter(self._directory, backend, **asked)
        self._denoiser = self._painter.denoiser
        self._meter = Meter(self._denoiser.device)
        self.opened = {
            "open_latency_s": time.perf_counter() - began,
            "base_memory_bytes": self._base,
            "open_peak_memory_bytes": self._denoiser.memory()["peak_resident_bytes"] - self._base,
            "peak_is_reset": reset,
            "precision": getattr(self._denoiser, "precision", "fp32"),
            "device": str(self._denoiser.device),
        }

    def first(self, batch_size: int, num_inference_steps: int) -> dict[str, Any]:
        """Draw the first pictures of this process; what the backend builds for a new shape is in the latency."""
        began = time.perf_counter()
        self._painter.paint(range(batch_size), num_inference_steps)
        return {"latency_s": time.perf_counter() - began}

    def memory(self, batch_size: int, num_inference_steps: int) -> dict[str, Any]:
        """Draw one batch and return the peak of memory meanwhile, beyond the imported libraries.

        The device's is what has gone of its free memory: allocators give nothing back while they run.
        """
        reset_peak()
        self._painter.paint(range(batch_size), num_inference_steps)
        peak = {"peak_memory_bytes": self._denoiser.memory()["peak_resident_bytes"] - self._base}
        if self._denoiser.device.type == "cuda":
            peak["peak_device_memory_bytes"] = device_memory() - self._device_base
        return peak

    def state(self) -> dict[str, Any]:
        """Return what the GPU says of its clocks; nothing on the processor."""
        return {"gpu": self._meter.state()}

    def turn(self, batch_size: int, num_inference_steps: int) -> dict[str, Any]:
        """Draw one batch and return its latency, that of each step, and where the time went.

        One unmeasured step goes first: the other subjects' turns have emptied the processor's caches.
        """
        indices = range(batch_size)
        self._painter.paint(indices, 1)
        before = self._meter.energy_j()
        _, times = self._painter.timed(indices, num_inference_steps)
        after = self._meter.energy_j()
        return {"energy_j": None if before is None or after is None else after - before, **asdict(times)}

    def draw(self, start: int, stop: int, num_inference_steps: int, file: str) -> dict[str, Any]:
        """Draw the samples from `start` to `stop` and save them as bytes [N, H, W, C] (.npy)."""
        images = self._painter.paint(range(start, stop), num_inference_steps)
        np.save(file, to_bytes(images), allow_pickle=False)
        return {}

    def profile(self, batch_size: int, runs: int) -> dict[str, Any]:
        """Return the time of every layer in one forward pass; None where the backend has no profiler.

        It opens the model a second time: ask when the memory has been measured, and not between turns.
        """
        take = getattr(registry.load(BACKENDS, self._backend, "backend"), "profile", None)
        asked: dict[str, Any] = {"threads": self._threads, "batch_size": batch_size, "runs": runs}
        asked |= {} if self._precision is None else {"precision": self._precision}
        layers = take(self._directory, device=str(self._denoiser.device), **asked) if take is not None else None
        return {"layers": None if layers is None else [asdict(layer) for layer in layers]}


class Network:
    """An open network alone, without anything that draws pictures with it."""

    def __init__(self, directory: str, backend: str, threads: int) -> None:
        self._directory, self._backend, self._threads = Path(directory), backend, threads
        torch.set_num_threads(threads)
        self._denoiser: Any = open_denoiser(directory, backend, threads=threads).__enter__()
        self.opened = {"device": str(self._denoiser.device), "precision": getattr(self._denoiser, "precision", "fp32")}

    def calls(self, rows: int, least: int, least_s: float) -> dict[str, Any]:
        """Call the network with `rows` rows, `least` times and for `least_s` at least; return each call's latency.

        One unmeasured call goes first, as in a turn. Of calls that fill `LONG_S` one is enough, and that is the first:
        what it finds cold takes milliseconds.
        """
        inputs = random_inputs(self._denoiser.signature, self._denoiser.config, rows)
        first = self._call(inputs)
        found = [first] if first >= LONG_S else []
        while sum(found) < least_s or (len(found) < least and sum(found) < LONG_S):
            found.append(self._call(inputs))
        return {"latency_s": found}

    def profile(self, rows: int, runs: int) -> dict[str, Any]:
        """Return the time of every layer in one call, by the backend's profiler, which opens the network once more."""
        take = registry.load(BACKENDS, self._backend, "backend").profile
        asked: dict[str, Any] = {"threads": self._threads, "batch_size": rows, "runs": runs}
        return {"layers": [asdict(layer) for layer in take(self._directory, **asked)]}

    def _call(self, inputs: dict[str, Any]) -> float:
        self._denoiser.synchronize()
        began = time.perf_counter()
        self._denoiser(**inputs)
        self._denoiser.synchronize()
        return time.perf_counter() - began


def device_memory() -> int:
    """Return the bytes that are taken of the GPU, by whomever; 0 without one."""
    if not torch.cuda.is_available():
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def reset_peak() -> bool:
    """Set this process's peak of resident memory back to what it holds now; False where the system refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def light(threads: int) -> dict[str, Any]:
    """Return the FLOP/s that the machine reaches now: the fastest of a few large products."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {"flops": max(peak_flops(device, threads).flops_per_s)}


OPENED: dict[str, Callable[..., Any]] = {"open": Subject, "open_network": Network}
COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "calls": Network.calls,
    "layers": Network.profile,
    "first": Subject.first,
    "memory": Subject.memory,
    "state": Subject.state,
    "turn": Subject.turn,
    "draw": Subject.draw,
    "profile": Subject.profile,
}


def serve(requests: TextIO, replies: TextIO) -> None:
    """Answer requests until the pipe closes; a DpctlError is an answer, anything else ends the process."""
    subject: Any = None
    for line in requests:
        request = json.loads(line)
        what = request.pop("what")
        try:
            answer: dict[str, Any]
            if what == "light":
                answer = light(**request)
            elif what in OPENED:
                subject = OPENED[what](**request)
                answer = subject.opened
            else:
                answer = COMMANDS[what](subject, **request)
        except DpctlError as problem:
            answer = {"error": [problem.failed, problem.got, problem.todo]}
        replies.write(json.dumps(answer) + "\n")
        replies.flush()


def import_libraries() -> None:
    """Import what any subject needs, before the memory is counted: diffusers imports most of itself on first use."""
    import diffusers

    for name in ("UNet2DModel", "DDPMScheduler", "DDIMScheduler"):
        getattr(diffusers, name)
    importlib.import_module("safetensors.torch")


def main() -> None:
    """Keep the pipes for the requests alone, and give the libraries stderr and an empty stdin instead."""
    requests, replies = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    import_libraries()
    serve(requests, replies)


if __name__ == "__main__":
    main()
