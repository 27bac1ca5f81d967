"""The training loop: `dpctl train` runs it without a teacher, `dpctl finetune` with one.

Stopping at any step and resuming gives the weights of never having stopped, and several processes do the steps of one:
data order, flips, timesteps and noise are functions of (seed, global sample index), and the checkpoint holds
everything else.
"""

import contextlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from dpctl import progress
from dpctl.data import TrainingSet
from dpctl.diffusion import first_timestep, sample_generator
from dpctl.errors import StoppedError
from dpctl.finetune import checkpoint, estimate, guards, optimizers, processes, sheets, trackers, validation
from dpctl.finetune.checkpoint import Checkpoint
from dpctl.finetune.draws import Draws, Split
from dpctl.finetune.loss import Objective
from dpctl.finetune.meter import Meter
from dpctl.finetune.painting import Paint
from dpctl.finetune.state import Ema, State
from dpctl.finetune.timesteps import make_timesteps
from dpctl.recipe import LoopRecipe, to_dict


def train(
    unet: Any,
    objective: Objective,
    examples: TrainingSet,
    recipe: LoopRecipe,
    *,
    accelerator: Accelerator,
    folder: Path,
    start: Checkpoint | None = None,
    parent: str | None = None,
    advance: progress.Advance = progress.silent,
    say: Callable[[str], None] | None = None,
    paint: Paint | None = None,
) -> State:
    """Train `unet` in place and return the state at the end; in the main process `unet` has the averaged weights then.

    `folder` receives the checkpoints, which name `parent`, the digest of the model that `unet` is; `start` is the one
    to go on from; `say` is told what the training will take; `paint` draws the sample sheets, without it a network over
    pixels does. Raises a DpctlError when loss or gradient are no longer finite, the loss runs away or memory is short
    (the last good checkpoint is kept), and StoppedError after a signal that asked for an end.
    """
    split = Split(recipe.batch_size, recipe.accumulation, accelerator.process_index, accelerator.num_processes)
    draws, parts = Draws(examples, recipe), split.parts()
    model, state = _prepare(unet, objective, recipe, accelerator)
    if start is not None:
        state.restore(start)
    held_out = draws.held_out()
    validate = validation.Validation(
        examples, held_out, objective.scheduler, first_timestep(unet), recipe.batch_size, recipe.seed
    )

    pictures = sheets.open_sheets(objective, recipe, folder, paint)
    estimate.tell(state, objective, draws, recipe, accelerator, say)
    meter = Meter(recipe.batch_size, accelerator.device, share=split.processes)

    with (
        guards.listening() as asked,
        guards.memory_explained(recipe, split.processes),
        checkpoint.writing(folder, recipe.keep) as writer,
        trackers.tracking(recipe, accelerator, folder, state.step) as track,
        draws.ahead(state.step, parts) as stream,
    ):
        for step in range(state.step, recipe.steps):
            # Every process draws the timesteps of all, so that each knows what each has seen.
            everyone = range(step * recipe.batch_size, (step + 1) * recipe.batch_size)
            timesteps, weights = (t.to(accelerator.device) for t in state.timesteps.draw(recipe.seed, everyone))
            _seed_dropout(recipe.seed, everyone[0] + parts[0].start)
            optimizers.set_learning_rate(state.optimizer, learning_rate(step, recipe))

            # Forward and backward, a part at a time. The gradient is that of the mean over the whole batch: processes
            # are averaged by torch, parts add up.
            losses = torch.zeros(recipe.batch_size, device=accelerator.device)
            for part in parts:
                batch, noise = next(stream)
                rows = slice(part.start, part.stop)
                together = contextlib.nullcontext() if part.last else accelerator.no_sync(model)
                with together, accelerator.autocast():
                    terms = objective.terms(
                        model, batch.to(accelerator.device), noise.to(accelerator.device), timesteps[rows]
                    )
                    losses_here = objective.total(terms)
                    mean = (losses_here * weights[rows]).sum() / recipe.batch_size
                    accelerator.backward(mean * split.processes)
                losses[rows] = losses_here.detach()
                meter.add(terms, weights[rows])
            norm = float(accelerator.clip_grad_norm_(model.parameters(), recipe.gradient_clip))

            # What all processes have to know of one another: every sample's loss, and who was asked to stop.
            losses, stop = processes.told(accelerator, losses, asked())
            state.losses.append(float((losses * weights).mean()))
            # Before the weights take it, so that no checkpoint does.
            scaled = accelerator.scaler is not None
            guards.require_finite(state.losses[-1], norm, scaled, step, recipe, folder)
            state.timesteps.observe(timesteps, losses)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            if state.ema is not None:
                state.ema.step()

            # Judge, keep, stop.
            done = _is_done(state, validate, recipe, accelerator, folder)
            pictures.draw(state, done=done)
            if not done and state.ema is not None and _wants_checkpoint(state, recipe, stop):
                writer.save(state.checkpoint(to_dict(recipe), parent))
            told = {"loss": state.losses[-1], **meter.parts(), "grad_norm": norm}
            track(state, told | {"learning_rate": learning_rate(step, recipe)})
            advance(1, **told, **meter.speed())
            if done:
                break
            if stop:
                writer.wait()
                raise StoppedError(state.step, recipe.steps, stop)

    if state.ema is not None:
        state.weights(state.best if recipe.patience else state.ema.shadows)
    accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    unet.eval()
    return state


def _prepare(unet: Any, objective: Objective, recipe: LoopRecipe, accelerator: Accelerator) -> tuple[Any, State]:
    """Return the network as accelerate wraps it, and the state of a training that begins."""
    optimizer = optimizers.open_optimizer(unet.parameters(), recipe, accelerator.device)
    unet.train()
    if recipe.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    if objective.teacher is not None:
        objective.teacher.eval().requires_grad_(False).to(accelerator.device)
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = Ema(unet, recipe.ema_decay, on_cpu=recipe.ema_on_cpu) if accelerator.is_main_process else None
    total = int(objective.scheduler.config.num_train_timesteps)
    timesteps = make_timesteps(recipe.timestep_sampling, first_timestep(unet), total)
    return model, State(unet, optimizer, accelerator.scaler, timesteps, ema, accelerator.num_processes)


def _is_done(
    state: State, validate: validation.Validation, recipe: LoopRecipe, accelerator: Accelerator, folder: Path
) -> bool:
    """Validate where it is time to, and tell whether the training ends here; a DpctlError where it runs away."""
    done = state.step == recipe.steps
    if recipe.validation and (state.step % recipe.validate_every == 0 or done):
        _validate(state, validate, recipe, accelerator)
        done = done or validation.has_stalled(state.validated, recipe.patience)
    if state.step % guards.STEPS_JUDGED == 0:
        guards.require_converging(state.losses, recipe, folder)
    return done


def _wants_checkpoint(state: State, recipe: LoopRecipe, stop: int) -> bool:
    return bool(stop) or (state.step % recipe.checkpoint_every == 0 and guards.is_sound(state.losses, recipe))


def _validate(state: State, validate: validation.Validation, recipe: LoopRecipe, accelerator: Accelerator) -> None:
    """Let the main process judge the averaged weights, and everybody know; keep the best where somebody may want it."""
    losses = torch.zeros(validation.BUCKETS, dtype=torch.float64)
    if state.ema is not None:
        trained = state.weights(state.ema.shadows)
        losses = validate(state.unet, accelerator.device)
        state.weights(trained)
    losses = processes.from_main(accelerator, losses)
    state.validated.append(validation.entry(state.step, losses))
    if recipe.patience and state.ema is not None and validation.is_best(state.validated):
        state.best = [shadow.detach().to("cpu", copy=True) for shadow in state.ema.shadows]


def _seed_dropout(seed: int, index: int) -> None:
    """Make what the network itself draws (dropout) a function of the step, too."""
    torch.manual_seed(sample_generator(seed, index, "dropout").initial_seed())


def learning_rate(step: int, recipe: LoopRecipe) -> float:
    """Return the learning rate of `step`: linear warm-up, then cosine to zero (Loshchilov and Hutter, 2017)."""
    warmup = min(1.0, (step + 1) / max(1, recipe.warmup_steps))
    return recipe.learning_rate * warmup * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
