"""What a training will take, measured on two and three images before its first step: memory and time.

The activations are the tensors that a forward pass saves for the backward one. Their memory is linear in the images,
so that two numbers of them tell of any. Workspace of the libraries and memory that is not handed back come on top.
"""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from dpctl import units
from dpctl.diffusion import first_timestep
from dpctl.finetune import guards, optimizers
from dpctl.finetune.draws import Draws, Part, Split
from dpctl.finetune.loss import Objective
from dpctl.finetune.state import State
from dpctl.recipe import LoopRecipe
from runtime.denoiser import synchronize


@dataclass(frozen=True)
class Estimate:
    """Bytes on the device: `held` by name whatever the batch, `fixed` + `per_image` * images of activations."""

    held: dict[str, int]
    fixed: int
    per_image: int
    taken: int  # of what is held, already there
    free: int

    def need(self, images: int) -> int:
        """Return the bytes in all with so many images at a time."""
        return sum(self.held.values()) + self.fixed + self.per_image * images

    def fits(self, images: int) -> bool:
        """Tell whether that is free."""
        return self.need(images) - self.taken <= self.free

    def most(self) -> int:
        """Return how many images fit at a time."""
        return max(0, (self.free + self.taken - self.need(0)) // max(1, self.per_image))


@dataclass(frozen=True)
class Trial:
    """Forward and backward passes of a training that leave nothing behind: no gradient, no random number drawn."""

    state: State
    objective: Objective
    draws: Draws
    accelerator: Accelerator

    def losses(self, images: int) -> Tensor:
        """Return the losses of the next step's first images, with their graph."""
        device = self.accelerator.device
        batch, noise = self.draws.draw(self.state.step, Part(0, images, last=False))
        last = int(self.objective.scheduler.config.num_train_timesteps) - 1
        timesteps = torch.full((images,), max(first_timestep(self.state.unet), last // 2), device=device)
        with self.accelerator.autocast():
            terms = self.objective.terms(self.state.unet, batch.to(device), noise.to(device), timesteps)
            return self.objective.total(terms)

    def activations(self, images: int) -> int:
        """Return the bytes that are saved for the backward pass."""
        unet, saved = self.state.unet, Saved(self._known())
        anew = bool(getattr(unet, "is_gradient_checkpointing", False))
        if anew:
            unet.enable_gradient_checkpointing(saved.anew)
        try:
            with torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor):
                losses = self.losses(images)
        finally:
            if anew:
                unet.enable_gradient_checkpointing()
        del losses
        return saved.bytes

    def seconds(self, images: int) -> float:
        """Return the time of one forward and backward pass."""
        parameters = [p for p in self.state.unet.parameters() if p.requires_grad]
        synchronize(self.accelerator.device)
        start = time.monotonic()
        torch.autograd.grad(self.losses(images).mean(), parameters, allow_unused=True)
        synchronize(self.accelerator.device)
        return time.monotonic() - start

    def _known(self) -> set[int]:
        networks = [each for each in (self.state.unet, self.objective.teacher) if each is not None]
        return {p.untyped_storage().data_ptr() for network in networks for p in network.parameters()}


class Saved:
    """Counts the bytes of what is saved for a backward pass; a storage once, those at the addresses `known` never.

    A layer under gradient checkpointing keeps its inputs only, and is computed anew in the backward pass, one by one.
    """

    def __init__(self, known: set[int]) -> None:
        self._known = known
        self._kept: dict[int, Tensor] = {}  # holds them, too: no address is another's later
        self._inside: dict[int, Tensor] | None = None
        self._largest = 0

    @property
    def bytes(self) -> int:
        """Return what the pass so far has saved, with the largest of the layers that are computed anew."""
        return self._size(self._kept) + self._largest

    def keep(self, tensor: Tensor) -> Tensor:
        """Count a tensor, and return it."""
        address = tensor.untyped_storage().data_ptr()
        if address not in self._known and address not in self._kept:
            (self._kept if self._inside is None else self._inside)[address] = tensor.detach()
        return tensor

    def anew(self, layer: Any, *given: Any) -> Any:
        """Run a layer as gradient checkpointing would."""
        for each in given:
            if isinstance(each, Tensor):
                self.keep(each)
        if self._inside is not None:  # inside another one
            return layer(*given)
        self._inside = {}
        try:
            return layer(*given)
        finally:
            self._largest = max(self._largest, self._size(self._inside))
            self._inside = None

    @staticmethod
    def _size(tensors: dict[int, Tensor]) -> int:
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors.values())


def tell(
    state: State,
    objective: Objective,
    draws: Draws,
    recipe: LoopRecipe,
    accelerator: Accelerator,
    say: Callable[[str], None] | None,
) -> None:
    """Measure a training that is about to begin, say what it will take, and warn where that is more than is free.

    Only the main process does, and only where somebody listens.
    """
    if say is None or not accelerator.is_main_process:
        return
    devices = [accelerator.device] if accelerator.device.type == "cuda" else []
    parts = Split(recipe.batch_size, recipe.accumulation, accelerator.process_index, state.processes).parts()
    images = max(part.stop - part.start for part in parts)
    trial = Trial(state, objective, draws, accelerator)
    with torch.random.fork_rng(devices=devices), guards.memory_explained(recipe, state.processes):
        estimate = measure(trial, recipe, images)
        tried = images if estimate.fits(images) else 1
        took = trial.seconds(tried) * images / tried * recipe.accumulation
    held = ", ".join(f"{name} {units.bytes_(size)}" for name, size in estimate.held.items())
    say(
        f"memory: about {units.bytes_(estimate.need(images))} with {images} images at a time ({held}, activations "
        f"{units.bytes_(estimate.per_image)} an image); {units.bytes_(estimate.free + estimate.taken)} to be had"
    )
    left = recipe.steps - state.step
    say(f"time: about {units.seconds(took * left)} for {left} steps of {units.seconds(took)}, by one pass")
    if not estimate.fits(images):
        todo = ", ".join(guards.less_memory(recipe, state.processes, estimate.most()))
        say(f"warning: this may be more memory than there is; try {todo}")


def measure(trial: Trial, recipe: LoopRecipe, images: int) -> Estimate:
    """Measure a training that takes so many images at a time."""
    state, device = trial.state, trial.accelerator.device
    # Of a single image some tensors lie in memory otherwise than of several: it is measured only where it is all.
    few = min(images, 2)
    found = trial.activations(few)
    per_image = trial.activations(3) - found if few == 2 else found
    weights = _bytes(list(state.unet.parameters()))
    trained = _bytes([p for p in state.unet.parameters() if p.requires_grad])
    held = {
        "weights": weights,
        "gradients": trained * (2 if state.processes > 1 else 1),
    }
    held["moments"] = optimizers.size_of_moments(
        [p for p in state.unet.parameters() if p.requires_grad], recipe.optimizer
    )
    if state.ema is not None and (device.type == "cpu" or not recipe.ema_on_cpu):
        held["EMA"] = weights
    if trial.objective.teacher is not None:
        held["teacher"] = _bytes(list(trial.objective.teacher.parameters()))
    there = {name: size for name, size in held.items() if name not in ("gradients", "moments") or _has(state, name)}
    return Estimate(held, found - few * per_image, per_image, sum(there.values()), free(device))


def _has(state: State, name: str) -> bool:
    return name == "moments" and bool(state.optimizer.state_dict()["state"])


def _bytes(tensors: list[Any]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def free(device: torch.device) -> int:
    """Return the bytes that a device still has to give."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    found = re.search(r"^MemAvailable:\s+(\d+) kB$", Path("/proc/meminfo").read_text(encoding="ascii"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
