"""Print what an image costs outside the network: `sampling_overhead.py [--rounds N]`.

One image of 50 DDIM steps on one thread, on the reference network and on one of the paper's shape for CIFAR-10 with
random weights. The backends take turns; each share is of one image's own time, and its median over rounds is printed.
The network is the library's own run of the graph; what the backend does around it (binding) counts as outside.
"""

import argparse
import contextlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from export_cost import save_network

from dpctl.models import load_model, load_scheduler
from dpctl.recipe import ExportRecipe
from dpctl.units import seconds
from export import export_model
from runtime import make_scheduler, open_denoiser, sample
from runtime.denoiser import Denoiser

STEPS = 50
LIMITS = {"reference": 0.10, "cifar-10": 0.03}
# What runs the graph itself, once it is open and has run: the object and its method.
RUNS: dict[str, Callable[[Any], tuple[Any, str]]] = {
    "ort": lambda denoiser: (denoiser._session, "run_with_iobinding"),
    "ov": lambda denoiser: (denoiser._requests[1,], "infer"),
}
HEADS = (
    "network", "backend", "an image", "one network run", "binding", "scheduler.step", "the rest", "outside", "limit",
)  # fmt: skip


@dataclass
class Watch:
    """When each call of something began and ended, in seconds."""

    call: Callable[..., Any]
    began: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.began.append(time.perf_counter())
        result = self.call(*args, **kwargs)
        self.ended.append(time.perf_counter())
        return result

    @property
    def total(self) -> float:
        """Seconds spent in all calls."""
        return sum(self.ended) - sum(self.began)


class Watched:
    """A Denoiser whose calls are timed."""

    def __init__(self, denoiser: Denoiser) -> None:
        self.device, self.dtype, self.config = denoiser.device, denoiser.dtype, denoiser.config
        self._denoiser = denoiser

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.calls(*args, **kwargs)

    @contextlib.contextmanager
    def watching(self, backend: str) -> Iterator[Watch]:
        """Time the calls of the denoiser, and give the watch over the library's own run inside them."""
        self.calls = Watch(self._denoiser)
        owner, method = RUNS[backend](self._denoiser)
        inner = Watch(getattr(owner, method))
        setattr(owner, method, inner)
        try:
            yield inner
        finally:
            delattr(owner, method)  # the class's own is seen again


def split(denoiser: Watched, backend: str, scheduler: Any) -> dict[str, float]:
    """Draw one image and return where its time went, in seconds."""
    marks: list[float] = []
    with denoiser.watching(backend) as run:
        began = time.perf_counter()
        sample(
            denoiser,  # type: ignore[arg-type]
            scheduler,
            seed=0,
            indices=[0],
            num_inference_steps=STEPS,
            on_step=lambda i, x_t: marks.append(time.perf_counter()),
        )
        image = time.perf_counter() - began
    step = sum(marks) - sum(denoiser.calls.ended)
    outside = image - run.total
    binding = denoiser.calls.total - run.total
    return {"image": image, "binding": binding, "step": step, "rest": outside - binding - step, "outside": outside}


def row(network: str, backend: str, images: list[dict[str, float]]) -> list[str]:
    """Return the cells of a line: the medians over images of what an image costs, and of the shares in it."""
    shares = {part: median(image[part] / image["image"] for image in images) for part in images[0]}
    return [
        network,
        backend,
        seconds(median(image["image"] for image in images)),
        seconds(median((image["image"] - image["outside"]) / STEPS for image in images)),
        *(f"{100 * shares[part]:.1f} %" for part in ("binding", "step", "rest", "outside")),
        f"{100 * LIMITS[network]:.0f} %",
    ]


def measure(network: str, model: Path | str, folder: Path, rounds: int) -> Iterator[list[str]]:
    """Export a model, and return the lines of its backends after they took turns."""
    out = folder / "exported"
    export_model(load_model(model), out, ExportRecipe(batch=(1, 1, 1)))
    scheduler = make_scheduler("ddim", load_scheduler(out).config)
    with contextlib.ExitStack() as stack:
        opened = {name: Watched(stack.enter_context(open_denoiser(out, name, threads=1))) for name in RUNS}
        for denoiser in opened.values():  # what is compiled in the first call is
            denoiser._denoiser(torch.zeros(1, *_shape(denoiser.config)), torch.zeros(1))
        images: dict[str, list[dict[str, float]]] = {name: [] for name in RUNS}
        for number in range(rounds + 1):
            for name, denoiser in opened.items():
                found = split(denoiser, name, scheduler)
                if number > 0:  # round 0 warms up
                    images[name].append(found)
        for name in RUNS:
            yield row(network, name, images[name])


def _shape(config: Any) -> tuple[int, int, int]:
    return config.in_channels, config.sample_size, config.sample_size


def main() -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print(f"| {' | '.join(HEADS)} |")
    print("|---" * len(HEADS) + "|")
    for network in LIMITS:
        with tempfile.TemporaryDirectory() as name:
            model: Path | str = "reference"
            if network != "reference":
                model = Path(name) / "model"
                save_network(network, model)
            for cells in measure(network, model, Path(name), rounds):
                print(f"| {' | '.join(cells)} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
