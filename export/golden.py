"""What torch gives, kept beside the graph: any later machine can check again without the weights.

`unet/golden.safetensors` holds the inputs by their names in the signature and `out_sample`, one row per timestep of a
grid; where the network has conditions, a second half of the rows has the same pictures and timesteps and other
conditions, so that guidance can be checked. `size/...` are a few rows at another size, where that is dynamic;
`sampling/noise` and `sampling/samples` a short sampling run.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import interpolate

from dpctl.diffusion import first_timestep, noise_for
from dpctl.errors import DpctlError
from dpctl.signature import OUTPUT, Signature
from runtime import Denoiser, make_scheduler, sample
from runtime.backends.ort import TORCH

GOLDEN = "unet/golden.safetensors"
POINTS = 8
SIZE, SAMPLING = "size/", "sampling/"
CONDITIONS = ("encoder_hidden_states", "text_embeds", "timestep_cond")
# A short run: what few steps do not show, the grid does.
STEPS, SAMPLES, SCHEDULER, SEED = 8, 2, "ddim", 0


@dataclass(frozen=True)
class Golden:
    """Inputs and torch's outputs: over the grid, at another size (empty if fixed), and of a sampling run [N, ...].

    `samples` is None where torch's own run is not finite.
    """

    grid: dict[str, Tensor]
    other_size: dict[str, Tensor]
    samples: Tensor | None


def make(network: Callable[..., Tensor], denoiser: Denoiser, scheduler: Any, signature: Signature) -> Golden:
    """Return the golden values of a network; a DpctlError where torch itself gives NaN or Inf."""
    timesteps = timestep_grid(scheduler, first=first_timestep(denoiser))
    classes = denoiser.config.get("num_class_embeds")
    grid = with_outputs(network, inputs(signature, timesteps, classes))
    sizes = signature.sizes
    other = {}
    if sizes:
        size = (sizes.bounds[0], sizes.bounds[2])
        with _room_explained(size):
            other = with_outputs(network, inputs(signature, timesteps[[0, -1]], classes, size))
    return Golden(grid, other, sampled(denoiser, scheduler.config, signature, grid))


@contextmanager
def _room_explained(size: tuple[int, int]) -> Iterator[None]:
    """Turn torch's refusal of memory for a size (H, W) into a DpctlError."""
    try:
        yield
    except RuntimeError as problem:
        if "allocate memory" not in str(problem):
            raise
        got = "{}x{} at batch 1".format(*size)
        raise DpctlError(
            "the largest size needs more memory than there is", got, "give a smaller MAX in --dynamic-size"
        ) from None


def timestep_grid(scheduler: Any, points: int = POINTS, first: int = 0) -> Tensor:
    """Return timesteps [T] of the scheduler's own: the first, the last and log-spaced between, and one fraction.

    Early timesteps lie denser: the finest detail is theirs. The fraction is there because schedulers such as Euler
    give some, and a graph that truncates them would pass on whole ones. With a `first` above 0 there is no 0 among
    them: a Fourier embedding takes the logarithm.
    """
    fresh = type(scheduler).from_config(scheduler.config)
    count = int(fresh.config.get("num_train_timesteps", 1000))
    try:
        fresh.set_timesteps(count)
        own = fresh.timesteps.to("cpu", torch.float32).unique()  # sorted upwards
    except ValueError:  # of few steps only (LCM, TCD): what its network was distilled from has them all
        own = torch.arange(count, dtype=torch.float32)
    own = own[own > 0] if first else own
    ranks = torch.logspace(0, math.log10(len(own)), min(points, len(own))).round().long().unique() - 1
    middle = len(own) // 2
    return torch.cat([own[ranks], own[middle - 1 : middle + 1].mean(0, keepdim=True)]).unique()


def inputs(
    signature: Signature, timesteps: Tensor, classes: int | None = None, size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """Return inputs by name, one row per timestep: from smooth pictures with a little noise to pure noise.

    Where there are conditions, the timesteps come twice, with other conditions: the two sides of guidance.
    """
    names = [tensor.name for tensor in signature.inputs]
    guided = any(name in CONDITIONS for name in names)
    rows = range(len(timesteps))
    shape = signature.shape(signature.input("sample"), 1, size)[1:]
    noise = noise_for(0, rows, shape, "golden noise")
    coarse = noise_for(0, rows, (shape[0], 4, 4), "golden picture")
    picture = interpolate(coarse, shape[1:], mode="bicubic").tanh()
    level = (timesteps / timesteps.max()).clamp_min(0.05).sqrt()[:, None, None, None]
    found = {"sample": level * noise + (1 - level.square()).sqrt() * picture, "timestep": timesteps}
    if classes:
        found["class_labels"] = torch.arange(len(timesteps)) % classes
    twice = 2 if guided else 1
    found = {name: value.repeat(twice, *[1] * (value.ndim - 1)) for name, value in found.items()}
    count = twice * len(timesteps)
    for name in names:
        if name in CONDITIONS:
            found[name] = noise_for(0, range(count), signature.input(name).at(1)[1:], f"golden {name}")
    if "time_ids" in names:
        found["time_ids"] = _time_ids(shape[1:], count)
    return found


def _time_ids(size: tuple[int, ...], count: int) -> Tensor:
    """Return SDXL's size conditions [B, 6]: original size, crop, target size, in the pictures' own pixels."""
    height, width = (8.0 * side for side in size)
    return torch.tensor([[height, width, 0.0, 0.0, height, width]]).repeat(count, 1)


def with_outputs(network: Callable[..., Tensor], given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return inputs with torch's `out_sample`, row by row; a DpctlError where torch itself gives NaN or Inf."""
    with torch.inference_mode():
        rows = [
            network(**{name: value[i : i + 1] for name, value in given.items()}) for i in range(len(given["timestep"]))
        ]
    output = torch.cat(rows).clone()
    broken = ~output.flatten(1).isfinite().all(1)
    if broken.any():
        got = f"NaN or Inf at timestep {given['timestep'][broken][0]:g}"
        raise DpctlError(
            "the model itself gives values that are not finite", got, "train or repair the model before exporting it"
        )
    return {**given, OUTPUT: output}


def sampled(
    denoiser: Denoiser, scheduler: Mapping[str, Any], signature: Signature, grid: Mapping[str, Tensor]
) -> Tensor | None:
    """Return what a short DDIM run ends with [N, C, H, W], not clamped: latents have no bounds.

    None where it is not finite, and where what comes out is not what goes in (inpainting, learned variances).
    `scheduler` is the config of the model's own.
    """
    if signature.outputs[0].shape != signature.input("sample").shape:
        return None
    names = [tensor.name for tensor in signature.inputs if tensor.name not in ("sample", "timestep")]
    count = sample_count(signature)
    last: list[Tensor] = []
    size = signature.shape(signature.input("sample"), 1)[2:]
    rows = torch.arange(count) % len(grid["timestep"])
    try:
        sample(
            denoiser,
            make_scheduler(SCHEDULER, {**scheduler, "steps_offset": first_timestep(denoiser)}),
            seed=SEED,
            indices=range(count),
            num_inference_steps=step_count(scheduler),
            conditions={name: grid[name][rows] for name in names},
            size=(size[0], size[1]),
            on_step=lambda _, x_t: last.append(x_t.float().cpu().clone()),
        )
    except DpctlError:  # the samples are not finite
        return None
    return last[-1]


def step_count(scheduler: Mapping[str, Any]) -> int:
    """Return how many steps the short run takes."""
    return min(STEPS, int(scheduler.get("num_train_timesteps", STEPS)))


def sample_count(signature: Signature) -> int:
    """Return how many samples the short run makes: within the exported range."""
    low, _, high = signature.batch
    return max(low, min(high, SAMPLES))


def store(directory: Path, golden: Golden) -> None:
    """Write the golden inputs and outputs."""
    tensors = dict(golden.grid) | {f"{SIZE}{name}": value for name, value in golden.other_size.items()}
    if golden.samples is not None:
        tensors[f"{SAMPLING}samples"] = golden.samples
    # Not save_file: that makes a file which only its owner can read.
    (directory / GOLDEN).write_bytes(save({name: value.contiguous() for name, value in tensors.items()}))


def load(directory: Path, signature: Signature, classes: int | None = None) -> Golden:
    """Read the golden inputs and outputs; a DpctlError for a damaged file or other tensors than the signature's.

    `classes` is how many the network knows, where it knows any.
    """
    path, todo = directory / GOLDEN, "copy the directory again, or export the model again"
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise DpctlError("the golden outputs cannot be read", f"{path}: {problem}", todo) from None
    other = {name.removeprefix(SIZE): value for name, value in tensors.items() if name.startswith(SIZE)}
    grid = {name: value for name, value in tensors.items() if "/" not in name}
    samples = tensors.get(f"{SAMPLING}samples")
    for rows in (grid, *([other] if signature.sizes or other else [])):
        if not fits(signature, rows):
            told = {name: f"{value.dtype} {list(value.shape)}".removeprefix("torch.") for name, value in rows.items()}
            raise DpctlError("the golden outputs are not those of the signature", f"{path}: {json.dumps(told)}", todo)
    wanted = signature.shape(signature.input("sample"), sample_count(signature))
    if samples is not None and (tuple(samples.shape) != wanted or samples.dtype != torch.float32):
        got = f"{path}: samples {samples.dtype} {list(samples.shape)}"
        raise DpctlError("the golden outputs are not those of the signature", got, todo)
    labels = grid.get("class_labels")
    if labels is not None and classes is not None and not ((labels >= 0) & (labels < classes)).all():
        got = f"{path}: class_labels from {int(labels.min())} to {int(labels.max())}, and {classes} classes"
        raise DpctlError("the golden outputs are not those of the network", got, todo)
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise DpctlError("the golden outputs are not finite", f"{path}: {', '.join(broken)}", todo)
    return Golden(grid, other, samples)


def fits(signature: Signature, rows: Mapping[str, Tensor]) -> bool:
    """Tell whether tensors by name are inputs and outputs of a signature: any number of rows, even under guidance."""
    wanted = {tensor.name: tensor for tensor in (*signature.inputs, *signature.outputs)}
    if rows.keys() != wanted.keys() or rows["timestep"].ndim != 1 or rows["sample"].ndim != 4:
        return False
    count, guided = len(rows["timestep"]), any(name in CONDITIONS for name in rows)
    if not count or (guided and count % 2):
        return False
    size = (rows["sample"].shape[2], rows["sample"].shape[3]) if signature.sizes else None
    return all(
        tuple(rows[name].shape) == tensor.at(count, size) and rows[name].dtype == TORCH[tensor.dtype]
        for name, tensor in wanted.items()
    )
