"""The gate: torch against the exported graph, over a grid of timesteps, two batch sizes, guidance and a sampling run.

A verdict is passed, failed or not run here. What one machine cannot show, another one may: `dpctl verify` repeats it
from the golden file, without the original model.
"""

import math
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dpctl import artifact, recorded, registry
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError, GateError
from dpctl.signature import OUTPUT, Signature
from export import golden as golden_file
from export.golden import Golden
from runtime import BACKENDS, Denoiser
from runtime.denoiser import find_device

FP32 = "fp32"
PASSED, FAILED, NOT_RUN = "passed", "failed", "not run here"
# float32 with TF32 off: the largest error as a fraction of what it is an error of, see `compare`.
TOLERANCE = 1e-4
# Lower precisions are held to this many times torch's own error at that precision, timestep by timestep.
TIMES_TORCH = 1.5
TF32, TF32_ERROR = "tf32", 2e-3
GUIDANCE = 7.5
# Least structural similarity of the samples of a short run; below float32, as far as torch's own falls short of 1.
SSIM = 0.999

Rows = list[dict[str, Any]]


def measure(
    denoiser: Denoiser,
    golden: Golden,
    signature: Signature,
    scheduler: Mapping[str, Any],
    yardstick: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Run everything golden through a denoiser; return the parity as plain JSON values.

    `scheduler` is the config of the model's own. `yardstick` is torch's own error at a lower precision (see
    `export.half`); without one, float32 is asked for.
    """
    own = yardstick or {}
    grid = golden.grid
    sizes = batch_sizes(signature, len(grid["timestep"]))
    outputs = [in_batches(denoiser, grid, signature, size) for size in sizes]
    rows = judged([compare(output, grid[OUTPUT]) for output in outputs], own.get("relative_l2"))
    rows = [{"timestep": float(t), **row} for t, row in zip(grid["timestep"], rows, strict=True)]
    checks = {
        "grid": check_rows(rows),
        "guidance": _guidance(outputs, grid, own),
        "other size": _other_size(denoiser, golden, signature, own),
        "sampling": _sampling(denoiser, golden, signature, scheduler, own),
    }
    return {
        "verdict": overall(checks),
        "worst": max(rows, key=_excess),
        "batch_sizes": sizes,
        "timesteps": rows,
        "checks": checks,
    }


def overall(checks: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the verdict of several: what was not run here fails nothing."""
    return FAILED if any(check["verdict"] == FAILED for check in checks.values()) else PASSED


def batch_sizes(signature: Signature, rows: int) -> list[int]:
    """Return the smallest batch size of the exported range and a larger one."""
    low, _, high = signature.batch
    return sorted({low, max(low, min(high, rows))})


def compare(output: Tensor, expected: Tensor) -> Rows:
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


def judged(runs: list[Rows], own: list[float] | None, times: float = 1.0) -> Rows:
    """Return of every row the worst run, with its `error` and what is `allowed`.

    In float32 the error is the larger of relative L2 and largest error over std, and the tolerance is allowed, `times`
    over. Below it, where single values are rounded by much more, it is relative L2, and TIMES_TORCH torch's `own`, or
    the mean of its own.
    """
    # One row's error is a matter of chance: none is held to less than the mean of torch's own. Where that is not finite
    # nothing is allowed.
    finite = [error for error in own or () if error is not None]
    limits = [max(error, sum(finite) / len(finite)) if error is not None else 0.0 for error in own or ()]
    rows = []
    for number, at_sizes in enumerate(zip(*runs, strict=True)):
        errors = [row["relative_l2"] if own else max(row["relative_l2"], row["max_over_std"]) for row in at_sizes]
        worst = max(range(len(errors)), key=errors.__getitem__)
        allowed = TIMES_TORCH * limits[number] if own else times * TOLERANCE
        rows.append({**at_sizes[worst], "error": errors[worst], "allowed": allowed})
    return rows


def guided(output: Tensor) -> Tensor:
    """Return u + GUIDANCE (c - u), where the first half of the rows is c and the second u."""
    conditional, unconditional = output.chunk(2)
    return unconditional + GUIDANCE * (conditional - unconditional)


def is_guided(rows: Mapping[str, Tensor]) -> bool:
    """Tell whether golden rows hold the two sides of guidance."""
    return any(name in golden_file.CONDITIONS for name in rows)


def structural_similarity(samples: Tensor, expected: Tensor) -> float:
    """Return the smallest SSIM of samples [N, C, H, W] to those expected, -1 where they are not finite.

    Source: torchmetrics, with a window of 11 pixels or what fits.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if not samples.isfinite().all():
        return -1.0
    side = min(11, *expected.shape[-2:])
    spread = float(expected.max() - expected.min()) or 1.0
    found = structural_similarity_index_measure(
        samples, expected, gaussian_kernel=False, kernel_size=side - 1 + side % 2, data_range=spread, reduction="none"
    )
    return float(torch.as_tensor(found).min())


def _excess(row: Mapping[str, Any]) -> float:
    excess = row["error"] / row["allowed"] if row["finite"] and row["allowed"] else math.inf
    return math.inf if math.isnan(excess) else excess  # which max would pass over


def check_rows(rows: Rows) -> dict[str, Any]:
    """Return the verdict on some rows, with the largest error and what is allowed for it."""
    worst = max(rows, key=_excess)
    return {"verdict": PASSED if _excess(worst) <= 1 else FAILED, "error": worst["error"], "allowed": worst["allowed"]}


def _not_run(reason: str) -> dict[str, Any]:
    return {"verdict": NOT_RUN, "reason": reason}


def _guidance(outputs: list[Tensor], grid: Mapping[str, Tensor], own: Mapping[str, Any]) -> dict[str, Any]:
    if not is_guided(grid):
        return _not_run("the network has no conditions to be guided by")
    expected = guided(grid[OUTPUT])
    runs = [compare(guided(output), expected) for output in outputs]
    # What guidance makes of an error of each side at most.
    return check_rows(judged(runs, own.get("guided_relative_l2"), times=2 * GUIDANCE - 1))


def _other_size(denoiser: Denoiser, golden: Golden, signature: Signature, own: Mapping[str, Any]) -> dict[str, Any]:
    rows = golden.other_size
    if not rows:
        return _not_run("height and width are fixed")
    low = signature.batch[0]
    output = in_batches(denoiser, rows, signature, low)
    return check_rows(judged([compare(output, rows[OUTPUT])], own.get("other_size_relative_l2")))


def _sampling(
    denoiser: Denoiser, golden: Golden, signature: Signature, scheduler: Mapping[str, Any], own: Mapping[str, Any]
) -> dict[str, Any]:
    if golden.samples is None:
        return _not_run("torch's own short run is not finite, or this network's output is no sample")
    found = golden_file.sampled(denoiser, scheduler, signature, golden.grid)
    similarity = -1.0 if found is None else structural_similarity(found, golden.samples)
    torchs = own.get("samples_ssim", 1.0)
    least = 1 - max(1 - SSIM, TIMES_TORCH * (1 - torchs))
    # -1 stands for samples that are not finite: torch's own allow nothing.
    verdict = PASSED if similarity >= least and min(similarity, torchs) > -1 else FAILED
    return {
        "verdict": verdict,
        "ssim": similarity,
        "at_least": least,
        "steps": golden_file.step_count(scheduler),
    }


def gate(parity: Mapping[str, Any], where: Path) -> None:
    """Raise a GateError unless everything that ran has passed."""
    if parity["verdict"] == PASSED:
        return
    worst = parity["worst"]
    checks = parity["checks"] | {f"component {name}": part for name, part in parity.get("components", {}).items()}
    failed = [told(name, check) for name, check in checks.items() if check["verdict"] == FAILED]
    tensor = f"; worst tensor {worst['tensor']}" if "tensor" in worst else ""
    got = (
        f"{where}: {', '.join(failed)}; worst at {_place(worst)}: relative L2 "
        f"{worst['relative_l2']:.2e}, largest error {worst['max_over_std']:.2e} of the output's std"
        + ("" if worst["finite"] else ", NaN or Inf")
        + tensor
    )
    raise GateError(
        "the exported graph does not give torch's outputs",
        got,
        "do not use it; look at it with --keep-failed, and export with --precision fp32 or bf16, or report it",
    )


def _place(worst: Mapping[str, Any]) -> str:
    return f"timestep {worst['timestep']:g}" if "timestep" in worst else f"{worst['output']}, batch {worst['batch']}"


def told(name: str, check: Mapping[str, Any]) -> str:
    """Return a check as a few words."""
    if "worst" in check:  # of a component
        return f"{told(name, check['worst'] | {'verdict': check['verdict']})} at {_place(check['worst'])}"
    if check["verdict"] == NOT_RUN:
        return f"{name} not run here ({check['reason']})"
    if "ssim" in check:
        return f"{name} {check['verdict']} (SSIM {check['ssim']:.4f}, at least {check['at_least']:.4f})"
    if "error" in check:
        return f"{name} {check['verdict']} (error {check['error']:.1e}, tolerance {check['allowed']:.1e})"
    return f"{name} {check['verdict']}" + (f" ({check['reason']})" if "reason" in check else "")


def verify_directory(
    path: Path, *, backend: str = "ort", threads: int | None = None, device: str | None = None
) -> dict[str, Any]:
    """Check an exported directory against its manifest and its golden values; return the parity measured here.

    Raises a DpctlError for files that are missing, changed or damaged, and a GateError for a breach.
    """
    from dpctl.models import load_scheduler

    with opened(path, backend, threads=threads, device=device) as (denoiser, manifest):
        earlier = recorded_parity(path, manifest)
        signature = Signature.from_json(manifest.signature)
        if golden_file.GOLDEN not in manifest.files:
            got, todo = f"{path}: {golden_file.GOLDEN} has no digest in the manifest", "export the model again"
            raise DpctlError("nothing says that the golden outputs are the model's", got, todo)
        golden = golden_file.load(path, signature, denoiser.config.get("num_class_embeds"))
        scheduler = load_scheduler(path).config
        own = recorded_yardstick(path, earlier, golden)
        label = {"precision": TF32} if getattr(denoiser, "precision", "") == TF32 else {}
        measured = measure(denoiser, golden, signature, scheduler, tf32_yardstick(golden) if label else own)
        place = on_device(earlier["precision"], backend, denoiser.device)
    # What the export found and cannot be measured here, torch's own overflow among it, still counts.
    checks = earlier.get("checks", {}) | measured["checks"] | place
    verdict = overall(checks | earlier.get("components", {}))
    parity = {**earlier, **label, **measured, "checks": checks, "verdict": verdict}
    gate(parity, path)
    return parity


@contextmanager
def opened(
    path: Path, backend: str = "ort", *, threads: int | None = None, device: str | None = None
) -> Iterator[tuple[Denoiser, Manifest]]:
    """Open an exported directory to be checked, one that failed too, with its manifest.

    On the processor, whose kernels leave out most roundings of float16 and do not know bfloat16, ONNX Runtime is given
    the same graph with every rounding written into it.
    """
    from runtime.backends import ort

    module = registry.load(BACKENDS, backend, "backend")
    if not module.RUNS_EXPORTED:
        raise DpctlError("this backend does not run exported directories", backend, "verify with ort, ov or trt")
    manifest = ort.exported(path)
    precision = (manifest.parity or {}).get("precision", FP32)
    if backend != "ort" or precision == FP32 or find_device(device).type != "cpu":
        with module.open_denoiser(path, threads=threads, device=device, failed=True) as denoiser:
            yield denoiser, manifest
        return
    artifact.verify_files(path, manifest)
    with (
        checkable(path, manifest) as graph,
        ort.open_graph(path, graph, manifest, threads, find_device("cpu")) as denoiser,
    ):
        yield denoiser, manifest


@contextmanager
def checkable(path: Path, manifest: Manifest) -> Iterator[Path]:
    """Give the graph that a processor can check: the directory's own; below float32 with its roundings written in."""
    from runtime.backends.ort import graph_of

    graph = graph_of(path, manifest)
    if (manifest.parity or {}).get("precision", FP32) == FP32:
        yield graph
        return
    with tempfile.TemporaryDirectory() as folder:
        with artifact.no_space_left_explained(Path(folder), "set TMPDIR to a folder with more of it"):
            write_emulated(graph, Path(folder) / "emulated.onnx")
        yield Path(folder) / "emulated.onnx"


def tf32_yardstick(golden: Golden) -> dict[str, Any]:
    """Return what an engine in TF32 is held to: its products round their inputs to 10 bits, as float16 does.

    No processor computes in TF32; 2e-3 is what torch's own float16 errs by at most on the models measured so far
    (docs/export.md).
    """
    rows = len(golden.grid["timestep"])
    return {
        "relative_l2": [TF32_ERROR] * rows,
        "guided_relative_l2": [(2 * GUIDANCE - 1) * TF32_ERROR] * rows,
        "other_size_relative_l2": [TF32_ERROR] * rows,
        "samples_ssim": 1 - 2 * (1 - SSIM),
    }


def write_emulated(graph: Path, out: Path) -> None:
    """Write the graph that shows on a processor how a lower precision rounds."""
    import onnx_ir as ir

    from export.precision import emulated

    model = emulated(ir.load(graph))
    ir.save(model, out, external_data=f"{out.name}.data")


def on_device(precision: str, backend: str, device: torch.device) -> dict[str, Any]:
    """Return the check that says where the graph ran, and what that leaves open."""
    if device.type == "cpu" and precision != FP32:
        reason = "a processor shows the rounding of the graph, not a GPU's kernels: `dpctl verify --device cuda` there"
        return {"device": _not_run(reason)}
    return {"device": {"verdict": PASSED, "reason": f"{backend} on {device.type}"}}


def recorded_parity(path: Path, manifest: Manifest) -> dict[str, Any]:
    """Return the parity in a manifest; a DpctlError where there is none, or one of another precision."""
    parity = manifest.parity or {}
    if "precision" not in parity:
        raise DpctlError("the manifest holds no parity", str(path), "export the model again")
    recorded.precision_of(manifest, path)
    return parity


def recorded_yardstick(path: Path, parity: Mapping[str, Any], golden: Golden) -> dict[str, Any] | None:
    """Return torch's own error in a recorded parity, None in float32; a DpctlError unless it is of the golden rows."""
    own, wanted = parity.get("yardstick"), {}
    if parity["precision"] != FP32:
        rows = len(golden.grid["timestep"])
        wanted = {"relative_l2": rows}
        if not (own or {}).get("first_non_finite"):  # else the rest was not measured
            wanted |= {"guided_relative_l2": rows // 2} if is_guided(golden.grid) else {}
            wanted |= {"other_size_relative_l2": len(golden.other_size["timestep"])} if golden.other_size else {}
    found = {name: len(errors) for name, errors in (own or {}).items() if name.endswith("relative_l2")}
    if found != wanted or (own is None) != (parity["precision"] == FP32):
        got = f"{path}: errors {found or 'none'}, where the golden outputs make it {wanted or 'none'}"
        raise DpctlError("torch's own error is not of these golden outputs", got, "export the model again")
    return own


def in_batches(denoiser: Denoiser, rows: Mapping[str, Tensor], signature: Signature, size: int) -> Tensor:
    """Return the output of every row, computed `size` rows at a time; rows of one batch differ in their timestep."""
    count = len(rows["timestep"])
    outputs = []
    for start in range(0, count, size):
        chosen = torch.arange(start, start + size) % count  # the last batch is filled up from the start
        inputs = {tensor.name: rows[tensor.name][chosen] for tensor in signature.inputs}
        outputs.append(denoiser(**inputs).cpu())
    return torch.cat(outputs)[:count]
