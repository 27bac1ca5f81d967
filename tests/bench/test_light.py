"""The speed of light: what is measured is a product of the size that is told, and the fraction is arithmetic."""

import pytest
import torch

from dpctl import cost
from dpctl.bench import light
from dpctl.errors import DpctlError


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_peak_is_of_real_products(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]] = []
    multiply = torch.mm

    def watched(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        made.append((left, right, out, torch.get_num_threads()))
        return multiply(left, right, out=out)

    monkeypatch.setattr(torch, "mm", watched)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    before = torch.get_num_threads()
    peak = light.peak_flops("cpu", threads=before + 1, dtype=dtype, seconds=0)
    assert torch.get_num_threads() == before
    assert (peak.device, peak.dtype, peak.threads, peak.size) == ("cpu", dtype, before + 1, light.SMALLEST)
    assert len(peak.flops_per_s) == light.REPETITIONS
    assert all(each > 0 for each in peak.flops_per_s)
    left, right, out, threads = made[-1]
    assert threads == before + 1
    assert left.shape == right.shape == (peak.size, peak.size)
    assert left.dtype == getattr(torch, dtype)
    assert torch.equal(out, left @ right)


def test_time_enough_gives_the_largest_product_and_seconds_become_flops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(light, "_product_s", lambda size, dtype, device, count: [9.0, *[size / 1e6] * (count - 1)])
    monkeypatch.setattr(light, "_onednn_s", lambda size, count: [9.0] * count)
    peak = light.peak_flops("cpu", threads=1, seconds=0.3)
    assert peak.size == light.LARGEST["cpu"]
    assert peak.flops_per_s == (2 * 2048**3 / (2048 / 1e6),) * light.REPETITIONS  # without the first, which warms up
    # Eight times as long would be the next: 8 * 512 / 1e6 s.
    assert light.peak_flops("cpu", threads=1, seconds=8 * 512 / 1e6 - 1e-9).size == 512


def test_the_faster_of_two_libraries_is_the_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(light, "_product_s", lambda size, dtype, device, count: [size / 1e6] * count)
    monkeypatch.setattr(light, "_onednn_s", lambda size, count: [9.0, *[size / 2e6] * (count - 1)])
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert max(light.peak_flops("cpu", threads=1).flops_per_s) == 2 * 2048**3 / (2048 / 2e6)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")
def test_onednn_multiplies_for_real() -> None:
    assert all(each > 0 for each in light._onednn_s(64, 3))


def test_precision_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[float]:
        assert not torch.backends.cuda.matmul.allow_tf32
        raise RuntimeError("no memory")

    monkeypatch.setattr(light, "_product_s", broken)
    before, tf32 = torch.get_num_threads(), torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            light.peak_flops("cpu", threads=before + 1)
        assert torch.backends.cuda.matmul.allow_tf32
        assert torch.get_num_threads() == before
    finally:
        torch.backends.cuda.matmul.allow_tf32 = tf32


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(DpctlError, match="unknown device"):
        light.peak_flops("abacus", threads=1)


def test_the_fraction_is_of_two_flops_per_mac(toy_unet: torch.nn.Module) -> None:
    # 3 GMACs and 1 of attention for each of 5 images in a second: 40 GFLOP/s.
    assert light.fraction(3 * 10**9, 10**9, 5, 1.0, peak=80e9) == pytest.approx(0.5)
    assert light.fraction(3 * 10**9, 10**9, 5, 0.5, peak=80e9) == pytest.approx(1.0)
    # A product of two square matrices is size^3 MACs: a linear layer as large as the peak's runs at the speed of light.
    size, latency_s = 2048, 0.25
    assert light.fraction(size**3, 0, 1, latency_s, peak=2 * size**3 / latency_s) == pytest.approx(1.0)
    macs = cost.macs(toy_unet)
    one, two = (light.fraction(macs.linear, macs.attention, n, 0.01, peak=1e11) for n in (1, 2))
    assert two == pytest.approx(2 * one)
