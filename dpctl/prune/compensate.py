"""Compensation: after the cut, refit each layer to give what it gave in the unpruned network. Closed form, no training.

He, Zhang, Sun, *Channel Pruning for Accelerating Very Deep Neural Networks* (ICCV 2017), section 3.1: given the inputs
X that a layer has in the slim network and the outputs Y that it had in the whole one, least squares gives the weights.
The layers are fitted in the order of computation, so that each also makes up for the error of those before it
(asymmetric reconstruction: Zhang, Zou, He, Sun, TPAMI 2016). All of it takes two forward passes over one batch, whose
timesteps are spread over the whole schedule: a fit on the early ones lowers the loss more and spoils the pictures.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dpctl import progress
from dpctl.cost import positions
from dpctl.data import TrainingSet
from dpctl.diffusion import first_timestep, noise_for, sample_generator
from dpctl.errors import DpctlError
from dpctl.models import Model
from dpctl.prune.branches import Branch, gone
from dpctl.prune.probe import open_probe, takes_data
from dpctl.prune.surgery import Kept, temperature
from dpctl.recipe import PruneRecipe
from dpctl.signature import unet_arguments

# Ridge on the change of the weights, in units of the inputs' mean square.
RIDGE = 1e-2
# Rows of the regression for each unknown of an output, and the least and the most of them.
ROWS_PER_UNKNOWN, LEAST_ROWS, MOST_ROWS = 12, 8_192, 32_768
# A layer with more inputs than this (channels times kernel) has its channels refitted, not every tap of its kernel,
# which keeps the normal equations small: 128 channels of a 3x3 kernel still go whole.
WIDEST = 1_200
# Outputs of the unpruned network that are remembered at one time.
REMEMBERED_BYTES = 1 << 28
# Images that the layers are fitted on, in units of the scoring's batch: without gradients that many more take about the
# memory of a training step.
BATCHES = 8
# Below this a layer gives what it gave already (rounding), and stays as it is.
NO_ERROR = 1e-5


@dataclass(frozen=True)
class Fit:
    """Relative error |Y - Y_slim| / |Y| of a layer's outputs (a wide one's inputs) before it is refitted and after."""

    before: float
    after: float


def compensates(recipe: PruneRecipe, has_data: bool, source: Model) -> bool:
    """Tell whether to compensate: as the recipe says, else where there is data, read anyway or given, that fits."""
    if recipe.compensate is not None:
        return recipe.compensate
    return has_data or (recipe.data != PruneRecipe.data and takes_data(source))


def make_up(
    unet: Any, small: Any, kept: Kept, scheduler: Any, images: TrainingSet, recipe: PruneRecipe, bar: progress.Bar
) -> dict[str, Any]:
    """Compensate `small`, in place, on images of the data; return what that gave, as plain values.

    The denoising loss of images drawn anew decides, with noise that nothing was fitted on: where it does not fall,
    `small` stays as it was cut.
    """
    count = BATCHES * recipe.batch_size
    probe = open_probe(
        unet, scheduler, images, count=recipe.batch_size, timesteps=BATCHES, seed=recipe.seed, stream="compensate-probe"
    )
    losses = {"unpruned": probe.loss(unet), "cut": probe.loss(small)}
    cut = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    with bar("compensate", len(fittable(unet, small))) as advance:
        inputs = calibration(unet, scheduler, images, count, recipe.seed)
        fits = compensate(unet, small, kept, inputs, seed=recipe.seed, advance=advance)
    with suppress(DpctlError):  # it is not finite any more
        losses["compensated"] = probe.loss(small)
    used = losses.get("compensated", math.inf) < losses["cut"]
    if not used:
        small.load_state_dict(cut)
    return {
        "used": used,
        "data": images.name,
        "images": count,
        "loss": losses,
        "layers": {name: [fit.before, fit.after] for name, fit in fits.items()},
    }


def calibration(unet: Any, scheduler: Any, images: TrainingSet, count: int, seed: int) -> dict[str, Tensor]:
    """Return noisy samples [B, C, H, W], their timesteps [B], evenly over the schedule, and their conditions.

    All by their names as inputs.
    """
    order = torch.randperm(len(images), generator=sample_generator(seed, 0, "compensate-images")).tolist()
    device = next(unet.parameters()).device
    seen = images.plain([order[i % len(order)] for i in range(count)]).to(device)
    noise = noise_for(seed, range(count), seen.clean.shape[1:], "compensate-noise").to(device)
    total = int(scheduler.config.num_train_timesteps)
    timesteps = torch.tensor([(2 * i + 1) * total // (2 * count) for i in range(count)], device=device)
    timesteps = timesteps.clamp(first_timestep(unet), total - 1)
    noisy = scheduler.add_noise(seen.clean, noise, timesteps)
    return {"sample": noisy, "timestep": timesteps, **seen.conditions}


class _Rows:
    """The positions of a layer that its regression looks at: the same in both networks, drawn from the layer's name."""

    def __init__(self, name: str, whole: Any, layer: Any, seed: int) -> None:
        self.name, self.layer, self._seed = name, layer, seed
        unknowns = layer.weight[0].numel() + int(layer.bias is not None)
        self.wide = unknowns > WIDEST
        unknowns = layer.weight.shape[1] if self.wide else unknowns
        self._wanted = min(MOST_ROWS, max(LEAST_ROWS, ROWS_PER_UNKNOWN * unknowns))
        self.bytes = 4 * self._wanted * whole.weight.shape[1 if self.wide else 0]

    def _index(self, total: int, device: torch.device) -> Tensor:
        if total <= self._wanted:
            return torch.arange(total, device=device)
        generator = sample_generator(self._seed, 0, f"compensate/{self.name}")
        return torch.randperm(total, generator=generator)[: self._wanted].to(device)

    def pick(self, tensor: Tensor) -> Tensor:
        """Return rows [R, C] of a layer's input or output [B, C, H, W] or [..., C]."""
        flat = (tensor.movedim(1, -1) if isinstance(self.layer, nn.Conv2d) else tensor).flatten(0, -2)
        return flat[self._index(len(flat), flat.device)]

    def read(self, given: Tensor) -> Tensor:
        """Return what the rows of the layer's output are computed from, [R, C] or [R, C * k * k] of an input."""
        if not isinstance(self.layer, nn.Conv2d):
            return self.pick(given)
        vertical, horizontal = (int(p) for p in self.layer.padding)
        padded = nn.functional.pad(given, (horizontal, horizontal, vertical, vertical))
        windows = padded.unfold(2, self.layer.kernel_size[0], self.layer.stride[0])
        windows = windows.unfold(3, self.layer.kernel_size[1], self.layer.stride[1])  # a view, [B, C, H', W', k, k]
        height, width = windows.shape[2:4]
        index = self._index(len(given) * height * width, given.device)
        return windows[index // (height * width), :, index // width % height, index % width].flatten(1)


def compensate(
    unet: Any,
    small: Any,
    kept: Kept,
    inputs: Mapping[str, Tensor],
    *,
    seed: int = 0,
    advance: progress.Advance = progress.silent,
) -> dict[str, Fit]:
    """Refit the layers of `small`, in place, to `unet` on one batch of `inputs` (named as in the signature).

    `small` is `unet` cut at the `kept` positions. Returns the fit of every layer that was changed.
    """
    arguments = unet_arguments(dict(inputs))
    fits = _leave_means(unet, small, kept, arguments)
    layers = [_Rows(name, unet.get_submodule(name), small.get_submodule(name), seed) for name in fittable(unet, small)]

    for portion in _portions(layers):
        remembered = _remember(unet, portion, arguments)

        def refit(rows: _Rows, remembered: dict[str, Tensor] = remembered) -> Any:
            def hook(layer: Any, given: tuple[Tensor, ...]) -> None:
                outputs = remembered.pop(rows.name, None)
                if outputs is None:
                    return
                fit = _refit(rows, unet, small, kept, given[0], outputs)
                if fit is not None:
                    fits[rows.name] = fit
                advance(1)

            return rows.layer.register_forward_pre_hook(hook)

        # Each layer is fitted when its turn comes, on what the layers before it, fitted already, hand to it.
        _run(small, arguments, [refit(rows) for rows in portion])
    return fits


def _leave_means(unet: Any, small: Any, kept: Kept, arguments: Mapping[str, Any]) -> dict[str, Fit]:
    """Let what is left of each branch that went add the mean of what the branch added, channel by channel."""
    fits: dict[str, Fit] = {}

    def leave(branch: Branch) -> Any:
        def hook(layer: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            flat = (output.movedim(1, -1) if isinstance(layer, nn.Conv2d) else output).flatten(0, -2)
            flat = flat[:, kept[f"{branch.block}.out"].to(flat.device)]
            bias, size = small.get_submodule(branch.block).bias, float(flat.norm())
            before = float((flat - bias.flatten()).norm()) / size if size else 0.0
            if not NO_ERROR <= before < math.inf:
                return
            bias.copy_(flat.mean(0).reshape(bias.shape))
            fits[branch.block] = Fit(before, float((flat - bias.flatten()).norm()) / size)

        return unet.get_submodule(branch.last).register_forward_hook(hook)

    removed = gone(unet, kept)
    if removed:
        _run(unet, arguments, [leave(branch) for branch in removed])
    return fits


def _refit(rows: _Rows, unet: Any, small: Any, kept: Kept, given: Tensor, remembered: Tensor) -> Fit | None:
    whole = unet.get_submodule(rows.name)
    kept_in, kept_out = (
        kept.get(f"{rows.name}.{side}", torch.arange(size)).to(given.device)
        for side, size in (("in", whole.weight.shape[1]), ("out", whole.weight.shape[0]))
    )
    factor = temperature(unet, small, rows.name)
    if rows.wide:
        return _refit_channels(rows, whole, given, remembered, kept_in, kept_out, factor)
    return _refit_layer(rows, given, factor * remembered[:, kept_out])


def fittable(unet: Any, small: Any) -> list[str]:
    """Return the layers that can be refitted, in the order of computation."""
    there = dict(small.named_modules())
    return [name for name in positions(unet) if name in there and _can_be_fitted(there[name])]


def _can_be_fitted(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Conv2d):
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
        return plain and layer.groups == 1 and layer.dilation == (1, 1)
    return isinstance(layer, nn.Linear)


def _portions(samples: Sequence[_Rows]) -> Iterator[list[_Rows]]:
    """Yield the layers in their order, as many together as may be remembered."""
    portion, held = list[_Rows](), 0
    for rows in samples:
        if portion and held + rows.bytes > REMEMBERED_BYTES:
            yield portion
            portion, held = [], 0
        portion.append(rows)
        held += rows.bytes
    if portion:
        yield portion


def _remember(unet: Any, portion: Sequence[_Rows], arguments: Mapping[str, Any]) -> dict[str, Tensor]:
    """Run the unpruned network; return the rows of each layer's outputs, or of a wide layer's inputs.

    A layer that is called more than once has no one output, and is not among them: it stays as it was cut.
    """
    remembered, calls = dict[str, Tensor](), Counter[str]()

    def remember(rows: _Rows) -> Any:
        def hook(layer: Any, given: tuple[Tensor, ...], output: Tensor) -> None:
            calls[rows.name] += 1
            remembered[rows.name] = rows.pick(given[0] if rows.wide else output)

        return unet.get_submodule(rows.name).register_forward_hook(hook)

    _run(unet, arguments, [remember(rows) for rows in portion])
    return {name: tensor for name, tensor in remembered.items() if calls[name] == 1}


@torch.no_grad()
def _run(unet: Any, arguments: Mapping[str, Any], hooks: Sequence[Any]) -> None:
    try:
        unet(**arguments)
    finally:
        for hook in hooks:
            hook.remove()


def _refit_layer(rows: _Rows, given: Tensor, outputs: Tensor) -> Fit | None:
    """Fit weights and bias of a layer to `outputs` [R, O]; None where it gives them already."""
    layer, read = rows.layer, _with_ones(rows.layer, rows.read(given))
    weights = layer.weight.flatten(1).T
    if layer.bias is not None:
        weights = torch.cat([weights, layer.bias[None]])
    solved, fit = _ridge(read, weights, outputs)
    if fit is not None:
        count = layer.weight[0].numel()
        layer.weight.copy_(solved[:count].T.reshape(layer.weight.shape))
        if layer.bias is not None:
            layer.bias.copy_(solved[count])
    return fit


def _refit_channels(
    rows: _Rows, whole: Any, given: Tensor, inputs: Tensor, kept_in: Tensor, kept_out: Tensor, factor: float
) -> Fit | None:
    """Express the whole layer's `inputs` [R, C] by the slim one's, position by position, folded into the weights.

    Every tap of the kernel gets the same mixture of channels, so that the unknowns are the channels alone.
    """
    layer, read = rows.layer, _with_ones(rows.layer, rows.pick(given))
    mixture = torch.zeros(read.shape[1], inputs.shape[1], device=read.device)  # what the cut takes: channel for channel
    mixture[torch.arange(len(kept_in)), kept_in] = 1.0
    mixture, fit = _ridge(read, mixture, inputs)
    if fit is not None:
        weights = whole.weight[kept_out]
        layer.weight.copy_(factor * torch.einsum("oc...,dc->od...", weights, mixture[: len(kept_in)]))
        if layer.bias is not None:
            constant = weights.flatten(2).sum(2) if weights.ndim > 2 else weights
            layer.bias.copy_(factor * (whole.bias[kept_out] + constant @ mixture[-1]))
    return fit


def _with_ones(layer: Any, read: Tensor) -> Tensor:
    return read if layer.bias is None else torch.cat([read, torch.ones_like(read[:, :1])], 1)


def _ridge(read: Tensor, start: Tensor, wanted: Tensor) -> tuple[Tensor, Fit | None]:
    """Return W [N, O] near `start` with least |read W - wanted|, of [R, N] and [R, O], and the fit.

    The fit is None, and W the `start`, where there is no error, or none that could be told (NaN or Inf).
    """
    error, size = wanted - read @ start, float(wanted.norm())
    before = float(error.norm()) / size if size else 0.0
    if not NO_ERROR <= before < math.inf:
        return start, None
    normal = (read.T @ read).double()
    normal.diagonal().add_(RIDGE * max(float(normal.diagonal().mean()), 1e-12))
    change = torch.cholesky_solve((read.T @ error).double(), torch.linalg.cholesky(normal)).to(start.dtype)
    return start + change, Fit(before, float((error - read @ change).norm()) / size)
