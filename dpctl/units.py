"""Seconds, bytes and counts as text: the only place where a figure is scaled."""

import math
from decimal import Decimal

_SECONDS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "us"), (1e-9, "ns"))
_BYTES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
_COUNTS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))


def seconds(value: float) -> str:
    """Format a duration in SI units: ``12.3 ms``; above two minutes as ``3 min 20 s`` or ``2 h 05 min``."""
    if math.isfinite(value) and value >= 7200:
        return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"
    if math.isfinite(value) and value >= 120:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return _scaled(value, _SECONDS, "s")


def parse_seconds(text: str) -> float:
    """Read a time with its unit, such as ``12ms`` or ``0.5 s``, into seconds. Raises a ValueError for anything else."""
    for scale, unit in sorted(_SECONDS, key=lambda pair: -len(pair[1])):
        number, found, rest = text.strip().partition(unit)
        if found and not rest:
            return float(number) * scale
    raise ValueError(f"no time with a unit: {text!r}")


def bytes_(value: float) -> str:
    """Format a size in decimal units (1 MB = 10^6 bytes), never MiB under the name of MB."""
    return _scaled(value, _BYTES, "B")


def count(value: float) -> str:
    """Format a count of parameters or operations: ``2.73M``, ``288M``, ``6.05G``."""
    return _scaled(value, _COUNTS, "", space="")


def percent(fraction: float) -> str:
    """Format a fraction as a percentage: 0.4987 -> ``49.9 %``."""
    return f"{100 * fraction:.1f} %"


def ratio(value: float) -> str:
    """Format a speed-up or ratio: ``1.62x``."""
    return f"{value:.2f}x"


def _scaled(value: float, scales: tuple[tuple[float, str], ...], base: str, space: str = " ") -> str:
    """Format three significant digits in the largest unit that the value fills; `base` is the unit of 0 and inf."""
    if not math.isfinite(value) or value == 0:
        return f"{abs(value) if value == 0 else value:g}{space}{base}"
    rounded = float(f"{value:.2e}")  # before the unit is chosen: 999.9 ms is 1 s
    scale, unit = next((pair for pair in scales if abs(rounded) >= pair[0]), scales[-1])
    # Decimal writes 0.0000012 where a float would write 1.2e-06.
    return f"{Decimal(f'{rounded / scale:.3g}'):f}{space}{unit}"
