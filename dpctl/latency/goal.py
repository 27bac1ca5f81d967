"""What a latency target asks for: a share of the unpruned model's latency, or a time."""

import math
from dataclasses import dataclass

from dpctl import registry, units
from dpctl.bench.subjects import ENGINES
from dpctl.errors import DpctlError
from dpctl.recipe import LATENCIES_OF, EngineRecipe, ExportRecipe, LatencyRecipe
from runtime import BACKENDS
from runtime.denoiser import find_device
from runtime.schedulers import check_scheduler

WHAT = "give a fraction of the unpruned model's latency, such as 0.5, or a time with its unit, such as 12ms"


@dataclass(frozen=True)
class Goal:
    """A share of the unpruned model's latency, or a time in seconds; one of them is set."""

    share: float | None = None
    latency_s: float | None = None

    def of(self, baseline_s: float) -> float:
        """Return the share that is asked for, given what the unpruned model takes."""
        return self.share if self.share is not None else (self.latency_s or 0.0) / baseline_s


def read_goal(text: str) -> Goal:
    """Read a target. Raises a DpctlError for what is neither a fraction in (0, 1) nor a positive time."""
    try:
        value = float(text)
    except ValueError:
        pass
    else:
        if 0.0 < value < 1.0:
            return Goal(share=value)
        raise DpctlError("--target-latency is outside (0, 1)", text, WHAT)
    try:
        latency_s = units.parse_seconds(text)
    except ValueError:
        raise DpctlError("--target-latency is no fraction and no time", repr(text), WHAT) from None
    if not 0.0 < latency_s < math.inf:
        raise DpctlError("--target-latency is no time that a network can take", text, WHAT)
    return Goal(latency_s=latency_s)


def require_backend(recipe: LatencyRecipe) -> None:
    """Raise a DpctlError that says what is missing, library or GPU, where a recipe's backend cannot run here."""
    module = registry.load(BACKENDS, recipe.backend, "backend")
    if recipe.backend == ENGINES:
        from export.to_tensorrt import check as check_engine

        module.find_gpu(None)
        check_engine(EngineRecipe(), recipe.precision)
    else:
        module.require()
    if (recipe.backend, recipe.precision) == ("ort", "bf16") and find_device(None).type == "cpu":
        got = f"{recipe.backend}, {recipe.precision}, no GPU"
        raise DpctlError("ONNX Runtime has next to no bfloat16 on a processor", got, "ask for --precision fp32")


def check(recipe: LatencyRecipe) -> Goal:
    """Return the goal of a recipe. Raises a DpctlError for anything in it that cannot be measured."""
    from export.to_onnx import check as check_export

    goal = read_goal(recipe.target)
    registry.check(BACKENDS, recipe.backend, "backend")
    if not registry.load(BACKENDS, recipe.backend, "backend").RUNS_EXPORTED:
        exported = [n for n in registry.names(BACKENDS) if registry.load(BACKENDS, n, "backend").RUNS_EXPORTED]
        todo = f"choose one of: {', '.join(exported)}"
        raise DpctlError("a latency target is for a backend that runs exported networks", recipe.backend, todo)
    registry.choose(LATENCIES_OF, recipe.of, "kind of latency")
    check_export(ExportRecipe(precision=recipe.precision))
    check_scheduler(recipe.scheduler)
    idle = {name: getattr(recipe, name) for name in ("num_inference_steps", "scheduler")}
    if recipe.of == "unet" and idle != {name: getattr(LatencyRecipe(), name) for name in idle}:
        got = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in idle.items())
        raise DpctlError(
            "a call of the network takes no steps", got, "leave them out, or time images: --latency-of image"
        )
    if recipe.model is not None and recipe.of != "unet":
        got = f"a latency of {recipe.of}, and {recipe.model}"
        raise DpctlError("a latency file is of calls of the network", got, "leave --latency-of or --latency-model out")
    threads = 1 if recipe.threads is None else recipe.threads
    numbers = (recipe.batch_size, recipe.num_inference_steps, threads)
    if min(numbers) < 1:
        got = f"batch {recipe.batch_size}, steps {recipe.num_inference_steps}, threads {recipe.threads}"
        raise DpctlError("a number of the latency target is below 1", got, "give 1 or more")
    return goal
