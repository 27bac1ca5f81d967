"""Whole images from any kind of model, and where their time goes: a class for each way of drawing.

`dpctl sample` draws with it too.
"""

import functools
import itertools
import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from dpctl import registry
from dpctl.bench.result import DENOISER, OTHER, PARTS, SCHEDULER, TEXT_ENCODER, VAE
from dpctl.errors import DpctlError
from dpctl.models import decoder_of, load_scheduler
from dpctl.pipelines import hide_progress, pipeline_class, takes_text
from runtime import BACKENDS, load_pipeline, make_scheduler, open_denoiser, sample
from runtime.denoiser import Denoiser
from runtime.pipeline import draw_images

STEP = "step"
GIVEN = "--prompt TEXT (`dpctl sample`), or --prompts FILE with one per line (`dpctl bench`)"


@dataclass(frozen=True)
class Times:
    """Where the time of one batch of images went.

    A step goes from the end of the one before, the first from its call of the network, until the scheduler is done.
    `network_latency_s` has one entry per call, of `network_batch_size` rows, which guidance makes twice the images.
    `parts_s` has the names of `PARTS` and sums to `latency_s`. Before each reading the device is waited for, so that on
    a GPU the whole is longer than without readings: by what the processor would have prepared meanwhile.
    """

    latency_s: float
    step_latency_s: tuple[float, ...]
    network_latency_s: tuple[float, ...]
    parts_s: dict[str, float]
    network_batch_size: int


@dataclass(frozen=True)
class Call:
    """One call of a part; `rows` is the length of the tensor that it was given first."""

    part: str
    method: str
    began_ns: int
    ended_ns: int
    rows: int


class Watch:
    """Notes when each call of a part began and when its output was there. A call within another belongs to that."""

    def __init__(self, synchronize: Callable[[], None], clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self.calls: list[Call] = []
        self._synchronize, self._clock = synchronize, clock
        self._within = False

    def now(self) -> int:
        """Wait for the device, then read the clock."""
        self._synchronize()
        return self._clock()

    @contextmanager
    def on(self, part: str, thing: Any, methods: Sequence[str]) -> Iterator[None]:
        """Time methods of an object within the block.

        It becomes an instance of a class made for that, so that calls by `with`, `()` and a copy of it are timed too.
        """
        kind = type(thing)
        timed: dict[str, Any] = {name: self._timed(part, name, getattr(kind, name)) for name in methods}
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__}
        thing.__class__ = type(kind.__name__, (kind,), names | timed)
        try:
            yield
        finally:
            thing.__class__ = kind

    def _timed(self, part: str, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        def call(thing: Any, *args: Any, **kwargs: Any) -> Any:
            if self._within:
                return method(thing, *args, **kwargs)
            self._within = True
            began = self.now()
            try:
                return method(thing, *args, **kwargs)
            finally:
                self._within = False
                rows = len(args[0]) if args and isinstance(args[0], Tensor) and args[0].ndim else 0
                self.calls.append(Call(part, name, began, self.now(), rows))

        return call

    def times(self, began_ns: int, ended_ns: int) -> Times:
        """Return where the time between two readings went."""
        spent = dict.fromkeys(PARTS, 0)
        for call in self.calls:
            spent[call.part] += call.ended_ns - call.began_ns
        spent[OTHER] = ended_ns - began_ns - sum(spent.values())
        network = [call for call in self.calls if call.part == DENOISER]
        marks = [network[0].began_ns, *(call.ended_ns for call in self.calls if call.method == STEP)]
        return Times(
            latency_s=(ended_ns - began_ns) / 1e9,
            step_latency_s=tuple((after - before) / 1e9 for before, after in itertools.pairwise(marks)),
            network_latency_s=tuple((call.ended_ns - call.began_ns) / 1e9 for call in network),
            parts_s={part: spent_ns / 1e9 for part, spent_ns in spent.items()},
            network_batch_size=network[-1].rows,
        )


class Painter(ABC):
    """An open model that draws images, as a context manager: image i of a seed is the same in every batch."""

    denoiser: Denoiser

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def paint(self, indices: Sequence[int], num_inference_steps: int) -> Tensor:
        """Draw the images `indices`: [N, C, H, W], float32 in [-1, 1], on the processor."""

    @abstractmethod
    def parts(self) -> list[tuple[str, Any, tuple[str, ...]]]:
        """Return what is timed: a name of `PARTS`, an object, and which of its methods."""

    def timed(self, indices: Sequence[int], num_inference_steps: int) -> tuple[Tensor, Times]:
        """Draw the same images and return them with the times."""
        watch = Watch(self.denoiser.synchronize)
        with ExitStack() as stack:
            for part in self.parts():
                stack.enter_context(watch.on(*part))
            began = watch.now()
            images = self.paint(indices, num_inference_steps)
            ended = watch.now()
        return images, watch.times(began, ended)

    def close(self) -> None:
        """Free the network."""
        self.denoiser.__exit__(None, None, None)


class PixelPainter(Painter):
    """A network over pixels, sampled by our own loop; a class-conditional one draws class i modulo their number."""

    def __init__(self, denoiser: Denoiser, scheduler: Any, seed: int) -> None:
        self.denoiser, self._scheduler, self._seed = denoiser, scheduler, seed

    def paint(self, indices: Sequence[int], num_inference_steps: int) -> Tensor:
        asked: dict[str, Any] = {"seed": self._seed, "indices": indices, "num_inference_steps": num_inference_steps}
        return sample(self.denoiser, self._scheduler, **asked)

    def parts(self) -> list[tuple[str, Any, tuple[str, ...]]]:
        return [(DENOISER, self.denoiser, ("__call__",)), _scheduling(self._scheduler)]


class PipelinePainter(Painter):
    """A pipeline with a VAE. Image i shows prompt i modulo their number, where it takes any.

    Under classifier-free guidance the network's batch is twice the images.
    """

    def __init__(self, pipe: Any, seed: int, prompts: Sequence[str], guidance_scale: float | None) -> None:
        self.denoiser: Denoiser = pipe.unet.denoiser
        self._pipe, self._seed = pipe, seed
        self._prompts, self._guidance_scale = prompts, guidance_scale

    def paint(self, indices: Sequence[int], num_inference_steps: int) -> Tensor:
        asked: dict[str, Any] = {"seed": self._seed, "indices": indices, "num_inference_steps": num_inference_steps}
        if self._prompts:
            asked["prompts"] = [self._prompts[index % len(self._prompts)] for index in indices]
        return draw_images(self._pipe, **asked, guidance_scale=self._guidance_scale)

    def parts(self) -> list[tuple[str, Any, tuple[str, ...]]]:
        found = [(DENOISER, self.denoiser, ("__call__",)), _scheduling(self._pipe.scheduler)]
        for name, component in self._pipe.components.items():
            if component is not None and (name.startswith("text_encoder") or name == "bert"):
                found.append((TEXT_ENCODER, component, ("forward",)))
            if component is not None and name in ("vae", "vqvae"):
                found.append((VAE, component, ("decode",)))
        return found

    def close(self) -> None:
        self._pipe.unet.close()


def _scheduling(scheduler: Any) -> tuple[str, Any, tuple[str, ...]]:
    return SCHEDULER, scheduler, (STEP, "scale_model_input")


def open_painter(
    directory: Path,
    backend: str,
    *,
    scheduler: str,
    threads: int | None = None,
    seed: int = 0,
    prompts: Sequence[str] = (),
    guidance_scale: float | None = None,
    device: str | None = None,
    precision: str | None = None,
) -> Painter:
    """Open a model directory on a backend to draw images: a pipeline with a VAE as a whole, else the network.

    `precision` is the network's, where the backend runs weights. Raises a DpctlError for what the backend cannot open,
    and for prompts where none or some are wanted.
    """
    check_prompts(directory, prompts, guidance_scale)
    asked: dict[str, Any] = {"threads": threads, "device": device, "precision": precision}
    if decoder_of(directory) is not None:
        hide_progress()
        pipe = load_pipeline(directory, backend, **asked, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        return PipelinePainter(pipe, seed, prompts, guidance_scale)
    planned = make_scheduler(scheduler, load_scheduler(directory).config)
    return PixelPainter(open_denoiser(directory, backend, **asked).__enter__(), planned, seed)


def require(directory: Path, backend: str) -> None:
    """Import what drawing from a directory needs, or say what is missing."""
    getattr(registry.load(BACKENDS, backend, "backend"), "require", lambda: None)()
    if decoder_of(directory) is not None:
        pipeline_class(directory)


def check_prompts(directory: Path, prompts: Sequence[str], guidance_scale: float | None) -> None:
    """Raise a DpctlError for a model that draws texts without any, and the reverse."""
    kind = pipeline_class(directory) if decoder_of(directory) is not None else None
    textual = kind is not None and takes_text(kind)
    name = f"{directory}: {kind.__name__ if kind is not None else 'a network over pixels'}"
    if textual and not prompts:
        raise DpctlError("this model draws what a text says", name, f"give one: {GIVEN}")
    if prompts and not textual:
        raise DpctlError("this model takes no text", name, "leave the prompts out")
    if guidance_scale is not None and not prompts:
        raise DpctlError("guidance is towards a text", f"--guidance-scale {guidance_scale}", f"give one: {GIVEN}")
    if guidance_scale is not None and not math.isfinite(guidance_scale):
        raise DpctlError("the guidance scale is not a finite number", str(guidance_scale), "give one, such as 7.5")
