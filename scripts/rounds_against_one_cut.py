"""Print finished chains, `NAME=DIRECTORY ...`, side by side: the last line of `make rounds`."""

import sys
from pathlib import Path

from dpctl import artifact
from dpctl.artifact import Manifest
from dpctl.bench.document import FILE, read_result
from dpctl.bench.result import BenchResult, Model
from dpctl.report.page import interval, judged
from dpctl.units import count, percent

METRICS = ("fid", "ssim")


def row(name: str, result: BenchResult, model: Model, trained: str, loss: str) -> str:
    """Return one line of the table; a share is of the baseline."""
    found, base = judged(result, model), result.baseline
    cells = [name]
    for measure in ("macs", "params"):
        mine, whole = getattr(model, measure), getattr(base, measure)
        cells.append(count(mine) if model is base else f"{count(mine)} ({percent(mine / whole)})")
    figures = found.figures if found is not None else {}
    cells += [interval(figures[metric]) if metric in figures else "-" for metric in METRICS]
    return "| " + " | ".join([*cells, trained, loss]) + " |"


def steps(manifest: Manifest) -> str:
    """Return the steps of every finetune that led to a model, oldest first."""
    stats = [entry["stats"] for entry in manifest.lineage if entry["kind"] == "finetuned"]
    return " + ".join(str(each["steps"]) for each in [*stats, manifest.stats])


def main() -> int:
    """Print the table as Markdown; return the exit code."""
    chains = [argument.partition("=")[::2] for argument in sys.argv[1:]]
    lines: list[str] = []
    for name, directory in chains:
        result = read_result(Path(directory) / "bench" / FILE)
        manifest = artifact.read_manifest(Path(directory) / "finetuned")
        if manifest is None:
            sys.stderr.write(f"{directory} holds no finetuned model\n")
            return 1
        if not lines:
            lines.append(row(result.baseline.name, result, result.baseline, "-", "-"))
        tuned = next(model for model in result.models if model.digest == manifest.digest)
        lines.append(row(name, result, tuned, steps(manifest), f"{manifest.stats['loss']:.4f}"))
    print("| | MACs | parameters | FID | SSIM to the unpruned | steps | loss of the last 50 |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
