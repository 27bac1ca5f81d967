"""The verdicts of a parity check in words, a line each (stdlib only)."""

from collections.abc import Iterator, Mapping
from typing import Any


def lines(parity: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a manifest says of a check: the verdict with the worst of the grid, then each check by name."""
    yield f"parity {parity['verdict']}" + _worst(parity.get("worst", {}))
    checks = {**parity.get("checks", {}), **{f"component {k}": v for k, v in parity.get("components", {}).items()}}
    width = max((len(name) for name in checks), default=0)
    for name, check in checks.items():
        told = _told(check)
        yield f"  {name:{width}}  {check['verdict']}" + (f": {told}" if told else "")


def _worst(worst: Mapping[str, Any]) -> str:
    """Return where the worst of the grid is, and in which tensor."""
    if "timestep" not in worst:
        return ""
    tensor = f", tensor {worst['tensor']}" if "tensor" in worst else ""
    broken = "" if worst.get("finite", True) else ", NaN or Inf"
    return f"; worst at timestep {worst['timestep']:g}{tensor}{broken}"


def _told(check: Mapping[str, Any]) -> str:
    """Return the figures of one check."""
    if "reason" in check:
        return str(check["reason"])
    if "ssim" in check:
        return f"SSIM {check['ssim']:.4f}, at least {check['at_least']:.4f}; {check['steps']} steps of DDIM"
    if "allowed" in check:
        return f"error {check['error']:.1e}, allowed {check['allowed']:.1e}"
    if "worst" in check:
        return _told(check["worst"])
    found = [f"relative L2 {check['largest_relative_l2']:.1e}"] if "largest_relative_l2" in check else []
    if "headroom" in check:
        found.append(
            f"activations up to {check['headroom_largest']:.3g} ({check['headroom_module']}), float16 ends "
            f"{check['headroom']:.0f} times higher"
        )
    return "; ".join(found)
