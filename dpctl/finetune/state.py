"""Everything that a training changes, as named tensors and back: what makes a resumed run the same run."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from dpctl.errors import DpctlError
from dpctl.finetune import optimizers
from dpctl.finetune.checkpoint import Checkpoint
from dpctl.finetune.timesteps import Timesteps


class Ema:
    """The exponential moving average of the weights (with diffusers' warm-up), on their device or on the CPU."""

    def __init__(self, unet: Any, decay: float, *, on_cpu: bool) -> None:
        self._unet, self._on_cpu = unet, on_cpu
        self.average = EMAModel(unet.parameters(), decay=decay, use_ema_warmup=True, power=0.75, foreach=True)
        if on_cpu:
            self.average.to("cpu")

    def step(self) -> None:
        """Take in the weights of another step."""
        self.average.step(self._weights())

    def _weights(self) -> list[nn.Parameter]:
        weights = list(self._unet.parameters())
        if not self._on_cpu:
            return weights
        # Of a tensor that needs no gradient the average would be a copy.
        return [nn.Parameter(p.detach().cpu(), requires_grad=p.requires_grad) for p in weights]

    @property
    def shadows(self) -> list[Tensor]:
        """Return the average of every parameter, in their order."""
        shadows: list[Tensor] = self.average.shadow_params
        return shadows

    def restore(self, shadows: dict[str, Tensor], step: int) -> None:
        """Go on from the averages of a checkpoint after `step` steps."""
        named = self._unet.named_parameters()
        self.average.shadow_params = [shadows[name].to("cpu" if self._on_cpu else p.device) for name, p in named]
        self.average.optimization_step = step


@dataclass
class State:
    """The network in training and what goes with it. Only the main process has an `ema`, and the `best` of it."""

    unet: Any
    optimizer: Any
    scaler: Any
    timesteps: Timesteps
    ema: Ema | None = None
    processes: int = 1
    best: list[Tensor] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    validated: list[dict[str, Any]] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Return how many steps were made."""
        return len(self.losses)

    def tensors(self) -> dict[str, Tensor]:
        """Return copies of all tensors on the CPU, by names that `restore` knows."""
        assert self.ema is not None
        names = [name for name, _ in self.unet.named_parameters()]
        found = {f"model.{name}": tensor for name, tensor in self.unet.state_dict().items()}
        found |= {f"ema.{name}": shadow for name, shadow in zip(names, self.ema.shadows, strict=True)}
        found |= {f"best.{name}": shadow for name, shadow in zip(names, self.best, strict=False)}
        found |= {f"optimizer.{name}": value for name, value in optimizers.tensors(self.optimizer).items()}
        found |= {f"timesteps.{name}": value for name, value in self.timesteps.state().items()}
        if self.scaler is not None:
            found |= {f"scaler.{key}": torch.as_tensor(value) for key, value in self.scaler.state_dict().items()}
        return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in found.items()}

    def checkpoint(self, recipe: dict[str, Any], parent: str | None) -> Checkpoint:
        """Return what a run can go on from; later steps do not change it."""
        return Checkpoint(self.step, recipe, list(self.losses), self.tensors(), parent, list(self.validated))

    def restore(self, start: Checkpoint) -> None:
        """Go on from a checkpoint; a DpctlError where it is of another network."""
        try:
            self.unet.load_state_dict(start.part("model"))
        except RuntimeError as problem:
            got = str(problem).splitlines()[-1].strip()
            raise DpctlError("the checkpoint belongs to another network", got, "start again without --resume") from None
        if self.ema is not None:
            self.ema.restore(start.part("ema"), start.step)
            best = start.part("best")
            self.best = [best[name] for name, _ in self.unet.named_parameters()] if best else []
        optimizers.restore(self.optimizer, start.part("optimizer"))
        self.timesteps.restore(start.part("timesteps"))
        if self.scaler is not None:
            self.scaler.load_state_dict({key: tensor.item() for key, tensor in start.part("scaler").items()})
        self.losses, self.validated = list(start.losses), list(start.validated)

    def weights(self, shadows: Sequence[Tensor]) -> list[Tensor]:
        """Put other weights into the network and return copies of those that were there."""
        parameters = list(self.unet.parameters())
        before = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for parameter, shadow in zip(parameters, shadows, strict=True):
                parameter.copy_(shadow)
        return before
