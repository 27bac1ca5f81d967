"""The training loop: `dpctl train` runs it without a teacher, `dpctl finetune` with one.

Stopping at any step and resuming gives the weights of never having stopped: data order, flips, timesteps and noise
are functions of (seed, global sample index), and the checkpoint holds everything else.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers.training_utils import EMAModel
from torch import Tensor

from dpctl import progress
from dpctl.data import Images
from dpctl.diffusion import first_timestep, sample_generator
from dpctl.errors import DpctlError
from dpctl.finetune import checkpoint
from dpctl.finetune.checkpoint import Checkpoint
from dpctl.finetune.loss import Objective
from dpctl.recipe import LoopRecipe, to_dict


def train(
    unet: Any,
    objective: Objective,
    images: Images,
    recipe: LoopRecipe,
    *,
    folder: Path,
    start: Checkpoint | None = None,
    parent: str | None = None,
    advance: progress.Advance = progress.silent,
) -> list[float]:
    """Train `unet` in place, leave the EMA weights in it and return the loss of every step.

    `folder` receives the checkpoints, which name `parent`, the digest of the model that `unet` is; `start` is the one
    to go on from. Raises a DpctlError when loss or gradient are no longer finite (the last checkpoint is kept).
    """
    accelerator = _accelerator(recipe.mixed_precision)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    unet.train()
    if objective.teacher is not None:
        objective.teacher.eval().requires_grad_(False).to(accelerator.device)
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = EMAModel(unet.parameters(), decay=recipe.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    losses: list[float] = []
    if start is not None:
        _restore(start, unet, ema, optimizer, accelerator.scaler)
        losses = list(start.losses)

    for step in range(len(losses), recipe.steps):
        # The batch: which images, which noise and which timesteps are functions of the global sample index alone.
        indices = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
        clean, noise, timesteps = draw(images, indices, recipe, objective.scheduler)
        timesteps.clamp_(min=first_timestep(unet))
        clean, noise, timesteps = (t.to(accelerator.device) for t in (clean, noise, timesteps))

        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        with accelerator.autocast():
            loss = objective(model, clean, noise, timesteps)
        accelerator.backward(loss)
        norm = float(accelerator.clip_grad_norm_(model.parameters(), recipe.gradient_clip))
        losses.append(loss.item())
        # Before the weights take it, so that no checkpoint does. (In fp16 the scaler skips a gradient that overflows.)
        if not math.isfinite(losses[-1]) or not (math.isfinite(norm) or accelerator.scaler):
            raise _diverged(step, recipe, folder)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.step(unet.parameters())

        if (step + 1) % recipe.checkpoint_every == 0 and step + 1 < recipe.steps:
            tensors = _state(unet, ema, optimizer, accelerator.scaler)
            checkpoint.save(folder, Checkpoint(step + 1, to_dict(recipe), list(losses), tensors, parent))
        advance(1, loss=losses[-1], grad_norm=norm)

    ema.copy_to(unet.parameters())
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    unet.eval()
    return losses


def _accelerator(precision: str) -> Accelerator:
    # accelerate keeps one precision per process and refuses another: every training has its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=precision)
    if precision == "fp16" and accelerator.scaler is None:  # accelerate would train in float32 and not say so
        raise DpctlError("mixed precision fp16 needs a GPU", f"the {accelerator.device.type}", "use bf16 or no")
    return accelerator


def draw(images: Images, indices: Sequence[int], recipe: LoopRecipe, scheduler: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return (clean [B, C, H, W], noise [B, C, H, W], timesteps [B]) of these global sample indices."""
    clean = images.batch([shuffled_position(recipe.seed, index, len(images)) for index in indices])
    noise, timesteps = torch.empty_like(clean), torch.empty(len(indices), dtype=torch.long)
    for row, index in enumerate(indices):
        generator = sample_generator(recipe.seed, index, "train")
        flip, timestep = torch.rand(2, generator=generator).tolist()
        if recipe.flip and flip < 0.5:
            clean[row] = clean[row].flip(-1)
        timesteps[row] = int(timestep * scheduler.config.num_train_timesteps)
        noise[row].normal_(generator=generator)
    return clean, noise, timesteps


def shuffled_position(seed: int, index: int, size: int) -> int:
    """Return the image that global sample `index` reads: every epoch is a permutation of its own."""
    epoch, place = divmod(index, size)
    return int(_permutation(seed, epoch, size)[place])


_last: dict[tuple[int, int, int], Tensor] = {}


def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    key = (seed, epoch, size)
    if key not in _last:
        # A batch can straddle two epochs, so two permutations are worth keeping.
        for old in list(_last)[:-1]:
            del _last[old]
        _last[key] = torch.randperm(size, generator=sample_generator(seed, epoch, "epoch"))
    return _last[key]


def learning_rate(step: int, recipe: LoopRecipe) -> float:
    """Return the learning rate of `step`: linear warm-up, then cosine to zero (Loshchilov and Hutter, 2017)."""
    warmup = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    return recipe.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def _state(unet: Any, ema: EMAModel, optimizer: Any, scaler: Any) -> dict[str, Tensor]:
    names = [name for name, _ in unet.named_parameters()]
    tensors = {f"model.{name}": tensor for name, tensor in unet.state_dict().items()}
    tensors |= {f"ema.{name}": shadow for name, shadow in zip(names, ema.shadow_params, strict=True)}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{key}": torch.as_tensor(value) for key, value in moments.items()}
    if scaler is not None:
        tensors |= {f"scaler.{key}": torch.as_tensor(value) for key, value in scaler.state_dict().items()}
    return tensors


def _restore(start: Checkpoint, unet: Any, ema: EMAModel, optimizer: Any, scaler: Any) -> None:
    try:
        unet.load_state_dict(start.part("model"))
    except RuntimeError as problem:
        raise DpctlError(
            "the checkpoint belongs to another network", str(problem).splitlines()[0], "start again without --resume"
        ) from None
    shadows = start.part("ema")
    ema.shadow_params = [shadows[name].to(p.device) for name, p in unet.named_parameters()]
    ema.optimization_step = start.step
    state: dict[int, dict[str, Tensor]] = {}
    for name, tensor in start.part("optimizer").items():
        index, key = name.split(".", 1)
        state.setdefault(int(index), {})[key] = tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    if scaler is not None:
        scaler.load_state_dict({key: tensor.item() for key, tensor in start.part("scaler").items()})


def _diverged(step: int, recipe: LoopRecipe, folder: Path) -> DpctlError:
    return DpctlError(
        "the loss or its gradient is not finite",
        f"step {step + 1} of {recipe.steps}, learning rate {recipe.learning_rate:g}, {recipe.mixed_precision}",
        f"lower the learning rate or use mixed precision 'no'; the last good checkpoint is in {folder}",
    )
