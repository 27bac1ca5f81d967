"""The frozen recipes of every stage and their TOML, which maps onto them one to one (stdlib only)."""

import dataclasses
import tomllib
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from dpctl.errors import DpctlError

R = TypeVar("R")

MIXED_PRECISIONS = ("no", "bf16", "fp16")
TARGETS = ("ratio", "target_macs", "target_params")
SCOPES = ("auto", "local", "global")
LAYOUTS = ("free", "stock")
REDUCTIONS = ("sum-abs", "abs-sum")
FRACTIONS_OF = ("model", "unpruned")
LATENCIES_OF = ("unet", "image")
OPTIMIZERS = ("adamw", "adamw-8bit")
TIMESTEP_SAMPLINGS = ("uniform", "antithetic", "importance")
CROPS = ("center", "random")
TRACKERS = ("none", "tensorboard", "wandb")
WEIGHTINGS = ("auto", "threshold", "uniform", "early")


@dataclass(frozen=True)
class LoopRecipe:
    """What the training loop needs, whether it trains from nothing or finetunes.

    * `batch_size` is the number of images of one optimizer step, over all processes and all `accumulation` parts: what
      a step does depends on neither.
    * `optimizer`: adamw, or adamw-8bit (moments of eight bits).
    * `min_snr_gamma`: weight the denoising error of timesteps by min-SNR (docs/losses.md); None weights all alike.
    * `timestep_sampling`: uniform, antithetic (t and T - 1 - t in turns) or importance (by the loss so far).
    * `validation`: images held out of training, whose loss is told every `validate_every` steps; `patience` of those
      without a lower one end the training (0 never does).
    * `max_broken`: images that may be unreadable before that is an error.
    * `keep`: the newest checkpoints that stay.
    * `sample_every`: steps between two sample sheets; 0 draws none.
    """

    data: str = "reference"
    steps: int = 300
    batch_size: int = 64
    accumulation: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 4e-4
    warmup_steps: int = 20
    weight_decay: float = 0.01
    ema_decay: float = 0.99
    ema_on_cpu: bool = False
    gradient_clip: float = 1.0
    gradient_checkpointing: bool = False
    min_snr_gamma: float | None = None
    timestep_sampling: str = "uniform"
    flip: bool = True
    crop: str = "center"
    max_broken: int = 0
    condition_dropout: float = 0.1
    mixed_precision: str = "no"
    validation: int = 0
    validate_every: int = 100
    patience: int = 0
    checkpoint_every: int = 100
    keep: int = 2
    sample_every: int = 0
    tracker: str = "none"
    seed: int = 0


# What changes neither the weights nor their random numbers: a resumed run may choose it anew.
RESUMABLE = (
    "accumulation", "ema_on_cpu", "gradient_checkpointing", "checkpoint_every", "keep", "sample_every", "tracker",
)  # fmt: skip

TEACHER = "teacher"  # the data that it draws itself


@dataclass(frozen=True)
class TrainRecipe(LoopRecipe):
    """`dpctl train`: a UNet from random weights; `config` is a diffusers UNet config.json."""

    config: str = "reference"
    steps: int = 3000
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    ema_decay: float = 0.999
    checkpoint_every: int = 250


@dataclass(frozen=True)
class FinetuneRecipe(LoopRecipe):
    """`dpctl finetune`: the teacher is the pruned model's parent unless named; weights of 0 switch it off.

    The loss is `denoising` times the denoising error, plus `distillation` times the error to the teacher's output, plus
    `feature_distillation` times the error to the outputs of its blocks. With `data = "teacher"` the teacher draws
    the training images itself, `drawn` of them in `drawn_steps` steps each; `prompts` is a text file, one per line, of
    what it draws if it draws what a text says, and of what the sample sheets show.
    """

    teacher: str = "parent"
    denoising: float = 1.0
    distillation: float = 3.0
    feature_distillation: float = 0.0
    prompts: str | None = None
    drawn: int = 1024
    drawn_steps: int = 50
    from_scratch: bool = False


@dataclass(frozen=True)
class LatencyRecipe:
    """What `dpctl prune --target-latency` has to meet, and where it is measured: on this machine, at the model's size.

    * `target`: a fraction of the unpruned model's latency, such as "0.5", or a time with its unit, such as "12ms".
    * `backend` and `precision`: what runs the exported network.
    * `batch_size`: images at a time; guidance doubles the network's own batch.
    * `of`: unet (one call of the network) or image (a whole batch of them, in `num_inference_steps` of `scheduler`).
    * `threads`: torch's own number of them without.
    * `model`: a latency file of `dpctl profile`, by which widths are planned; without one candidates are tried.
    """

    target: str = "0.5"
    backend: str = "ort"
    precision: str = "fp32"
    batch_size: int = 1
    of: str = "unet"
    num_inference_steps: int = 20
    scheduler: str = "ddim"
    threads: int | None = None
    model: str | None = None


@dataclass(frozen=True)
class PruneRecipe:
    """`dpctl prune`: exactly one of ratio, target_macs, target_params and latency is set.

    * `weighting`: which timesteps count: those above the `threshold`, all (uniform), the early ones, or what the
      criterion has of its own (auto).
    * `images`: how many are drawn to be scored on, with a noise and a timestep each; `accumulation` batches of
      `batch_size` make one gradient. `timesteps` is the number of parts of the schedule that count or do not.
    * `compensate`: refit what is left to the unpruned network's activations; None does where there is data (under a
      criterion that needs it, or with `data` of the user's own).
    * `layout`: free lets every width differ; stock gives one width per level, and a plain diffusers class.
    * `scope`: local (one ratio for every group), global (one ranking over the network, of which each group keeps the
      fraction `floor`) or auto: global for a target under a criterion whose scores compare between groups, else local.
    * `fractions_of`: what `ratio`, `floor` and one ratio for every group are of: the model that is cut, or the unpruned
      one that it descends from. The two targets are of the unpruned one always.
    * `keep` and `only`: globs over module names.
    * `heads` and `norm_groups`: whole attention heads and whole GroupNorm groups go, instead of a part of each.
    * `depth`: the branch of a residual block, an attention or a transformer block may go altogether.
    * `sensitivity`: scan how the loss reacts to cuts in each group of the model, and keep that in the manifest.
    """

    criterion: str = "diff-pruning"
    ratio: float | None = None
    target_macs: float | None = None
    target_params: float | None = None
    latency: LatencyRecipe | None = None
    weighting: str = "auto"
    threshold: float = 0.05
    reduction: str = "sum-abs"
    data: str = "reference"
    images: int = 512
    batch_size: int = 16
    accumulation: int = 1
    timesteps: int = 50
    compensate: bool | None = None
    align: int = 8
    layout: str = "free"
    scope: str = "auto"
    floor: float = 0.0
    fractions_of: str = "model"
    keep: tuple[str, ...] = ()
    only: tuple[str, ...] = ()
    heads: bool = False
    norm_groups: bool = False
    depth: bool = False
    sensitivity: bool = False
    seed: int = 0


@dataclass(frozen=True)
class EngineRecipe:
    """`dpctl export --trt`.

    * `flavor`: tensorrt (the GPU at hand), rtx (ahead of time, without one) or auto: what this machine can do.
    * `compute_capability`: which GPUs a rtx engine is for, e.g. 8.9; without any, all from 8.0 on.
    * `workspace_gib`: the most scratch memory that one layer may take.
    * `optimization_level`: 0 (quick build) to 5; the library's own without.
    * `version_compatible`, `hardware_compatible`: the engine also runs under later versions, and on every GPU from
      Ampere on; tensorrt only.
    * `refit`: new weights can be put into it, by `dpctl refit`.
    * `tf32`: float32 products may be rounded to TF32; a precision of its own, in the engine's name too.
    """

    flavor: str = "auto"
    compute_capability: tuple[str, ...] = ()
    workspace_gib: float | None = None
    optimization_level: int | None = None
    version_compatible: bool = False
    hardware_compatible: bool = False
    refit: bool = False
    tf32: bool = False


@dataclass(frozen=True)
class ExportRecipe:
    """`dpctl export`.

    * `batch`: (min, opt, max) of the UNet's batch, which guidance doubles.
    * `size`: (min, opt, max) of its height and width, in its own pixels; fixed without.
    * `components`: the VAE's decoder and the text encoders too.
    * `engine`: an engine to build from the graph, if any.
    """

    precision: str = "fp32"
    batch: tuple[int, int, int] = (1, 8, 64)
    size: tuple[int, int, int] | None = None
    components: bool = False
    engine: EngineRecipe | None = None


@dataclass(frozen=True)
class BenchRecipe:
    """`dpctl bench`: what is measured, how often, and with how many samples the quality is judged.

    * `baselines`: backends that only the baseline is measured on, beside `backends`: what else could be done with it.
    * `fewer_steps`: measure the baseline also with so few steps that it takes a candidate's time.
    * `precision`: of the networks, in torch and in what is exported for the measurement.
    * `features`: an ONNX network for FID and KID; the embedded one without.
    * `real_images`: images that it compares with, or the `.npz` of statistics that an earlier run made of them.
    * `clip`: a directory with the CLIP model that compares pictures and prompts.
    * `prompts`: a text file, one prompt per line: image i shows prompt i modulo their number.
    * `guidance_scale`: how strongly they guide; the pipeline's own default without.
    """

    baseline: str = "reference"
    candidates: tuple[str, ...] = ()
    backends: tuple[str, ...] = ("eager", "ort")
    baselines: tuple[str, ...] = ("eager", "compiled", "deepcache")
    fewer_steps: bool = True
    precision: str = "fp32"
    batch_sizes: tuple[int, ...] = (1, 8)
    num_inference_steps: tuple[int, ...] = (20,)
    scheduler: str = "ddim"
    rounds: int = 20
    samples: int = 256
    seed: int = 0
    threads: int | None = None
    features: str | None = None
    real_images: str | None = None
    clip: str | None = None
    prompts: str | None = None
    guidance_scale: float | None = None


@dataclass(frozen=True)
class ChainRecipe:
    """`dpctl run`: the whole chain of one model.

    With `rounds` above 1 the cut is made in so many rounds, each but the last followed by a distillation by `between`.
    `scratch` adds the same slim architecture, trained from random weights by the same recipe for as many steps in all,
    to the comparison. The defaults are the demo's: about five minutes on two cores.
    """

    model: str = "reference"
    scratch: bool = False
    rounds: int = 1
    prune: PruneRecipe = field(default_factory=lambda: PruneRecipe(target_macs=0.5, align=16))
    finetune: FinetuneRecipe = field(default_factory=lambda: FinetuneRecipe(steps=100, learning_rate=6e-4))
    between: FinetuneRecipe = field(
        default_factory=lambda: FinetuneRecipe(steps=50, learning_rate=6e-4, warmup_steps=5)
    )
    export: ExportRecipe = field(default_factory=ExportRecipe)
    bench: BenchRecipe = field(default_factory=lambda: BenchRecipe(rounds=10, samples=256))


@dataclass(frozen=True)
class SweepRecipe:
    """`dpctl sweep`: every criterion at every target with every length of finetuning; 0 steps is none.

    Targets are shares of the MACs, and latencies as `LatencyRecipe.target` has them, where and of what `prune.latency`
    says. The rest of the stages' recipes holds for all cells.
    """

    model: str = "reference"
    criteria: tuple[str, ...] = ("magnitude", "diff-pruning")
    target_macs: tuple[float, ...] = (0.7, 0.5)
    target_latency: tuple[str, ...] = ()
    steps: tuple[int, ...] = (100,)
    prune: PruneRecipe = field(default_factory=lambda: PruneRecipe(align=16))
    finetune: FinetuneRecipe = field(default_factory=FinetuneRecipe)
    export: ExportRecipe = field(default_factory=ExportRecipe)
    bench: BenchRecipe = field(
        default_factory=lambda: BenchRecipe(backends=("ort",), baselines=(), rounds=10, samples=256)
    )


def read_recipe(path: Path, kind: type[R]) -> R:
    """Read a TOML file into a recipe; a DpctlError names an unknown or ill-typed entry."""
    try:
        with path.open("rb") as stream:
            values = tomllib.load(stream)
    except FileNotFoundError:
        raise DpctlError("no such recipe", str(path), "give the path of a TOML file") from None
    except ValueError as problem:  # TOML's, Unicode's, or a number of too many digits
        raise DpctlError("the recipe is not TOML", f"{path}: {problem}", "correct the file") from None
    except OSError as problem:
        raise DpctlError(
            "the recipe cannot be read", f"{path}: {problem.strerror}", "give a readable TOML file"
        ) from None
    return from_dict(kind, _completed(kind, values), str(path))


def _completed(kind: type[Any], values: dict[str, Any]) -> dict[str, Any]:
    """Fill up each table with the recipe's own defaults for it: a target in the file takes the place of the default."""
    completed = dict(values)
    for name, default in to_dict(kind()).items():
        table = values.get(name)
        if isinstance(default, dict) and isinstance(table, dict):
            replaced = TARGETS if any(target in table for target in (*TARGETS, "latency")) else ()
            completed[name] = {key: value for key, value in default.items() if key not in replaced} | table
    return completed


def from_dict(kind: type[R], values: dict[str, Any], where: str) -> R:
    """Build a recipe from plain values, strictly: no unknown names, no silent conversion but int to float."""
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(values) - set(hints))
    if unknown:
        raise DpctlError(
            "unknown entry in a recipe", f"{where}: {', '.join(unknown)}", f"known entries: {', '.join(hints)}"
        )
    return kind(**{name: _value(hints[name], value, f"{where}: {name}") for name, value in values.items()})


def to_dict(recipe: Any) -> dict[str, Any]:
    """Return a recipe as plain JSON values; None is left out, as TOML has no such value."""
    return {name: value for name, value in _plain(dataclasses.asdict(recipe)).items() if value is not None}


def differing(saved: Mapping[str, Any], wanted: Any) -> str | None:
    """Return the first entry in which a recipe that was written down asks for something else than `wanted`.

    What an older version did not write is what it did then, the default. Of a training that does not count which
    changes nothing in what comes out: how a batch is divided, what is kept or shown.
    """
    free = {*RESUMABLE} if isinstance(wanted, LoopRecipe) else set()
    if isinstance(wanted, FinetuneRecipe) and wanted.data != TEACHER:
        free.add("prompts")  # only sample sheets show them
    older, asked = to_dict(type(wanted)()) | dict(saved), to_dict(wanted)
    names = sorted({*older, *asked} - free)
    return next((name for name in names if older.get(name) != asked.get(name)), None)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items() if inner is not None}
    return [_plain(inner) for inner in value] if isinstance(value, (tuple, list)) else value


def _value(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_dict(typing.cast(type[Any], hint), value, where)
    if isinstance(hint, types.UnionType):
        inner = [option for option in typing.get_args(hint) if option is not types.NoneType]
        return _value(inner[0], value, where)
    if typing.get_origin(hint) is tuple and isinstance(value, (list, tuple)):
        options = typing.get_args(hint)
        if options[-1] is not Ellipsis and len(options) != len(value):
            raise DpctlError(
                "an entry of the recipe has the wrong length", f"{where} = {value!r}", f"give {len(options)} values"
            )
        return tuple(_value(options[0], inner, where) for inner in value)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            got = f"{where} = a whole number of {value.bit_length()} bits"
            raise DpctlError("an entry of the recipe is out of range", got, "give a smaller number") from None
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is not bool and isinstance(value, bool)):
        return value
    wanted = getattr(hint, "__name__", str(hint))
    raise DpctlError(
        "an entry of the recipe has the wrong type", f"{where} = {value!r}", f"give a value of type {wanted}"
    )
