"""Judge cuts of `reference` before any finetune, and write the tables of docs/pruning.md: `make before-finetuning`.

Every arm is pruned and drawn as `dpctl prune` and `dpctl sample` do it, in the same noise as the unpruned model. The
results file holds what is done: an arm that is in it, made by the same recipe, is not made again. After a change of the
code remove the file, or the arm in it.
"""

import argparse
import dataclasses
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from dpctl import cost, environment
from dpctl.bench.metrics import Drawn, Figure
from dpctl.bench.metrics._features import reference_space
from dpctl.bench.quality import judge
from dpctl.bench.subjects import DRAWN_TOGETHER
from dpctl.data import Pixels, open_data
from dpctl.errors import DpctlError
from dpctl.models import load_model, resolve
from dpctl.prune import prune
from dpctl.prune.probe import Probe, open_probe
from dpctl.recipe import PruneRecipe, differing, to_dict
from dpctl.report.page import interval
from dpctl.sample import Wish, sample_bytes
from dpctl.signature import sample_size
from dpctl.units import count, percent

OUT = Path(__file__).resolve().parent.parent / "docs" / "pruning" / "before_finetuning.json"
BEGIN, END = "<!-- before-finetuning: begin -->", "<!-- before-finetuning: end -->"

MODEL, SEED, STEPS, SCHEDULER = "reference", 0, 20, "ddim"
PROBE: dict[str, Any] = {"count": 64, "timesteps": 8, "seed": SEED, "stream": "before-finetuning"}
HALF = PruneRecipe(target_macs=0.5, align=16, compensate=True, seed=SEED)
CRITERIA = ("random", "magnitude", "taylor", "fisher", "diff-pruning")
# What the arms of each table change in HALF.
COMPENSATION: dict[str, dict[str, Any]] = {
    f"{criterion}{suffix}": {"criterion": criterion, "compensate": bool(suffix)}
    for criterion in CRITERIA
    for suffix in ("", "-compensated")
}
VARIANTS: dict[str, dict[str, Any]] = {
    "heads": {"heads": True},
    "norm-groups": {"norm_groups": True},
    "local": {"scope": "local"},
    "early": {"weighting": "early"},
    "abs-sum": {"reduction": "abs-sum"},
    "threshold-0": {"threshold": 0.0},
    "threshold-0.02": {"threshold": 0.02},
    "threshold-0.2": {"threshold": 0.2},
}
LAYOUTS: dict[str, dict[str, Any]] = {
    "stock": {"layout": "stock"},
    "free": {},
    "free-local": {"scope": "local"},
    "stock-fisher": {"layout": "stock", "criterion": "fisher"},
    "free-fisher": {"criterion": "fisher"},
}
# Arms that may take what another came to.
FOLLOWS = {"free": "stock", "free-local": "stock", "free-fisher": "stock-fisher"}
UNPRUNED, DEFAULT = "unpruned", "diff-pruning-compensated"
ARMS = (UNPRUNED, *COMPENSATION, *LAYOUTS, *VARIANTS)

Entry = dict[str, Any]
HEADINGS = ("options", "MACs", "parameters", "denoising loss", "FID", "SSIM to the unpruned")


def recipe_of(arm: str, done: dict[str, Entry]) -> PruneRecipe | None:
    """Return the recipe of an arm, None for the unpruned model; the layout `free` follows what `stock` came to."""
    if arm == UNPRUNED:
        return None
    recipe = dataclasses.replace(HALF, **(COMPENSATION | LAYOUTS | VARIANTS)[arm])
    if arm not in FOLLOWS:
        return recipe
    other = FOLLOWS[arm]
    if other not in done:
        raise DpctlError(f"the arm {arm} has no target", f"no arm {other} in the file", f"run {other} first")
    share = done[other]["macs"] / done[UNPRUNED]["macs"]
    return dataclasses.replace(recipe, target_macs=math.floor(1e4 * share) / 1e4)  # as one would type it, and no more


class Gauge:
    """What every arm is measured with: the same probe, the same noise, the unpruned model's pictures, drawn once."""

    def __init__(self, samples: int, model: str = MODEL, data: str = "reference") -> None:
        self.samples, self.space = samples, reference_space()
        self.model, self.data = model, data
        self.seen: Callable[[Any], Any] = lambda images: images  # pictures as the feature network takes them

    @cached_property
    def probe(self) -> Probe:
        """Images of the data that scoring and compensation draw from too, noise and timesteps of its own."""
        model = load_model(self.model)
        config = model.unet.config
        images = Pixels(open_data(self.data, channels=config.in_channels, size=sample_size(config)))
        return open_probe(model.unet, model.scheduler, images, **PROBE)

    @cached_property
    def baseline(self) -> Any:
        """The unpruned model's pictures [N, H, W, C]."""
        return self.draw(resolve(self.model))

    def draw(self, directory: Path) -> Any:
        """Return a model's pictures [N, H, W, C]."""
        wish = Wish(self.samples, STEPS, SCHEDULER, "eager", DRAWN_TOGETHER, SEED)
        return self.seen(sample_bytes(directory, wish))

    def take(self, recipe: PruneRecipe | None) -> Entry:
        """Return the sizes, the denoising loss and the figures of the model that a recipe gives."""
        if recipe is None:
            return self._measured(resolve(MODEL), Drawn(self.baseline, None, self.space))
        with tempfile.TemporaryDirectory() as folder:
            slim = Path(folder) / "slim"
            manifest = prune(MODEL, slim, recipe)
            used = manifest.stats.get("compensation", {"used": False})["used"]
            return self._measured(slim, Drawn(self.draw(slim), self.baseline, self.space)) | {"compensated": used}

    def _measured(self, directory: Path, drawn: Drawn) -> Entry:
        model = load_model(directory)
        figures = {name: dataclasses.asdict(figure) for name, figure in judge(drawn)[0].items()}
        return {
            "digest": model.digest,
            **cost.stats(model.unet),
            "denoising_loss": self.probe.loss(model.unet),
            # The bootstrap's replicates make the interval, which stays.
            "figures": {name: figure | {"replicates": []} for name, figure in figures.items()},
            "environment": environment.describe(),
        }


def alike(saved: Entry | None, recipe: Any) -> bool:
    """Tell whether an arm was made by this recipe, or without any, as now."""
    return saved is None if recipe is None else saved is not None and differing(saved, recipe) is None


def make(
    done: dict[str, Entry],
    name: str,
    recipe: Any,
    take: Callable[[], Entry],
    save: Callable[[], None],
    told: Callable[[Entry], list[str]],
) -> None:
    """Measure an arm by `take` unless `done` holds it by the same recipe; save it, and say what came out."""
    if name in done and alike(done[name]["recipe"], recipe):
        sys.stderr.write(f"{name}: done before\n")
        return
    began = time.perf_counter()
    done[name] = {"recipe": to_dict(recipe) if recipe else None} | take()
    save()
    sys.stderr.write(f"{name}: {time.perf_counter() - began:.0f} s, {' | '.join(told(done[name]))}\n")


def fill(done: dict[str, Entry], names: Iterable[str], gauge: Gauge, save: Callable[[], None]) -> None:
    """Measure the arms that `done` does not hold yet by the same recipe; save after each."""
    for name in names:
        recipe = recipe_of(name, done)
        make(done, name, recipe, partial(gauge.take, recipe), save, lambda entry: cells(entry, done))


def cells(entry: Entry, done: dict[str, Entry]) -> list[str]:
    """Return the figures of an arm as text, as HEADINGS name them behind the options; sizes are of the unpruned."""
    whole = done[UNPRUNED]
    sizes = [
        count(entry[name]) if entry is whole else percent(entry[name] / whole[name]) for name in ("macs", "params")
    ]
    figures = {name: Figure(**values) for name, values in entry["figures"].items()}
    told = [interval(figures[name]) if name in figures else "-" for name in ("fid", "ssim")]
    return [*sizes, f"{entry['denoising_loss']:.4f}", *told]


def options(recipe: Entry | None, base: Entry) -> str:
    """Return what a recipe adds to the command of `base`, as options of `dpctl prune`."""
    if recipe is None:
        return UNPRUNED
    changed = {name.replace("_", "-"): value for name, value in recipe.items() if value != base.get(name)}
    words = [f"--{name} {value}" for name, value in changed.items() if not isinstance(value, bool)]
    words += [f"--{name}" if value else f"--no-{name}" for name, value in changed.items() if isinstance(value, bool)]
    return f"`{' '.join(words)}`" if words else "(no others)"


def table(title: str, arms: Iterable[str], base: Entry, done: dict[str, Entry]) -> list[str]:
    """Return a Markdown table of those arms that are done; none without any."""
    rows = [[options(done[arm]["recipe"], base), *cells(done[arm], done)] for arm in arms if arm in done]
    command = " ".join(["dpctl prune reference --out DIR", options(base, to_dict(PruneRecipe())).strip("`")])
    head = [f"{title}, by `{command}` and", "", f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    return [*head, *(f"| {' | '.join(row)} |" for row in rows), ""] if rows else []


def tables(done: dict[str, Entry]) -> str:
    """Return the three tables as Markdown; arms that are not done have no line."""
    half = to_dict(HALF)
    bare = {name: value for name, value in half.items() if name not in ("criterion", "compensate")}
    lines = [
        *table("Criteria, with compensation and without", (UNPRUNED, *COMPENSATION), bare, done),
        *table("The two layouts at equal MACs", LAYOUTS, half, done),
        *table("How the channels go", (DEFAULT, *VARIANTS), half, done),
    ]
    return "\n".join([*lines, ""])


def write_between(page: Path, text: str, begin: str = BEGIN, end: str = END) -> None:
    """Put `text` between the markers of a page. Raises a DpctlError where they are missing."""
    before, found, rest = page.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not (found and ended):
        raise DpctlError("the page has no place for the tables", str(page), f"put {begin} and {end} into it")
    page.write_text(f"{before}{begin}\n{text}{end}{after}", encoding="utf-8")


def read(path: Path, samples: int) -> Entry:
    """Return the results so far. Raises a DpctlError for those of another number of samples: FID depends on it."""
    if not path.is_file():
        return {"samples": samples, "arms": {}}
    document = json.loads(path.read_text(encoding="utf-8"))
    if document["samples"] != samples:
        got = f"{document['samples']} in {path}, {samples} asked for"
        raise DpctlError("the results are of another number of samples", got, "give another --out, or remove the file")
    return document


def write(path: Path, document: Entry) -> None:
    """Write the results: whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.writing")
    temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="the results, which are gone on with")
    parser.add_argument("--samples", type=int, default=1024, metavar="N", help="pictures of each arm")
    parser.add_argument("--only", action="append", choices=ARMS, metavar="ARM", help=f"one of: {', '.join(ARMS)}")
    parser.add_argument("--page", type=Path, metavar="FILE", help="a page that gets the tables between its markers")
    return parser.parse_args()


def tell(measured: Callable[[], str], page: Path | None, begin: str = BEGIN, end: str = END) -> int:
    """Measure, print the tables that come of it and put them on a page; return the exit code."""
    try:
        text = measured()
        if page is not None:
            write_between(page, text, begin, end)
    except DpctlError as problem:
        sys.stderr.write(f"{problem}\n")
        return problem.exit_code
    print(text, end="")
    return 0


def main() -> int:
    """Measure what is missing, print the tables; return the exit code."""
    asked = arguments()
    torch.set_num_threads(1)  # sums in one order, however many cores there are
    only = ARMS if asked.only is None else tuple(arm for arm in ARMS if arm in {UNPRUNED, *asked.only})

    def measured() -> str:
        document = read(asked.out, asked.samples)
        fill(document["arms"], only, Gauge(asked.samples), lambda: write(asked.out, document))
        return tables(document["arms"])

    return tell(measured, asked.page)


if __name__ == "__main__":
    sys.exit(main())
