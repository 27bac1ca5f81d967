"""What accelerate does for us: precision, devices, and several processes that train one network."""

from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs, broadcast
from torch import Tensor

from dpctl.errors import DpctlError
from dpctl.finetune.draws import Split
from dpctl.recipe import LoopRecipe

# One process may have to encode a data set while the others wait for it.
PATIENCE = timedelta(hours=12)
SUPPORTED = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


def open_accelerator(recipe: LoopRecipe) -> Accelerator:
    """Return what this process trains with; a DpctlError for a launch or a precision that cannot be."""
    # accelerate keeps one precision per process and refuses another: every training has its own.
    AcceleratorState._reset_state()
    accelerator = Accelerator(
        mixed_precision=recipe.mixed_precision,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if recipe.mixed_precision == "fp16" and accelerator.scaler is None:  # it would train in float32 and not say so
        raise DpctlError("mixed precision fp16 needs a GPU", f"the {accelerator.device.type}", "use bf16 or no")
    if accelerator.distributed_type not in SUPPORTED:
        todo = "launch with --multi_gpu, one process per GPU: every process holds the whole network"
        raise DpctlError("this way to distribute a training is not supported", accelerator.distributed_type.value, todo)
    Split(recipe.batch_size, recipe.accumulation, processes=accelerator.num_processes).check()
    return accelerator


def told(accelerator: Accelerator, losses: Tensor, signal: int) -> tuple[Tensor, int]:
    """Return every sample's loss of a step, [B], and the signal that any process was sent; each fills in its own."""
    if accelerator.num_processes == 1:
        return losses, signal
    mine = torch.cat([losses, losses.new_zeros(accelerator.num_processes)])
    mine[len(losses) + accelerator.process_index] = signal
    found = accelerator.reduce(mine, "sum")
    return found[: len(losses)], int(found[len(losses) :].max())


def from_main(accelerator: Accelerator, values: Tensor) -> Tensor:
    """Return the main process's values in all; the others give their shape."""
    if accelerator.num_processes == 1:
        return values
    found: Tensor = broadcast(values.to(accelerator.device))
    return found.to(values.device)
