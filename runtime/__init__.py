"""Run a model or an exported directory: backends behind one protocol, and the sampling loop."""

from pathlib import Path
from typing import Any

import torch

from dpctl import registry
from dpctl.errors import DpctlError
from dpctl.models import resolve
from dpctl.pipelines import pipeline_class
from runtime.denoiser import Denoiser
from runtime.noise import image_generators
from runtime.pipeline import DenoiserUNet, assemble
from runtime.sampler import sample
from runtime.schedulers import check_scheduler, make_scheduler

__all__ = ["BACKENDS", "Denoiser", "image_generators", "load_pipeline", "make_scheduler", "open_denoiser", "sample"]

BACKENDS = "runtime.backends"


def open_denoiser(
    path: str | Path,
    backend: str = "eager",
    *,
    threads: int | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> Denoiser:
    """Open a model with a backend; use it as a context manager.

    `path` is what `dpctl.models.resolve` takes. `threads` (default: torch's setting) holds for every backend alike.
    `precision` (default: fp32) is what the backends that run weights compute in, fp32, fp16 or bf16; inputs and outputs
    stay float32. Raises a DpctlError for an unknown backend, a missing library, a directory that the backend cannot run
    (an engine needs an exported one, eager the weights), and a precision where the exported directory has its own.
    """
    module = registry.load(BACKENDS, backend, "backend")
    if threads is not None and threads < 1:
        raise DpctlError("the number of threads is below 1", str(threads), "give 1 or more")
    asked: dict[str, Any] = {"threads": threads, "device": device}
    if precision is not None:
        if module.RUNS_EXPORTED:
            got = f"{precision} for the backend {backend}"
            raise DpctlError("an exported directory has its precision", got, "give it to `dpctl export` instead")
        asked["precision"] = precision
    return module.open_denoiser(resolve(path), **asked)


def load_pipeline(
    path: str | Path,
    backend: str = "eager",
    *,
    threads: int | None = None,
    device: str | None = None,
    scheduler: str | None = None,
    precision: str | None = None,
) -> Any:
    """Return the diffusers pipeline of a directory with its `unet` running on a backend.

    It is called as the stock one is: ``pipe(prompt, num_inference_steps=20, generator=...)``. Text encoders and VAE run
    in torch, in float32, on the backend's device; `threads` holds for them too, and for the whole process. `scheduler`
    (a name of `make_scheduler`) takes the place of the directory's own, and `precision` is the network's, as in
    `open_denoiser`. ``pipe.unet.close()`` frees the network, as
    does the end of ``with pipe.unet:``. Raises a DpctlError for what `open_denoiser` refuses, for a directory that is
    no pipeline, and for unconditional ones, which `sample` serves.
    """
    directory = resolve(path)
    kind = pipeline_class(directory)
    if scheduler is not None:
        check_scheduler(scheduler)
    denoiser = open_denoiser(directory, backend, threads=threads, device=device, precision=precision)
    unet = DenoiserUNet(denoiser.__enter__())
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        pipe = assemble(kind, directory, unet)
        if scheduler is not None:
            pipe.scheduler = make_scheduler(scheduler, pipe.scheduler.config)
    except BaseException:
        unet.close()
        raise
    return pipe
