"""`dpctl inspect`: an artifact's lineage, widths, parameters and MACs, for people and as JSON."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from dpctl import artifact, asked, bars, parity, recorded, units
from dpctl.artifact import Manifest

# Of a list that may have a hundred entries so many are printed; all are in the manifest and with --json.
SHOWN = 4


@dataclass(frozen=True)
class Report:
    """What a command prints: one JSON document, or rich renderables."""

    json: Any
    renderables: list[Any] = field(default_factory=list)


def inspect(name: str, scan: dict[str, Any] | None = None) -> Report:
    """Describe a model: from its manifest where there is one, else by loading and counting it.

    `scan`, of the model itself, is shown instead of one in the manifest, which is of the model before its pruning.
    """
    from dpctl.models import load_model, resolve

    directory = resolve(name)
    added = {} if scan is None else {"sensitivity": scan}
    manifest = artifact.read_manifest(directory)
    if manifest is not None:
        artifact.verify_files(directory, manifest)
        recorded.check(manifest, directory)
        return report(replace(manifest, stats=manifest.stats | added), directory)
    from dpctl import cost

    model = load_model(name)
    stats = cost.stats(model.unet) | {"bytes": cost.file_bytes(directory)} | added
    document = {"kind": "foreign", "stats": stats, "lineage": [], "digest": model.digest, "directory": str(directory)}
    return Report(document, [_figures("foreign", directory, model.digest, stats), *_groups(stats)])


def report(manifest: Manifest, directory: Path) -> Report:
    """Describe an artifact from its manifest alone."""
    from rich.text import Text

    stats = manifest.stats
    tables = [_figures(manifest.kind, directory, manifest.digest, stats)]
    if manifest.lineage:
        tables.append(_lineage(manifest))
    tables += _groups(stats)
    if manifest.signature:
        tables.append(_range(manifest))
    lowered = manifest.stats.get("precision", {}).get("not_lowered")
    if lowered:
        tables.append(Text(f"in float32: {', '.join(f'{name} ({reason})' for name, reason in lowered.items())}"))
    if manifest.parity:
        tables += parity_report(manifest.parity).renderables
    return Report(asdict(manifest) | {"digest": manifest.digest, "directory": str(directory)}, tables)


def _groups(stats: dict[str, Any]) -> list[Any]:
    widths, scan = stats.get("widths"), stats.get("sensitivity")
    drawn = bars.widths(widths, stats.get("left_alone", {})) if widths else []
    return [*drawn, *(bars.reactions(scan) if scan else [])]


def _range(manifest: Manifest) -> Any:
    """Describe what an exported graph takes: images at a time and, since guidance doubles them, rows of the UNet."""
    from rich.text import Text

    low, best, high = (manifest.signature or {})["batch"]
    rows = f"the UNet's batch {low} to {high}, best {best}"
    images = manifest.recipe.get("batch")
    sizes = (manifest.signature or {}).get("sizes")
    told = [f"{images[0]} to {images[2]} images, best {images[1]}"] if images and images != [low, best, high] else []
    told += [rows]
    told += ["height and width {} to {}, best {}".format(*(sizes["bounds"][i] for i in (0, 2, 1)))] if sizes else []
    return Text("; ".join(told))


def parity_report(found: dict[str, Any]) -> Report:
    """Describe the verdicts of a parity check."""
    from rich.text import Text

    verdict, *checks = parity.lines(found)
    color = "green" if found["verdict"] == "passed" else "red"
    return Report(found, [Text(verdict, style=color), *(Text(line) for line in checks)])


def _figures(kind: str, directory: Path, digest: str, stats: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"{directory} ({kind}, {digest[:12]})", title_justify="left", show_header=False)
    unpruned = stats.get("unpruned")
    for name in ("params", "macs", "attention_macs"):
        if name in stats:
            text = units.count(stats[name])
            if unpruned and unpruned.get(name):
                text += (
                    f"  ({units.percent(stats[name] / unpruned[name])} of the unpruned {units.count(unpruned[name])})"
                )
            table.add_row(name.replace("_", " "), text)
    if "bytes" in stats:
        table.add_row("weights on disk", units.bytes_(stats["bytes"]))
    if "narrowed_from" in stats:
        table.add_row("narrowed from", f"{stats['narrowed_from'][:12]}, checked on one input")
    for name, value in (stats.get("requested") or {}).items():
        table.add_row("asked", f"{name.replace('_', ' ')} {value:g}")
    if "achieved" in stats:
        table.add_row("achieved", ", ".join(f"{name} {value:.4f}" for name, value in stats["achieved"].items()))
    for name, text in (*_latency(stats), *_surgery(stats), *_engines(stats)):
        table.add_row(name, text)
    if "steps" in stats:
        table.add_row("trained", f"{stats['steps']} steps, loss of the last 50: {stats['loss']:.4f}")
    return table


def _latency(stats: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line on what the latency was to be, and one for every candidate that was timed for it."""
    found = stats.get("latency")
    if not found:
        return
    yield "latency asked", asked.goal(found)
    for macs, predicted, measured, chosen in asked.candidates(found):
        told = [f"predicted {predicted}"] if predicted else []
        told += [measured or asked.UNMEASURED, *(["chosen"] if chosen else [])]
        yield f"at {macs} MACs", ", ".join(told)


def _surgery(stats: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield name and text of what the cut did beside taking channels, a line each."""
    if found := stats.get("compensation"):
        loss = {name: f"{value:.3g}" for name, value in found["loss"].items()}
        name = "compensated" if found["used"] else "not compensated"
        after = loss.get("compensated", "not finite")
        yield name, f"denoising loss {loss['cut']} -> {after}, unpruned {loss['unpruned']}"
    if parts := stats.get("in_parts"):
        yield "cut in parts", _first([f"{name} ({reason})" for name, reason in parts.items()])
    if moved := stats.get("regrouped_norms"):
        most = sorted(moved.items(), key=lambda norm: -norm[1])
        yield "norms regrouped", _first([f"{name} ({units.percent(share)} of its channels)" for name, share in most])


def _engines(stats: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a line for every engine: who built it for what, its size, and its memory at the largest shapes."""
    for name, engine in stats.get("engines", {}).items():
        made = f"{name}: {engine['precision']} for compute capability {', '.join(engine['targets'])}"
        memory = {"weights": engine["weights_bytes"], "activations": engine["activation_bytes"]}
        known = [f"{part} {units.bytes_(size)}" for part, size in memory.items() if size is not None]
        sizes = [units.bytes_(engine["size_bytes"]), *known, f"built in {units.seconds(engine['build_s'])}"]
        yield "engine", f"{made}; {', '.join(sizes)}"


def _first(names: list[str]) -> str:
    """Return the first few of many names, and how many more there are."""
    more = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return ", ".join([*names[:SHOWN], *more])


def _lineage(manifest: Manifest) -> Any:
    from rich.table import Table

    table = Table("kind", "digest", "source", "recipe", title="lineage, oldest first", title_justify="left")
    own = {"kind": manifest.kind, "digest": manifest.digest, "source": "this directory", "recipe": manifest.recipe}
    for entry in [*manifest.lineage, own]:
        recipe = ", ".join(_entry(name, value) for name, value in entry.get("recipe", {}).items())
        table.add_row(entry["kind"], entry["digest"][:12], str(entry["source"]), recipe)
    return table


def _entry(name: str, value: Any) -> str:
    """Return an entry of a recipe in words; of a table, such as an engine's, what is set."""
    if not isinstance(value, dict):
        return f"{name} {value}"
    return f"{name}: " + ", ".join(_entry(key, inner) for key, inner in value.items() if inner not in (False, [], None))
