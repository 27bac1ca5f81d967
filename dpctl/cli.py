"""The command line: options -> one call -> one print. Nothing heavy is imported before a command runs."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dpctl import cli_bench, cli_export, cli_train, options, progress
from dpctl.errors import DpctlError, StoppedError
from dpctl.printing import console, print_json, print_report
from dpctl.recipe import (
    ChainRecipe,
    LatencyRecipe,
    PruneRecipe,
    SweepRecipe,
    read_recipe,
)

app = typer.Typer(
    name="dpctl",
    help="Prune a diffusion model's UNet, finetune it, export it, and prove what that bought.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

PRUNE = PruneRecipe()
LATENCY = LatencyRecipe()


@app.command()
def prune(
    model: options.ModelArgument,
    out: options.Out,
    criterion: Annotated[
        str, typer.Option(help="random, magnitude, taylor, diff-pruning or fisher.")
    ] = PRUNE.criterion,
    ratio: options.Ratio = None,
    target_macs: options.TargetMacs = None,
    target_params: options.TargetParams = None,
    target_latency: options.TargetLatency = None,
    backend: options.LatencyBackend = None,
    precision: options.LatencyPrecision = None,
    latency_batch: options.LatencyBatch = None,
    latency_of: options.LatencyOf = None,
    num_inference_steps: options.LatencySteps = None,
    threads: options.LatencyThreads = None,
    latency_model: options.LatencyModel = None,
    weighting: options.Weighting = PRUNE.weighting,
    threshold: options.Threshold = PRUNE.threshold,
    reduction: options.Reduction = PRUNE.reduction,
    data: options.Data = PRUNE.data,
    images: options.Images = PRUNE.images,
    batch_size: options.Batch = PRUNE.batch_size,
    accumulation: options.Accumulation = PRUNE.accumulation,
    timesteps: options.Timesteps = PRUNE.timesteps,
    compensate: options.Compensate = PRUNE.compensate,
    align: Annotated[int, typer.Option(help="Every width is a multiple of this and of the norm groups.")] = PRUNE.align,
    layout: options.Layout = PRUNE.layout,
    scope: options.Scope = PRUNE.scope,
    floor: options.Floor = PRUNE.floor,
    keep: options.Keep = None,
    only: options.Only = None,
    heads: options.Heads = PRUNE.heads,
    norm_groups: options.NormGroups = PRUNE.norm_groups,
    depth: options.Depth = PRUNE.depth,
    sensitivity: options.Sensitivity = False,
    seed: options.Seed = PRUNE.seed,
    force: options.Force = False,
    dry_run: options.DryRun = False,
    json_: options.Json = False,
) -> None:
    """Cut channels out of a model's UNet; the result loads in stock diffusers."""
    latency = options.latency(locals())
    globs = {"keep": options.patterns(keep), "only": options.patterns(only)}
    recipe = options.recipe(PruneRecipe, locals(), latency=latency, **globs)
    from dpctl import chain

    if dry_run:
        print_json(chain.preview_cut(model, recipe))
        return
    from dpctl import inspect

    manifest = chain.prune(model, out, recipe, force=force, bar=progress.bar)
    print_report(inspect.report(manifest, out), json_)


@app.command()
def profile(
    model: options.ModelArgument,
    out: Annotated[Path, typer.Option(help="The latency file to write.", show_default=False)],
    backend: Annotated[str, typer.Option(help="ort, ov or trt.")] = LATENCY.backend,
    precision: Annotated[str, typer.Option(help="fp32, fp16 or bf16.")] = LATENCY.precision,
    latency_batch: Annotated[int, typer.Option(help="Images at a time.")] = LATENCY.batch_size,
    threads: options.LatencyThreads = None,
    networks: Annotated[int, typer.Option(help="Slim networks that are timed.")] = 24,
    held_out: Annotated[int, typer.Option(help="More of them, to judge predictions by.")] = 0,
    seed: options.Seed = 0,
    resume: options.Resume = False,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Time slim networks of all widths, so that a latency can be predicted: see `dpctl prune --latency-model`."""
    from dpctl.latency import profile as profiling

    recipe = LatencyRecipe(backend=backend, precision=precision, batch_size=latency_batch, threads=threads)
    asked: dict[str, Any] = {"networks": networks, "held_out": held_out, "seed": seed, "resume": resume, "force": force}
    print_report(profiling.profile(model, out, recipe, **asked, bar=progress.bar), json_)


app.command()(cli_train.finetune)
app.command()(cli_train.train)


app.command()(cli_export.export)


@app.command()
def refit(
    engine: Annotated[
        Path, typer.Argument(help="An engine that was built with --refit, in its directory.", show_default=False)
    ],
    model: options.ModelArgument,
    out: options.EngineOut = None,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Put the weights of a model of the same shape into an engine, on the GPU that runs it."""
    from dpctl import inspect
    from export.refit import refit as put_into

    manifest = put_into(engine, model, out, force=force, bar=progress.bar)
    print_report(inspect.report(manifest, engine.parent.parent if out is None else out), json_)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(help="An exported directory.", show_default=False)],
    backend: Annotated[str, typer.Option(help="What runs it: ort, ov or trt.")] = "ort",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:N.", show_default=False)] = None,
    json_: options.Json = False,
) -> None:
    """Repeat the parity check of an exported directory on this machine, without the original model."""
    from dpctl import inspect
    from export.verify import verify_directory

    print_report(inspect.parity_report(verify_directory(directory, backend=backend, device=device)), json_)


app.command()(cli_bench.bench)
app.command()(cli_bench.compare)


@app.command()
def run(
    recipe: options.RecipeArgument = None,
    out: Annotated[Path, typer.Option("--out", help="The directory of the whole chain.")] = Path("dpctl-run"),
    dry_run: options.DryRun = False,
    json_: options.Json = False,
) -> None:
    """Prune, finetune, export and measure; finished stages are skipped, a killed run goes on where it was."""
    chosen = ChainRecipe() if recipe is None else read_recipe(recipe, ChainRecipe)
    from dpctl import chain

    if dry_run:
        print_json(chain.preview(chosen))
        return
    result = chain.run(chosen, out, bar=progress.bar)
    print_report(chain.bench_report(result, out / "bench"), json_)
    cli_bench.end(result)


@app.command()
def sweep(
    recipe: options.SweepArgument = None,
    out: Annotated[Path, typer.Option("--out", help="The directory of the whole sweep.")] = Path("dpctl-sweep"),
    dry_run: options.DryRun = False,
    json_: options.Json = False,
) -> None:
    """Try criteria, targets and lengths of finetuning, and measure all of them in one report."""
    chosen = SweepRecipe() if recipe is None else read_recipe(recipe, SweepRecipe)
    from dpctl import chain
    from dpctl import sweep as sweeping

    if dry_run:
        print_json(sweeping.preview(chosen))
        return
    result = sweeping.sweep(chosen, out, bar=progress.bar)
    print_report(chain.bench_report(result, out / "bench"), json_)
    cli_bench.end(result)


@app.command()
def sample(
    model: options.ModelArgument,
    out: options.Out,
    count: Annotated[int, typer.Option(help="Number of images.")] = 16,
    num_inference_steps: Annotated[int, typer.Option(help="Denoising steps.")] = 50,
    scheduler: options.SchedulerOption = "ddim",
    backend: Annotated[
        str, typer.Option(help="eager, compiled, ort, ov or trt; auto takes what the directory is made for.")
    ] = "auto",
    batch_size: options.BatchSize = 16,
    seed: options.Seed = 0,
    prompt: options.Prompt = None,
    guidance_scale: options.GuidanceScale = None,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Draw images from any model or exported directory, or what a text says: a grid and one PNG each."""
    from dpctl import sample as sampling

    wish = sampling.Wish(count, num_inference_steps, scheduler, backend, batch_size, seed, prompt, guidance_scale)
    print_report(sampling.draw(model, out, wish, force=force, bar=progress.bar), json_)


@app.command()
def inspect(
    model: options.ModelArgument,
    sensitivity: options.Sensitivity = False,
    data: options.Data = PRUNE.data,
    picture: options.Picture = None,
    json_: options.Json = False,
) -> None:
    """Show a model's lineage, size and widths, and how its loss reacts to cuts in each group."""
    from dpctl import inspect as inspection
    from dpctl import prune as pruning
    from dpctl.report import architecture

    architecture.check(picture)
    scan = pruning.scan(model, data, bar=progress.bar) if sensitivity else None
    found = inspection.inspect(model, scan)
    architecture.write(picture, found.json["stats"], scan)
    print_report(found, json_)


@app.command()
def doctor(json_: options.Json = False) -> None:
    """Say what this machine can do, and what to do about what is missing."""
    from dpctl import doctor as diagnosis

    findings = diagnosis.diagnose()
    if json_:
        print_json(diagnosis.as_json(findings))
        return
    console().print(diagnosis.as_table(findings))


# What divides its work among the processes that a launcher starts; every other command would be run by each.
LAUNCHED = ("finetune", "train", "bench")
# A process beside the first leaves it to that one to tell a mistake that both have met; the launcher ends it then.
PATIENCE_S = 20.0


def main() -> None:
    """Run the command line; a DpctlError is printed without a traceback and gives its exit code."""
    # A run that is asked to end ends like an interrupted one: what is half-written goes with it.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        refuse_launch(sys.argv[1:2])
        app(prog_name="dpctl")  # also as python -m dpctl
    except DpctlError as problem:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(PATIENCE_S)
        typer.echo(f"error: {problem}", err=True)
        sys.exit(problem.exit_code)
    except StoppedError as stopped:
        cli_train.end(stopped)


def refuse_launch(command: list[str]) -> None:
    """Raise a DpctlError in one of several processes that would all do the same work."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count > 1 and command and command[0] not in LAUNCHED:
        todo = f"run it by itself; those that can be launched: {', '.join(LAUNCHED)}"
        raise DpctlError(f"dpctl {command[0]} is not divided among processes", f"{count} processes", todo)


if __name__ == "__main__":
    main()
