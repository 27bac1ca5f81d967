"""An exported graph for a network of other widths, in seconds: what a search over widths times, not what is shipped.

The graph of a slim network is that of its base with other initializers; the exporter traces and optimizes for ten
seconds to a minute to find that out. What comes out is compared with torch on one small input, not by the gate.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from dpctl import artifact, cost, recorded
from dpctl.artifact import MANIFEST, Manifest
from dpctl.diffusion import first_timestep
from dpctl.errors import DpctlError
from dpctl.models import copy_components, load_scheduler, write_index
from dpctl.signature import HEIGHT, OUTPUT, WIDTH, Signature, of_unet
from export import golden, graph, half, verify
from export.precision import tensor_types
from export.shapes import NotNarrowed
from export.widths import rewiden
from runtime.backends.ort import exported as exported_manifest
from runtime.backends.ort import graph_of, refuse_failed
from runtime.network import Network

ROWS = 2


def narrow(exported: Path, slim_unet: Any, out: Path) -> None:
    """Write `out`: the exported directory `exported` with its graph narrowed to `slim_unet`.

    `slim_unet` has the layers of the exported network, of any widths, and its weights: float32, on the processor, in
    eval mode. Every backend opens and times `out` as an export of that network; it holds neither golden values nor
    engines, and its parity is not run. Raises NotNarrowed, and writes nothing, for a network of other layers, a
    constant of the graph that the widths do not determine, and a graph that does not give torch's output on one small
    input.
    """
    manifest = exported_manifest(exported)
    refuse_failed(exported, manifest)
    precision = recorded.precision_of(manifest, exported)
    artifact.verify_files(exported, manifest)
    signature = Signature.from_json(manifest.signature)
    _require_same_signature(slim_unet, signature)
    with artifact.writing(out) as directory:
        _write_components(exported, directory, slim_unet)
        told = _write_graph(graph_of(exported, manifest), directory, manifest, slim_unet, signature)
        written = _record(directory, exported, manifest, slim_unet, told)
        check = _compared(directory, slim_unet, signature, precision)
        written = dataclasses.replace(written, parity={**(written.parity or {}), "checks": {"one input": check}})
        (directory / MANIFEST).write_text(written.to_json(), encoding="utf-8")


def _require_same_signature(unet: Any, signature: Signature) -> None:
    config = {**unet.config, "_class_name": type(unet).__name__}
    own = of_unet(config, signature.batch, signature.sizes.bounds if signature.sizes else None)
    if own != signature:
        tensors = [{t.name: t.shape for t in (*each.inputs, *each.outputs)} for each in (own, signature)]
        got = "{} against {}".format(*(", ".join(f"{n} {list(s)}" for n, s in each.items()) for each in tensors))
        raise NotNarrowed(got, "the network has other inputs or outputs than the graph")


def _write_components(exported: Path, directory: Path, unet: Any) -> None:
    """Write everything of the exported pipeline but its network, and the config of the narrow one."""
    copy_components(exported, directory)
    (directory / "unet").mkdir()
    config = {name: value for name, value in unet.config.items() if not name.startswith("_")}
    config |= {name: value for name, value in json.loads(unet.to_json_string()).items() if name != "_name_or_path"}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (directory / "unet" / "config.json").write_text(text, encoding="utf-8")
    write_index(directory, unet=unet, scheduler=load_scheduler(exported))


def _write_graph(source: Path, directory: Path, manifest: Manifest, unet: Any, signature: Signature) -> dict[str, Any]:
    """Write the narrowed graph; return what a manifest says of its precision."""
    model = ir.load(source)
    step = signature.sizes.step if signature.sizes else 1
    # Two different sides, so that none is taken for the other.
    rewiden(model, unet, {HEIGHT: 2 * step, WIDTH: 3 * step})
    model.metadata_props["parent_digest"] = manifest.digest
    path = directory / "unet" / source.name
    size = sum(parameter.numel() * parameter.element_size() for parameter in unet.parameters())
    ir.save(model, path, external_data=f"{path.name}.data" if size > graph.LARGEST_GRAPH else None)
    try:
        onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as problem:
        got = str(problem).strip().splitlines()[0]
        raise NotNarrowed(got) from None
    # How many weights became zero is of the other network.
    told = {name: value for name, value in manifest.stats.get("precision", {}).items() if name != "weights"}
    return told | {"tensors": tensor_types(model)}


def _record(directory: Path, exported: Path, manifest: Manifest, unet: Any, told: dict[str, Any]) -> Manifest:
    earlier = manifest.parity or {}
    parity = {name: earlier[name] for name in ("precision", "opset", "components") if name in earlier}
    stats = cost.stats(unet) | {"bytes": cost.file_bytes(directory), "precision": told}
    return artifact.write_manifest(
        directory,
        kind="exported",
        recipe={name: value for name, value in manifest.recipe.items() if name != "engine"},
        stats=stats | {"narrowed_from": manifest.digest},
        signature=manifest.signature,
        parity={"verdict": verify.NOT_RUN, **parity},
        **artifact.descent(manifest, manifest.digest, str(exported.resolve())),
    )


def _compared(directory: Path, unet: Any, signature: Signature, precision: str) -> dict[str, Any]:
    """Return how far the graph is from torch on one small input; NotNarrowed where that is too far."""
    rows = _rows(directory, unet, signature)
    own = (
        half.own_error(half.HalfNetwork(unet, precision), dict(rows))["relative_l2"]
        if precision != verify.FP32
        else None
    )
    try:
        with verify.opened(directory, device="cpu") as (denoiser, _):
            output = verify.in_batches(denoiser, rows, signature, verify.batch_sizes(signature, ROWS)[-1])
    except DpctlError as problem:  # of a graph that a runtime refuses
        raise _differs(f"{problem.failed}: {problem.got}") from None
    except Exception as problem:  # ONNX Runtime's errors have no class in common
        raise _differs(str(problem).strip().splitlines()[0]) from None
    check = verify.check_rows(verify.judged([verify.compare(output, rows[OUTPUT])], own))
    if check["verdict"] != verify.PASSED:
        raise _differs(f"error {check['error']:.1e}, tolerance {check['allowed']:.1e}")
    return check


def _rows(directory: Path, unet: Any, signature: Signature) -> dict[str, torch.Tensor]:
    """Return two rows of inputs, at the smallest size there is, with torch's outputs."""
    grid = golden.timestep_grid(load_scheduler(directory), points=ROWS, first=first_timestep(unet))
    size = (signature.sizes.bounds[0],) * 2 if signature.sizes else None
    given = golden.inputs(signature, grid[[len(grid) // 2, -1]], unet.config.get("num_class_embeds"), size)
    given = {name: value[:ROWS] for name, value in given.items()}
    return golden.with_outputs(Network(unet).eval(), given)


def _differs(got: str) -> NotNarrowed:
    return NotNarrowed(got, "the narrowed graph does not give the network's outputs")
