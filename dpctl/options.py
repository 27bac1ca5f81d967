"""The options that several commands share, as Typer sees them: a name, a type and a line of help each."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

R = TypeVar("R")

ModelArgument = Annotated[
    str, typer.Argument(help="A model directory, a Hub id, or the word reference.", show_default=False)
]
Out = Annotated[Path, typer.Option("--out", help="The directory to write; must not exist.", show_default=False)]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing output.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Check the recipe, print it (and a cheap plan) as JSON and touch nothing.")
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything random.")]
Data = Annotated[str, typer.Option("--data", help="A folder of images, an .npz with the array images, or reference.")]
Steps = Annotated[int, typer.Option("--steps", help="Optimizer steps.")]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images per step.")]
LearningRate = Annotated[
    float, typer.Option("--learning-rate", help="Peak learning rate of AdamW (warm-up, then cosine).")
]
MixedPrecision = Annotated[str, typer.Option("--mixed-precision", help="no, bf16 or fp16.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint, if there is one.")]
EmaDecay = Annotated[float, typer.Option("--ema-decay", help="Decay of the exponential moving average of the weights.")]
CheckpointEvery = Annotated[int, typer.Option("--checkpoint-every", help="Steps between two checkpoints.")]
SchedulerOption = Annotated[str, typer.Option("--scheduler", help="ddim, ddpm, dpm-solver++ or euler.")]

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


def recipe(kind: type[R], given: dict[str, Any], **parsed: Any) -> R:
    """Build a recipe from a command's options, which have the names of its entries; `parsed` ones take precedence."""
    entries = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in (given | parsed).items() if name in entries})
