"""Print what an export costs, in time, peak memory and parity: `export_cost.py [cifar-10|stable-diffusion]`.

The networks are the paper's for CIFAR-10 and Stable Diffusion 1.x's at latents of 16x16, with random weights. Each step
is one `dpctl export` in a process of its own, from the start of Python to the directory; then both are done by one
command. Engines are TensorRT-RTX's for compute capabilities 8.9 and 12.0. The peak of one process is the system's own
figure; that of the command with its steps the largest sum over them, looked up 20 times a second (proportional set
size). A few minutes; the larger one takes 12 GB of memory and as much of the disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel
from opset_comparison import CIFAR
from pruning_sizes import SD

from dpctl import cost
from dpctl.models import write_pipeline
from dpctl.units import bytes_, seconds

HEADS = (
    "precision", "to ONNX", "peak memory", "to an engine", "peak memory", "both at once", "peak memory", "graph",
    "engine", "worst error", "allowed",
)  # fmt: skip


NETWORKS: dict[str, Callable[[], Any]] = {
    "cifar-10": lambda: UNet2DModel(**CIFAR),
    "stable-diffusion": lambda: UNet2DConditionModel(**SD | {"sample_size": 16}),
}


def save_network(name: str, directory: Path) -> int:
    """Write a network and return the bytes of its weights."""
    torch.manual_seed(0)
    unet = NETWORKS[name]()
    write_pipeline(directory, unet=unet, scheduler=DDPMScheduler(clip_sample=False))
    return 4 * cost.parameters(unet)


def run(*words: str) -> list[str]:
    """Run a dpctl command in a process of its own; return its wall time and its peak memory."""
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "dpctl", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"dpctl {' '.join(words)} failed: run it by itself")
    return [seconds(time.perf_counter() - began), bytes_(used.ru_maxrss * 1024)]


def run_both(*words: str) -> list[str]:
    """Run a dpctl command that starts others; return its wall time and the peak memory of all together."""
    began, peak = time.perf_counter(), 0
    with subprocess.Popen(
        [sys.executable, "-m", "dpctl", *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            peak = max(peak, sum(map(resident, family(process.pid))))
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"dpctl {' '.join(words)} failed: run it by itself")
    return [seconds(time.perf_counter() - began), bytes_(peak)]


def family(process: int) -> list[int]:
    """Return a process and all below it."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    except OSError:  # it has just ended
        return []
    return [process, *(each for child in children for each in family(int(child)))]


def resident(process: int) -> int:
    """Return the bytes of a process, of what it shares its part."""
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def export(model: Path, out: Path, precision: str) -> list[str]:
    """Export to ONNX, then build the engine; return the cells of a line."""
    graph = run("export", str(model), "--out", str(out), "--precision", precision)
    targets = ["--trt", "--trt-flavor", "rtx", "--compute-capability", "8.9,12.0"]
    engine = run("export", str(out), "--out", str(out), "--force", *targets)
    both = run_both("export", str(model), "--out", str(out), "--force", "--precision", precision, *targets)
    manifest: dict[str, Any] = json.loads((out / "dpctl.json").read_text())
    (about,) = manifest["stats"]["engines"].values()
    worst = manifest["parity"]["worst"]
    sizes = [bytes_(manifest["stats"]["bytes"]), bytes_(about["size_bytes"])]
    return [precision, *graph, *engine, *both, *sizes, f"{worst['error']:.1e}", f"{worst['allowed']:.1e}"]


def main() -> int:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("network", choices=NETWORKS, nargs="?", default="cifar-10")
    chosen = parser.parse_args().network
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        weights = save_network(chosen, folder / "model")
        print(f"weights {bytes_(weights)}; 4 times that and 1 GB: {bytes_(4 * weights + 10**9)}\n")
        print(f"| {' | '.join(HEADS)} |")
        print("|---" * len(HEADS) + "|")
        for precision in ("fp32", "fp16", "bf16"):
            print(f"| {' | '.join(export(folder / 'model', folder / precision, precision))} |", flush=True)
            shutil.rmtree(folder / precision)
    return 0


if __name__ == "__main__":
    sys.exit(main())
