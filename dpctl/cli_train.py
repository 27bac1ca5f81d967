"""The commands that train: `dpctl finetune` and `dpctl train`."""

import os
import shlex
import sys
from typing import Annotated, Any

import typer

from dpctl import options, progress
from dpctl.errors import StoppedError
from dpctl.printing import print_json, print_report
from dpctl.recipe import FinetuneRecipe, LoopRecipe, TrainRecipe, to_dict

FINETUNE, TRAIN = FinetuneRecipe(), TrainRecipe()

FromScratch = Annotated[bool, typer.Option("--from-scratch", help="Same architecture, random weights: the baseline.")]
Accumulation = Annotated[
    int, typer.Option("--accumulation", help="Parts that a process divides its images of a step into, to save memory.")
]
BatchSize = Annotated[int, typer.Option("--batch-size", help="Images per step, over all processes and parts.")]
Optimizer = Annotated[str, typer.Option("--optimizer", help="adamw, or adamw-8bit: a quarter of the moments' memory.")]
WarmupSteps = Annotated[int, typer.Option("--warmup-steps", help="Steps in which the learning rate rises to its peak.")]
WeightDecay = Annotated[float, typer.Option("--weight-decay", help="Decoupled weight decay (AdamW).")]
EmaOnCpu = Annotated[bool, typer.Option("--ema-on-cpu", help="Keep the averaged weights off the GPU.")]
GradientClip = Annotated[float, typer.Option("--gradient-clip", help="Largest norm of the gradient.")]
GradientCheckpointing = Annotated[
    bool, typer.Option("--gradient-checkpointing", help="Compute activations twice instead of keeping them.")
]
MinSnrGamma = Annotated[
    float | None,
    typer.Option(
        "--min-snr-gamma", help="Weight timesteps by min(SNR, gamma) / SNR, e.g. 5; alike without.", show_default=False
    ),
]
TimestepSampling = Annotated[
    str, typer.Option("--timestep-sampling", help="uniform, antithetic or importance (by the loss so far).")
]
Prompts = Annotated[
    str | None,
    typer.Option(
        help="What the teacher draws under --data teacher, and sheets show: a text file, a line each.",
        show_default=False,
    ),
]
Drawn = Annotated[int, typer.Option(help="Images that the teacher draws under --data teacher.")]
DrawnSteps = Annotated[int, typer.Option(help="Steps that it draws each of them in.")]
Flip = Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror every other image, left to right.")]
Crop = Annotated[str, typer.Option("--crop", help="Which part of an image of another shape: center or random.")]
MaxBroken = Annotated[
    int, typer.Option("--max-broken", help="Images that may be unreadable, and are told and left out.")
]
ConditionDropout = Annotated[
    float, typer.Option("--condition-dropout", help="Part of the captions that is left out, for guidance to work.")
]
Validation = Annotated[int, typer.Option("--validation", help="Images held out of training to judge it by.")]
ValidateEvery = Annotated[int, typer.Option("--validate-every", help="Steps between two validations.")]
Patience = Annotated[
    int,
    typer.Option("--patience", help="Validations without a lower loss that end the training, at its best; 0: none do."),
]
Keep = Annotated[int, typer.Option("--keep", help="Newest checkpoints that stay.")]
SampleEvery = Annotated[int, typer.Option("--sample-every", help="Steps between two sample sheets; 0: none.")]
Tracker = Annotated[str, typer.Option("--tracker", help="Where curves go besides: none, tensorboard or wandb.")]


def finetune(
    model: options.ModelArgument,
    out: options.Out,
    teacher: Annotated[
        str, typer.Option(help="The unpruned model; parent takes the one in the manifest.")
    ] = FINETUNE.teacher,
    denoising: Annotated[float, typer.Option(help="Weight of the denoising error itself.")] = FINETUNE.denoising,
    distillation: Annotated[
        float, typer.Option(help="Weight of output distillation; 0 switches it off.")
    ] = FINETUNE.distillation,
    feature_distillation: Annotated[
        float, typer.Option(help="Weight of the distillation of every block's output; 0 switches it off.")
    ] = FINETUNE.feature_distillation,
    min_snr_gamma: MinSnrGamma = FINETUNE.min_snr_gamma,
    timestep_sampling: TimestepSampling = FINETUNE.timestep_sampling,
    data: options.Data = FINETUNE.data,
    prompts: Prompts = FINETUNE.prompts,
    drawn: Drawn = FINETUNE.drawn,
    drawn_steps: DrawnSteps = FINETUNE.drawn_steps,
    flip: Flip = FINETUNE.flip,
    crop: Crop = FINETUNE.crop,
    max_broken: MaxBroken = FINETUNE.max_broken,
    condition_dropout: ConditionDropout = FINETUNE.condition_dropout,
    steps: options.Steps = FINETUNE.steps,
    batch_size: BatchSize = FINETUNE.batch_size,
    accumulation: Accumulation = FINETUNE.accumulation,
    optimizer: Optimizer = FINETUNE.optimizer,
    learning_rate: options.LearningRate = FINETUNE.learning_rate,
    warmup_steps: WarmupSteps = FINETUNE.warmup_steps,
    weight_decay: WeightDecay = FINETUNE.weight_decay,
    gradient_clip: GradientClip = FINETUNE.gradient_clip,
    gradient_checkpointing: GradientCheckpointing = FINETUNE.gradient_checkpointing,
    ema_decay: options.EmaDecay = FINETUNE.ema_decay,
    ema_on_cpu: EmaOnCpu = FINETUNE.ema_on_cpu,
    mixed_precision: options.MixedPrecision = FINETUNE.mixed_precision,
    validation: Validation = FINETUNE.validation,
    validate_every: ValidateEvery = FINETUNE.validate_every,
    patience: Patience = FINETUNE.patience,
    checkpoint_every: options.CheckpointEvery = FINETUNE.checkpoint_every,
    keep: Keep = FINETUNE.keep,
    sample_every: SampleEvery = FINETUNE.sample_every,
    tracker: Tracker = FINETUNE.tracker,
    from_scratch: FromScratch = False,
    seed: options.Seed = FINETUNE.seed,
    resume: options.Resume = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json_: options.Json = False,
) -> None:
    """Recover a pruned model's quality: denoising loss and distillation from the unpruned teacher."""
    recipe = options.recipe(FinetuneRecipe, locals())
    if dry_run:
        _print_checked(recipe)
        return
    from dpctl import finetune as finetuning

    manifest = finetuning.finetune(model, out, recipe, resume=resume, force=force, bar=progress.bar)
    _print_made(manifest, out, json_)


def train(
    out: options.Out,
    config: Annotated[str, typer.Option(help="A UNet config.json, a model directory, or reference.")] = TRAIN.config,
    min_snr_gamma: MinSnrGamma = TRAIN.min_snr_gamma,
    timestep_sampling: TimestepSampling = TRAIN.timestep_sampling,
    data: options.Data = TRAIN.data,
    flip: Flip = TRAIN.flip,
    crop: Crop = TRAIN.crop,
    max_broken: MaxBroken = TRAIN.max_broken,
    steps: options.Steps = TRAIN.steps,
    batch_size: BatchSize = TRAIN.batch_size,
    accumulation: Accumulation = TRAIN.accumulation,
    optimizer: Optimizer = TRAIN.optimizer,
    learning_rate: options.LearningRate = TRAIN.learning_rate,
    warmup_steps: WarmupSteps = TRAIN.warmup_steps,
    weight_decay: WeightDecay = TRAIN.weight_decay,
    gradient_clip: GradientClip = TRAIN.gradient_clip,
    gradient_checkpointing: GradientCheckpointing = TRAIN.gradient_checkpointing,
    ema_decay: options.EmaDecay = TRAIN.ema_decay,
    ema_on_cpu: EmaOnCpu = TRAIN.ema_on_cpu,
    mixed_precision: options.MixedPrecision = TRAIN.mixed_precision,
    validation: Validation = TRAIN.validation,
    validate_every: ValidateEvery = TRAIN.validate_every,
    patience: Patience = TRAIN.patience,
    checkpoint_every: options.CheckpointEvery = TRAIN.checkpoint_every,
    keep: Keep = TRAIN.keep,
    sample_every: SampleEvery = TRAIN.sample_every,
    tracker: Tracker = TRAIN.tracker,
    seed: options.Seed = TRAIN.seed,
    resume: options.Resume = False,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json_: options.Json = False,
) -> None:
    """Train a UNet from random weights."""
    recipe = options.recipe(TrainRecipe, locals())
    if dry_run:
        _print_checked(recipe)
        return
    from dpctl import finetune as finetuning

    manifest = finetuning.train(out, recipe, resume=resume, force=force, bar=progress.bar)
    _print_made(manifest, out, json_)


def _print_checked(recipe: LoopRecipe) -> None:
    from dpctl import finetune as finetuning

    finetuning.check(recipe)
    print_json(to_dict(recipe))


def _print_made(manifest: Any, out: Any, as_json: bool) -> None:
    """Print what was made, in the process that wrote it."""
    if manifest is None:
        return
    from dpctl import inspect

    print_report(inspect.report(manifest, out), as_json)


def end(stopped: StoppedError) -> None:
    """Say how a run that was asked to end goes on, once for all processes of it, and exit."""
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(f"{stopped}; go on with\n  {go_on(sys.argv[1:])}", err=True)
    sys.exit(stopped.exit_code)


def go_on(arguments: list[str]) -> str:
    """Return the command that goes on from the checkpoint of one with these arguments."""
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1
    begin = ["accelerate", "launch", "-m", "dpctl"] if launched else ["dpctl"]
    kept = [word for word in arguments if word != "--force"]
    # A chain looks for its checkpoints by itself.
    more = [] if "--resume" in kept or kept[:1] == ["run"] else ["--resume"]
    return shlex.join([*begin, *kept, *more])
