"""Where the time of one forward pass goes, by the module that asked for it, as a backend's own profiler tells it.

The nodes of an exported graph are called `<module path>/<operator>`; what a backend makes of several keeps one of their
names, or joins them with ` + `. What no module asked for (a change of memory layout, say) has the name "".
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dpctl.signature import Signature

JOINED = " + "


@dataclass(frozen=True)
class LayerTime:
    """The time of one kind of operator in one module during one forward pass: the median over runs."""

    name: str
    kind: str
    latency_s: float


def layer_times(passes: Iterable[Iterable[LayerTime]]) -> tuple[LayerTime, ...]:
    """Return the median over passes of the time of every module and kind, in the order in which they first ran.

    What ran several times in a pass is added up first; in a pass where something did not run it took no time. Profiles
    of several rounds are passes too: so two subjects can take turns.
    """
    sums: list[dict[tuple[str, str], float]] = []
    for each in passes:
        total: dict[tuple[str, str], float] = {}
        for part in each:
            total[part.name, part.kind] = total.get((part.name, part.kind), 0.0) + part.latency_s
        sums.append(total)
    keys = dict.fromkeys(key for total in sums for key in total)
    return tuple(LayerTime(*key, median(total.get(key, 0.0) for total in sums)) for key in keys)


def module_of(node: str) -> str:
    """Return the path of the module that a node of an exported graph belongs to; "" where its name tells none."""
    path, slash, _ = node.partition("/")
    return path if slash else ""


def modules_of(nodes: Iterable[str]) -> str:
    """Return the modules that the nodes behind one kernel belong to, joined, each once."""
    return JOINED.join(dict.fromkeys(path for node in nodes if (path := module_of(node))))


def random_inputs(signature: Signature, config: Mapping[str, Any], batch_size: int) -> dict[str, Tensor]:
    """Return seeded inputs by name that any network takes: the time does not depend on their values."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for tensor in signature.inputs:
        shape = signature.shape(tensor, batch_size)
        if tensor.dtype == "int64":
            found[tensor.name] = torch.randint(config.get("num_class_embeds") or 1, shape, generator=generator)
        elif tensor.name == "timestep":
            # From 1: a Fourier embedding takes the logarithm.
            last = int(config.get("num_train_timesteps") or 1000)
            found[tensor.name] = torch.randint(1, last, shape, generator=generator).float()
        else:
            found[tensor.name] = torch.randn(shape, generator=generator)
    return found
