"""Torch against the exported graph, over a grid of timesteps and two batch sizes: the gate.

What torch gave is kept as `unet/golden.safetensors`, so that any later machine can check again without the weights.
"""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from torch.nn.functional import interpolate

from dpctl import artifact
from dpctl.diffusion import noise_for
from dpctl.errors import DpctlError, GateError
from dpctl.signature import OUTPUT, Signature
from runtime import Denoiser, open_denoiser

GOLDEN = "unet/golden.safetensors"
POINTS = 8
# Largest error allowed, as a fraction of what it is an error of: see `compare`.
TOLERANCES = {"fp32": 1e-4}
NOT_RUN = "not run here"


def timestep_grid(scheduler: Any, points: int = POINTS) -> Tensor:
    """Return timesteps [T] of the scheduler's own: the first, the last and log-spaced between, and one fraction.

    Early timesteps lie denser: the finest detail is theirs. The fraction is there because schedulers such as Euler
    give some, and a graph that truncates them would pass on whole ones.
    """
    fresh = type(scheduler).from_config(scheduler.config)
    fresh.set_timesteps(int(fresh.config.get("num_train_timesteps", 1000)))
    own = fresh.timesteps.to("cpu", torch.float32).unique()  # sorted upwards
    ranks = torch.logspace(0, math.log10(len(own)), min(points, len(own))).round().long().unique() - 1
    middle = len(own) // 2
    return torch.cat([own[ranks], own[middle - 1 : middle + 1].mean(0, keepdim=True)]).unique()


def golden_inputs(signature: Signature, timesteps: Tensor, classes: int | None = None) -> dict[str, Tensor]:
    """Return inputs by name, one row per timestep: from smooth pictures with a little noise to pure noise."""
    rows = range(len(timesteps))
    shape = signature.input("sample").at(1)[1:]
    noise = noise_for(0, rows, shape, "golden noise")
    coarse = noise_for(0, rows, (shape[0], 4, 4), "golden picture")
    picture = interpolate(coarse, shape[1:], mode="bicubic").tanh()
    level = (timesteps / timesteps.max()).clamp_min(0.05).sqrt()[:, None, None, None]
    inputs = {"sample": level * noise + (1 - level.square()).sqrt() * picture, "timestep": timesteps}
    if classes:
        inputs["class_labels"] = torch.arange(len(timesteps)) % classes
    return inputs


def make_golden(network: Callable[..., Tensor], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return `inputs` with torch's `out_sample`, row by row; a DpctlError where torch itself gives NaN or Inf."""
    with torch.inference_mode():
        rows = [
            network(**{name: value[i : i + 1] for name, value in inputs.items()})
            for i in range(len(inputs["timestep"]))
        ]
    output = torch.cat(rows).clone()
    broken = ~output.flatten(1).isfinite().all(1)
    if broken.any():
        got = f"NaN or Inf at timestep {inputs['timestep'][broken][0]:g}"
        raise DpctlError(
            "the model itself gives values that are not finite", got, "train or repair the model before exporting it"
        )
    return {**inputs, OUTPUT: output}


def measure(denoiser: Denoiser, golden: Mapping[str, Tensor], signature: Signature, tolerance: float) -> dict[str, Any]:
    """Run the golden inputs at the smallest and a larger batch size; return the parity as plain JSON values."""
    expected, timesteps = golden[OUTPUT], golden["timestep"]
    low, _, high = signature.batch
    sizes = sorted({low, max(low, min(high, len(timesteps)))})
    runs = [compare(_in_batches(denoiser, golden, signature, size), expected) for size in sizes]
    worst = [max(at_sizes, key=_error) for at_sizes in zip(*runs, strict=True)]
    rows = [{"timestep": float(t), **row} for t, row in zip(timesteps, worst, strict=True)]
    return {
        "verdict": "passed" if all(_error(row) <= tolerance for row in rows) else "failed",
        "tolerance": tolerance,
        "worst": max(rows, key=_error),
        "batch_sizes": sizes,
        "timesteps": rows,
    }


def compare(output: Tensor, expected: Tensor) -> list[dict[str, Any]]:
    """Return the errors of each row: relative L2, largest absolute one, that one over the output's std, finiteness."""
    rows = []
    for found, wanted in zip(output.double(), expected.double(), strict=True):
        difference, finite = found - wanted, bool(found.isfinite().all())
        largest = float(difference.abs().max()) if finite else math.inf
        tiny = torch.finfo(torch.float32).tiny
        relative = float(difference.norm() / wanted.norm().clamp_min(tiny)) if finite else math.inf
        scale = max(float(wanted.std()), tiny)
        rows.append({"relative_l2": relative, "max_abs": largest, "max_over_std": largest / scale, "finite": finite})
    return rows


def gate(parity: Mapping[str, Any], where: Path) -> None:
    """Raise a GateError unless the parity passed."""
    if parity["verdict"] == "passed":
        return
    worst = parity["worst"]
    got = (
        f"{where}: at timestep {worst['timestep']:g} relative L2 {worst['relative_l2']:.2e}, largest error "
        f"{worst['max_over_std']:.2e} of the output's std; tolerance {parity['tolerance']:.0e}"
        + ("" if worst["finite"] else "; NaN or Inf")
    )
    raise GateError(
        "the exported graph does not give torch's outputs", got, "do not use it; report it with the model's config"
    )


def verify_directory(path: Path, *, threads: int | None = None) -> dict[str, Any]:
    """Check an exported directory against its manifest and its golden outputs; return the parity measured here.

    Raises a DpctlError for files that are missing, changed or damaged, and a GateError for a breach.
    """
    with open_denoiser(path, "ort", threads=threads) as denoiser:
        manifest = artifact.read_manifest(path)
        if (
            manifest is None
            or manifest.signature is None
            or not isinstance((manifest.parity or {}).get("tolerance"), float)
        ):
            raise DpctlError("the manifest holds no parity", str(path), "export the model again")
        recorded = manifest.parity or {}
        signature = Signature.from_json(manifest.signature)
        golden = load_golden(path, signature)
        parity = {**recorded, **measure(denoiser, golden, signature, recorded["tolerance"])}
    gate(parity, path)
    return parity


def save_golden(directory: Path, golden: Mapping[str, Tensor]) -> None:
    """Write the golden inputs and outputs."""
    # Not save_file: that makes a file which only its owner can read.
    (directory / GOLDEN).write_bytes(save({name: value.contiguous() for name, value in golden.items()}))


def load_golden(directory: Path, signature: Signature) -> dict[str, Tensor]:
    """Read the golden inputs and outputs; a DpctlError for a damaged file or other tensors than the signature's."""
    path, todo = directory / GOLDEN, "copy the directory again, or export the model again"
    try:
        golden = load_file(path)
    except (OSError, SafetensorError) as problem:
        raise DpctlError("the golden outputs cannot be read", f"{path}: {problem}", todo) from None
    tensors = {tensor.name: tensor for tensor in (*signature.inputs, *signature.outputs)}
    shapes = {name: tuple(value.shape) for name, value in golden.items()}
    rows = len(golden.get("timestep", ()))
    if not rows or shapes != {name: tensor.at(rows) for name, tensor in tensors.items()}:
        raise DpctlError("the golden outputs are not those of the signature", f"{path}: {json.dumps(shapes)}", todo)
    return golden


def _error(row: Mapping[str, Any]) -> float:
    return max(row["relative_l2"], row["max_over_std"])


def _in_batches(denoiser: Denoiser, golden: Mapping[str, Tensor], signature: Signature, size: int) -> Tensor:
    """Return the output of every row, computed `size` rows at a time; rows of one batch differ in their timestep."""
    count = len(golden["timestep"])
    outputs = []
    for start in range(0, count, size):
        rows = torch.arange(start, start + size) % count  # the last batch is filled up from the start
        inputs = {tensor.name: golden[tensor.name][rows] for tensor in signature.inputs}
        outputs.append(denoiser(**inputs).cpu())
    return torch.cat(outputs)[:count]
