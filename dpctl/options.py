"""The options that several commands share, as Typer sees them: a name, a type and a line of help each."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from dpctl.errors import DpctlError
from dpctl.recipe import EngineRecipe, LatencyRecipe

R = TypeVar("R")

ModelArgument = Annotated[
    str, typer.Argument(help="A model directory, a Hub id, or the word reference.", show_default=False)
]
RecipeArgument = Annotated[
    Path | None, typer.Argument(help="A TOML recipe; the reference model without one.", show_default=False)
]
SweepArgument = Annotated[
    Path | None, typer.Argument(help="A TOML recipe of the grid; the reference without one.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", help="The directory to write; must not exist.", show_default=False)]
EngineOut = Annotated[
    Path | None, typer.Option("--out", help="The directory to write; the engine's own without.", show_default=False)
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe, print it (and a cheap plan) as JSON and touch nothing.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Data = Annotated[str, typer.Option("--data", help="A folder of images, an .npz, datasets:NAME[:SPLIT] or reference.")]
Steps = Annotated[int, typer.Option("--steps", help="Optimizer steps.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images per step.")]
LearningRate = Annotated[
    float, typer.Option("--learning-rate", help="Peak learning rate of AdamW (warm-up, then cosine).")
]
MixedPrecision = Annotated[str, typer.Option("--mixed-precision", help="no, bf16 or fp16.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")]
EmaDecay = Annotated[float, typer.Option("--ema-decay", help="Decay of the exponential moving average of the weights.")]
CheckpointEvery = Annotated[int, typer.Option("--checkpoint-every", help="Steps between two checkpoints.")]
Prompt = Annotated[
    str | None, typer.Option("--prompt", help="What a text-conditional pipeline is to draw.", show_default=False)
]
GuidanceScale = Annotated[
    float | None,
    typer.Option(
        "--guidance-scale", help="How strongly the prompt guides; default: the pipeline's.", show_default=False
    ),
]
Prompts = Annotated[
    str | None,
    typer.Option(
        "--prompts", help="A text file with what text-conditional models are to draw, one per line.", show_default=False
    ),
]
MaxRegression = Annotated[
    float | None,
    typer.Option(
        "--max-regression", help="Fraction that a figure may become worse by, else exit 3.", show_default=False
    ),
]
SchedulerOption = Annotated[
    str, typer.Option("--scheduler", help="ddim, ddpm, dpm-solver++, euler, euler-ancestral or lcm.")
]
Baselines = Annotated[
    str, typer.Option("--baselines", help="Backends that the baseline alone is measured on too, comma-separated.")
]
FewerSteps = Annotated[
    bool,
    typer.Option(
        "--fewer-steps/--no-fewer-steps", help="The baseline also with as many steps as fit into a candidate's time."
    ),
]

Layout = Annotated[
    str, typer.Option("--layout", help="free, or stock: one width per level, a plain diffusers class without code.")
]
Scope = Annotated[
    str, typer.Option("--scope", help="local (one ratio for every group), global (one ranking over all) or auto.")
]
Floor = Annotated[float, typer.Option("--floor", help="Fraction of its channels that each group keeps, scope global.")]
Keep = Annotated[str | None, typer.Option("--keep", help="Globs over module names, comma-separated: these stay whole.")]
Only = Annotated[
    str | None, typer.Option("--only", help="Globs over module names, comma-separated: only these are cut.")
]
Heads = Annotated[
    bool, typer.Option("--heads", help="Take whole attention heads, not a part of each; --layout stock always does.")
]
NormGroups = Annotated[
    bool, typer.Option("--norm-groups", help="Take whole GroupNorm groups where they fit, not a part of each.")
]
Depth = Annotated[
    bool,
    typer.Option("--depth", help="Whole residual branches, attentions and transformer blocks may go, where that pays."),
]
Sensitivity = Annotated[
    bool, typer.Option("--sensitivity", help="Scan how the denoising loss reacts to cuts in one group at a time.")
]
Picture = Annotated[
    Path | None,
    typer.Option("--picture", help="Draw the widths (or the scan) into this .svg or .png file.", show_default=False),
]
Criterion = Annotated[str, typer.Option("--criterion", help="random, magnitude, taylor, diff-pruning or fisher.")]
Weighting = Annotated[
    str, typer.Option("--weighting", help="Timesteps that count: threshold, uniform, early, or auto: the criterion's.")
]
Ratio = Annotated[
    float | None, typer.Option("--ratio", help="Fraction of the channels that goes from every norm group.")
]
TargetMacs = Annotated[float | None, typer.Option("--target-macs", help="MACs as a fraction of the unpruned model's.")]
TargetParams = Annotated[
    float | None, typer.Option("--target-params", help="Parameters as a fraction of the unpruned model's.")
]
TargetLatency = Annotated[
    str | None,
    typer.Option("--target-latency", help="A fraction of the unpruned model's latency, e.g. 0.5, or a time: 12ms."),
]
LatencyBackend = Annotated[
    str | None, typer.Option("--backend", help="What the latency is of: ort (default), ov or trt.", show_default=False)
]
LatencyPrecision = Annotated[
    str | None,
    typer.Option("--precision", help="Of the timed network: fp32 (default), fp16, bf16.", show_default=False),
]
LatencyBatch = Annotated[
    int | None, typer.Option("--latency-batch", help="Images that are timed at once; default 1.", show_default=False)
]
LatencyOf = Annotated[
    str | None,
    typer.Option("--latency-of", help="unet (a call of the network, default) or image.", show_default=False),
]
LatencySteps = Annotated[
    int | None,
    typer.Option("--num-inference-steps", help="Steps of an image; default 20.", show_default=False),
]
LatencyThreads = Annotated[
    int | None, typer.Option("--threads", help="Threads of the timed network; default torch's.", show_default=False)
]
LatencyModel = Annotated[
    str | None,
    typer.Option("--latency-model", help="Plan by this file of `dpctl profile`.", show_default=False),
]
Threshold = Annotated[
    float, typer.Option("--threshold", help="T of diff-pruning: timesteps with L_t / L_max > T count.")
]
Reduction = Annotated[str, typer.Option("--reduction", help="sum-abs or abs-sum: how w * g is reduced over a channel.")]
Images = Annotated[int, typer.Option("--images", help="Images that are scored on, with a noise and a timestep each.")]
Batch = Annotated[
    int,
    typer.Option("--batch-size", help="Images in memory at a time; compensation takes 8 batches, without gradients."),
]
Accumulation = Annotated[int, typer.Option("--accumulation", help="Batches that make one gradient.")]
Timesteps = Annotated[
    int, typer.Option("--timesteps", help="Parts of the schedule, each of which counts or not as a whole.")
]
Compensate = Annotated[
    bool | None,
    typer.Option(
        "--compensate/--no-compensate",
        help="Refit what is left to the unpruned activations; by default where there is data.",
        show_default=False,
    ),
]

Features = Annotated[
    str | None,
    typer.Option(
        "--features",
        help="An ONNX network, images in [-1, 1] to features, for FID and KID; see docs/quality.md.",
        show_default=False,
    ),
]
RealImages = Annotated[
    str | None,
    typer.Option(
        "--real-images",
        help="What --features compares with: images as for --data, or the statistics.npz that an earlier run wrote.",
        show_default=False,
    ),
]
Clip = Annotated[
    str | None,
    typer.Option(
        "--clip",
        help="A directory with a CLIP model (safetensors) that scores pictures against their prompts.",
        show_default=False,
    ),
]

DynamicSize = Annotated[
    str | None,
    typer.Option(
        "--dynamic-size",
        help="MIN,OPT,MAX of the UNet's own height and width (latents count an eighth); fixed without.",
        show_default=False,
    ),
]
Components = Annotated[
    bool, typer.Option("--components", help="Export the VAE's decoder and the text encoders too: whole images.")
]
KeepFailed = Annotated[
    bool, typer.Option("--keep-failed", help="Keep what did not pass the parity check, to look at it; exits 3 anyway.")
]

Trt = Annotated[bool, typer.Option("--trt/--no-trt", help="Build a TensorRT engine from the graph too.")]
TrtFlavor = Annotated[
    str,
    typer.Option(
        "--trt-flavor",
        help="tensorrt (for the GPU here), rtx (ahead of time, without one) or auto: what this machine can do.",
    ),
]
ComputeCapability = Annotated[
    list[str] | None,
    typer.Option(
        "--compute-capability",
        help="GPUs that a rtx engine is for, e.g. 8.9,12.0; all from 8.0 on without.",
        show_default=False,
    ),
]
Workspace = Annotated[
    float | None, typer.Option("--workspace", help="GiB of scratch memory that one layer may take at most.")
]
OptimizationLevel = Annotated[
    int | None, typer.Option("--optimization-level", help="0 (quick build) to 5; the library's own without.")
]
VersionCompatible = Annotated[
    bool, typer.Option("--version-compatible", help="Later versions of TensorRT run it too, by their lean runtime.")
]
HardwareCompatible = Annotated[
    bool, typer.Option("--hardware-compatible", help="Every GPU from Ampere on runs it, not only the one here.")
]
Refit = Annotated[bool, typer.Option("--refit", help="New weights can be put into it: see dpctl refit.")]
Tf32 = Annotated[bool, typer.Option("--tf32/--no-tf32", help="Round float32 products to TF32: a precision of its own.")]


def names(text: str) -> tuple[str, ...]:
    """Parse ``eager,ort``."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def patterns(text: str | None) -> tuple[str, ...]:
    """Parse ``mid_block.*,conv_in``; an empty one is kept, so that it is refused and does not count as not given."""
    return () if text is None else tuple(pattern.strip() for pattern in text.split(","))


def integers(text: str, option: str) -> tuple[int, ...]:
    """Parse ``1,8,64``; a mistake is a usage error (exit 2)."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a list of whole numbers like 1,8", param_hint=option) from None
    if min(numbers) < 1:
        raise typer.BadParameter(f"{text!r} holds a number below 1", param_hint=option)
    return numbers


def three(text: str, option: str) -> tuple[int, int, int]:
    """Parse ``1,8,64``; another number of numbers is a usage error (exit 2)."""
    found = integers(text, option)
    if len(found) != 3:
        raise typer.BadParameter(f"{text!r} is not MIN,OPT,MAX, e.g. 1,8,64", param_hint=option)
    return found[0], found[1], found[2]


def engine(trt: bool, **given: Any) -> EngineRecipe | None:
    """Build the recipe of an engine; a DpctlError for options of one that is not asked for."""
    listed = given.pop("compute_capability") or ()
    # An empty one is kept, so that it is refused: it would stand for every GPU.
    capabilities = tuple(name for text in listed for name in patterns(text))
    asked = EngineRecipe(compute_capability=capabilities, **given)
    if trt:
        return asked
    fields = dataclasses.fields(asked)
    options = [field.name for field in fields if getattr(asked, field.name) != field.default]
    if options:
        got = ", ".join(option.replace("_", " ") for option in options)
        raise DpctlError("options of an engine, but none is to be built", got, "add --trt, or leave them out")
    return None


# What the entries of a latency target are called as options of `dpctl prune`.
OF_LATENCY = {
    "target_latency": "target",
    "backend": "backend",
    "precision": "precision",
    "latency_batch": "batch_size",
    "latency_of": "of",
    "num_inference_steps": "num_inference_steps",
    "threads": "threads",
    "latency_model": "model",
}


def latency(given: dict[str, Any]) -> LatencyRecipe | None:
    """Build the recipe of a latency target from a command's options; a DpctlError for those of one not asked for."""
    found = {entry: given[name] for name, entry in OF_LATENCY.items() if given[name] is not None}
    if "target" in found:
        return LatencyRecipe(**found)
    if found:
        got, todo = ", ".join(found).replace("_", " "), "add --target-latency, or leave them out"
        raise DpctlError("options of a latency target, but there is none", got, todo)
    return None


def refuse_decided(context: typer.Context, model: str) -> None:
    """Raise a DpctlError for options of the graph, where an exported directory already has one."""
    own = {"context", "model", "out", "force", "json_", "trt", "trt_flavor", "workspace"}
    own |= {field.name for field in dataclasses.fields(EngineRecipe)}
    given = [name for name in context.params if name not in own and _source(context, name) != "DEFAULT"]
    if given:
        got = f"{', '.join('--' + name.replace('_', '-') for name in given)} for {model}, which is exported already"
        raise DpctlError("the graph is not made again for an engine", got, "leave them out, or export the model itself")


def _source(context: typer.Context, name: str) -> str:
    source = context.get_parameter_source(name)
    return "DEFAULT" if source is None else source.name


def recipe(kind: type[R], given: dict[str, Any], **parsed: Any) -> R:
    """Build a recipe from a command's options, which have the names of its entries; `parsed` ones take precedence."""
    entries = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in (given | parsed).items() if name in entries})
