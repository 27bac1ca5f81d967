"""The speed of light: the FLOP/s that a large matrix product reaches on this machine, now.

A network's own are a fraction of it. It drifts with the machine, so it is measured in the same rounds as the subjects.
"""

import time
from dataclasses import dataclass

import torch

from runtime.denoiser import find_device, synchronize

SMALLEST, LARGEST = 256, {"cpu": 2048, "cuda": 8192}
REPETITIONS = 3
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Peak:
    """What products of two square matrices [size, size] reached, one observation each."""

    device: str
    dtype: str
    threads: int
    size: int
    flops_per_s: tuple[float, ...]


def peak_flops(device: str, threads: int, dtype: str = "float32", seconds: float = 0.3) -> Peak:
    """Measure the peak with the largest product that takes about `seconds`, up to a size where more gains nothing.

    torch's number of threads is what it was afterwards. On a GPU float32 means float32, not TF32.
    """
    target, before = find_device(device), torch.get_num_threads()
    tf32 = torch.backends.cuda.matmul.allow_tf32
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.inference_mode():
            return _measure(target, threads, dtype, seconds)
    finally:
        torch.set_num_threads(before)
        torch.backends.cuda.matmul.allow_tf32 = tf32


def _measure(device: torch.device, threads: int, dtype: str, seconds: float) -> Peak:
    size = SMALLEST
    # Twice the size is eight times the work; the first product of a size also allocates.
    while size < LARGEST[device.type] and 8 * min(_product_s(size, dtype, device, 2)) <= seconds:
        size *= 2
    took = _product_s(size, dtype, device, REPETITIONS + 1)[1:]
    if device.type == "cpu" and dtype == "float32" and torch.backends.mkldnn.is_available():
        took = min(took, _onednn_s(size, REPETITIONS + 1)[1:], key=min)
    return Peak(device.type, dtype, threads, size, tuple(2 * size**3 / latency_s for latency_s in took))


def _product_s(size: int, dtype: str, device: torch.device, count: int) -> list[float]:
    """Return the seconds of each of `count` products of random matrices."""
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator, device=device, dtype=DTYPES[dtype]) for _ in range(2))
    result = torch.empty_like(left)
    took = []
    for _ in range(count):
        synchronize(device)
        began = time.perf_counter()
        torch.mm(left, right, out=result)
        synchronize(device)
        took.append(time.perf_counter() - began)
    return took


def _onednn_s(size: int, count: int) -> list[float]:
    """Return the seconds of each of `count` products by oneDNN, which torch's convolutions run in.

    torch.mm is MKL's, which takes less than half of what an AMD processor has: convolutions then seemed faster than
    light.
    """
    from torch.utils.mkldnn import to_mkldnn

    with torch.inference_mode(mode=False), torch.no_grad():
        layer = to_mkldnn(torch.nn.Linear(size, size, bias=False).eval())
        rows = torch.randn(size, size).to_mkldnn()
        took = []
        for _ in range(count):
            began = time.perf_counter()
            layer(rows)
            took.append(time.perf_counter() - began)
    return took


def fraction(macs: int, attention_macs: int, batch_size: int, latency_s: float, peak: float) -> float:
    """Return a network's FLOP/s over the peak's; a MAC at batch 1 is two FLOPs of every image."""
    return 2 * (macs + attention_macs) * batch_size / latency_s / peak
