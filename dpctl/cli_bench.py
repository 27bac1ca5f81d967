"""The commands that measure: `dpctl bench` and `dpctl compare`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from dpctl import options, progress
from dpctl.printing import print_report
from dpctl.recipe import BenchRecipe

BENCH = BenchRecipe()
INTERRUPTED = 130  # as a shell counts SIGINT


def bench(
    baseline: options.ModelArgument,
    candidates: Annotated[list[str], typer.Argument(help="The models to compare with it.", show_default=False)],
    out: options.Out,
    backend: Annotated[str, typer.Option(help="Backends, comma-separated.")] = ",".join(BENCH.backends),
    batch_size: Annotated[str, typer.Option(help="Batch sizes, comma-separated.")] = "1,8",
    num_inference_steps: Annotated[str, typer.Option(help="Sampling steps, comma-separated.")] = "20",
    precision: Annotated[str, typer.Option(help="Of every network: fp32, fp16 or bf16.")] = BENCH.precision,
    baselines: options.Baselines = "eager,compiled,deepcache",
    fewer_steps: options.FewerSteps = BENCH.fewer_steps,
    scheduler: options.SchedulerOption = BENCH.scheduler,
    rounds: Annotated[int, typer.Option(help="Turns that each subject gets.")] = BENCH.rounds,
    samples: Annotated[
        int, typer.Option(help="Images drawn per model to judge the quality; 0 leaves it out.")
    ] = BENCH.samples,
    features: options.Features = BENCH.features,
    real_images: options.RealImages = BENCH.real_images,
    clip: options.Clip = BENCH.clip,
    prompts: options.Prompts = BENCH.prompts,
    guidance_scale: options.GuidanceScale = BENCH.guidance_scale,
    threads: Annotated[int | None, typer.Option(help="Processor threads of every subject.")] = BENCH.threads,
    seed: options.Seed = BENCH.seed,
    force: options.Force = False,
    json_: options.Json = False,
) -> None:
    """Measure candidates against a baseline: latency, memory, size and quality, in one report."""
    recipe = BenchRecipe(
        baseline=baseline,
        candidates=tuple(candidates),
        backends=options.names(backend),
        batch_sizes=options.integers(batch_size, "--batch-size"),
        num_inference_steps=options.integers(num_inference_steps, "--num-inference-steps"),
        precision=precision,
        baselines=options.names(baselines) if baselines else (),
        fewer_steps=fewer_steps,
        scheduler=scheduler,
        rounds=rounds,
        samples=samples,
        threads=threads,
        seed=seed,
        features=features,
        real_images=real_images,
        clip=clip,
        prompts=prompts,
        guidance_scale=guidance_scale,
    )
    from dpctl import chain

    result = chain.bench_launched(recipe, out, force=force, bar=progress.bar)
    if result is not None:
        print_report(chain.bench_report(result, out), json_)
        end(result)


def compare(
    old: Annotated[Path, typer.Argument(help="A bench.json, of the main branch say.", show_default=False)],
    new: Annotated[Path, typer.Argument(help="One of the same baseline, measured later.", show_default=False)],
    max_regression: options.MaxRegression = None,
    json_: options.Json = False,
) -> None:
    """Compare two benchmarks of one baseline on one machine: what has become worse?"""
    from dpctl.bench import regression
    from dpctl.report.regression import report

    found = regression.compare_files(old, new, max_regression)
    print_report(report(found, max_regression), json_)
    regression.gate(found, max_regression)


def end(result: Any) -> None:
    """Exit as an interrupted command does, if somebody interrupted the measurement."""
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)
