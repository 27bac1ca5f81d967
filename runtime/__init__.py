"""Run a model or an exported directory: backends behind one protocol, and the sampling loop."""

from pathlib import Path

from dpctl import registry
from dpctl.errors import DpctlError
from dpctl.models import resolve
from runtime.denoiser import Denoiser
from runtime.sampler import sample
from runtime.schedulers import make_scheduler

__all__ = ["BACKENDS", "Denoiser", "make_scheduler", "open_denoiser", "sample"]

BACKENDS = "runtime.backends"


def open_denoiser(
    path: str | Path, backend: str = "eager", *, threads: int | None = None, device: str | None = None
) -> Denoiser:
    """Open a model with a backend; use it as a context manager.

    `path` is what `dpctl.models.resolve` takes. `threads` (default: torch's setting) holds for every backend alike.
    Raises a DpctlError for an unknown backend, a missing library, and a directory that the backend cannot run: an
    engine needs an exported one, eager the weights.
    """
    module = registry.load(BACKENDS, backend, "backend")
    if threads is not None and threads < 1:
        raise DpctlError("the number of threads is below 1", str(threads), "give 1 or more")
    return module.open_denoiser(resolve(path), threads=threads, device=device)
