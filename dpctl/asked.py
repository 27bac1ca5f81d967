"""What was asked of a latency and what came of it, in words: of a manifest's `latency`, for reports."""

from collections.abc import Iterator
from typing import Any

from dpctl import units

UNMEASURED = "by a model of another machine, not measured"


def goal(found: dict[str, Any]) -> str:
    """Return what was asked, of what, and where."""
    asked = found["asked"]
    what = "a call of the network" if asked["of"] == "unet" else f"images in {asked['num_inference_steps']} steps"
    size = "x".join(map(str, asked["size"]))
    where = f"{asked['backend']}, {asked['precision']}, {asked['batch_size']} images ({asked['rows']} rows) of {size}"
    if "threads" in asked:  # it is in what an older dpctl wrote where it was asked for
        where += f", {asked['threads']} threads"
    return f"{asked['target']} of {what}: {asked['share']:.3f} on {where}"


def candidates(found: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """Yield MACs, predicted and measured latency of each candidate, shares of the unpruned one's, and the chosen one.

    What is not known is empty.
    """
    for number, build in enumerate(found["builds"]):
        measured = ""
        if "ratio" in build:
            took = f"{units.seconds(build['latency_s'])} of {units.seconds(build['baseline_latency_s'])}"
            measured = f"{build['ratio']:.3f} [{build['low']:.3f}, {build['high']:.3f}], {took}"
        predicted = f"{build['predicted']:.3f}" if "predicted" in build else ""
        yield units.percent(build["macs"]), predicted, measured, number == found["chosen"]
