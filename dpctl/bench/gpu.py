"""What an NVIDIA GPU says of itself, by NVML: energy, clocks and what holds them back."""

from typing import Any

import torch

# Reasons that are no sign of trouble: nothing to do, and clocks that were set by the user.
HARMLESS = ("GpuIdle", "ApplicationsClocksSetting", "UserDefinedClocks")


class Meter:
    """A GPU's counters; on the processor, and where NVML or a counter is missing, every answer is None."""

    def __init__(self, device: torch.device) -> None:
        self._nvml, self._handle = _opened(device)

    def energy_j(self) -> float | None:
        """Return the joules that the whole GPU has taken since its driver was loaded."""
        millijoules = self._ask("nvmlDeviceGetTotalEnergyConsumption")
        return None if millijoules is None else millijoules / 1000

    def state(self) -> dict[str, Any] | None:
        """Return the clock (Hz), its highest, and the names of what holds it back, if anything."""
        if self._nvml is None:
            return None
        clock, highest = (
            self._ask(name, self._nvml.NVML_CLOCK_SM)
            for name in ("nvmlDeviceGetClockInfo", "nvmlDeviceGetMaxClockInfo")
        )
        bits = self._ask("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        return {
            "clock_hz": None if clock is None else clock * 10**6,
            "highest_clock_hz": None if highest is None else highest * 10**6,
            "held_back_by": [name for name, bit in self._reasons().items() if bits & bit and name not in HARMLESS],
        }

    def _reasons(self) -> dict[str, int]:
        start = "nvmlClocksThrottleReason"
        values = {name.removeprefix(start): getattr(self._nvml, name) for name in dir(self._nvml) if start in name}
        # One bit each: None and All are no reasons.
        return {name: bit for name, bit in values.items() if isinstance(bit, int) and bit and not bit & (bit - 1)}

    def _ask(self, name: str, *more: Any) -> Any:
        if self._nvml is None:
            return None
        try:
            return getattr(self._nvml, name)(self._handle, *more)
        except self._nvml.NVMLError:  # this GPU has no such counter
            return None


def _opened(device: torch.device) -> tuple[Any, Any]:
    """Return NVML and its handle of a GPU; by its UUID, since NVML does not know of CUDA_VISIBLE_DEVICES."""
    if device.type != "cuda":
        return None, None
    try:
        import pynvml
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(uuid)
    except pynvml.NVMLError:
        return None, None
