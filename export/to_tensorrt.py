"""ONNX -> engine, by TensorRT on the GPU it is for, or by TensorRT-RTX ahead of time and without any.

Networks are strongly typed, under both and under every version: the precision is what the graph says.
"""

import dataclasses
import json
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from dpctl import artifact, environment
from dpctl.errors import DpctlError
from dpctl.recipe import EngineRecipe, to_dict
from dpctl.signature import Signature
from runtime import engine as engines
from runtime.backends.trt import capability_of, dynamic, errors_of, load, log_of, require
from runtime.engine import LATER, NAMES, EngineManifest

FLAVORS = ("auto", *NAMES)
OPTIMIZATION_LEVELS = range(6)
# More than any machine has; the library takes bytes in 64 bits.
LARGEST_WORKSPACE_GIB = 2**20
# The first generation that a portable engine is for: Ampere.
PORTABLE = "8.0"
TURING = "7.5"
CACHE = ".timing"


def check(recipe: EngineRecipe, precision: str) -> EngineRecipe:
    """Return the recipe with its flavor chosen; a DpctlError for what this machine or that flavor cannot do."""
    if recipe.flavor not in FLAVORS:
        raise DpctlError("unknown flavor of TensorRT", repr(recipe.flavor), f"choose one of: {', '.join(FLAVORS)}")
    if recipe.optimization_level is not None and recipe.optimization_level not in OPTIMIZATION_LEVELS:
        raise DpctlError("unknown optimization level", str(recipe.optimization_level), "give 0 (quick) to 5 (thorough)")
    if recipe.workspace_gib is not None and not 0 < recipe.workspace_gib <= LARGEST_WORKSPACE_GIB:
        got = f"{recipe.workspace_gib:g} GiB"
        raise DpctlError("the workspace limit is 0, below it, or no size that memory has", got, "give GiB, e.g. 2")
    if recipe.tf32 and precision != "fp32":
        got = f"precision {precision}"
        raise DpctlError("TF32 is for products of float32", got, "leave --tf32 out, or export with --precision fp32")
    recipe = choose(recipe)
    if recipe.flavor == "tensorrt" and not torch.cuda.is_available():
        got = "no GPU that torch can use"
        todo = "build with --trt-flavor rtx, which needs none, or on the machine with the GPU (`dpctl doctor`)"
        raise DpctlError("TensorRT builds an engine on the GPU that it is for", got, todo)
    library = require(recipe.flavor)
    if recipe.flavor == "rtx":
        _check_rtx(recipe, library)
    else:
        _check_tensorrt(recipe, library)
    return recipe


def choose(recipe: EngineRecipe) -> EngineRecipe:
    """Replace the flavor auto by what this machine can do: TensorRT where it has a GPU and the library, else RTX."""
    if recipe.flavor != "auto":
        return recipe
    flavor = "rtx"
    if torch.cuda.is_available():
        try:
            require("tensorrt")
            flavor = "tensorrt"
        except DpctlError:
            pass
    return dataclasses.replace(recipe, flavor=flavor)


def _check_rtx(recipe: EngineRecipe, library: ModuleType) -> None:
    known = supported(library)
    unknown = [capability for capability in recipe.compute_capability if capability not in known]
    if unknown or len(set(recipe.compute_capability)) < len(recipe.compute_capability):
        named = ", ".join(name or "an empty one" for name in unknown or recipe.compute_capability)
        got = f"{named}; TensorRT-RTX {library.__version__}"
        raise DpctlError("no such compute capability to build for", got, f"choose from: {', '.join(known)}, each once")
    if recipe.version_compatible:
        got = "TensorRT-RTX, whose engines are for one release each"
        raise DpctlError("no version-compatible engine is to be had", got, "leave --version-compatible out")
    if recipe.hardware_compatible:
        got = "TensorRT-RTX, which builds for compute capabilities"
        todo = "leave --hardware-compatible out: without --compute-capability it is for every GPU from 8.0 on"
        raise DpctlError("this option is TensorRT's own", got, todo)
    if recipe.refit and not torch.cuda.is_available():
        got = "TensorRT-RTX, and no GPU that torch can use"
        todo = "leave --refit out here, or build on a machine with a GPU"
        raise DpctlError("an engine that can be refitted is only built with a GPU", got, todo)


def _check_tensorrt(recipe: EngineRecipe, library: ModuleType) -> None:
    if recipe.compute_capability:
        got = f"--compute-capability {','.join(recipe.compute_capability)} for TensorRT"
        todo = "leave it out, add --hardware-compatible for other GPUs too, or build with --trt-flavor rtx"
        raise DpctlError("TensorRT builds an engine for the GPU at hand", got, todo)
    if recipe.refit and library.__version__.startswith("11.3."):
        got = f"TensorRT {library.__version__}, which may drop a bias from an engine that can be refitted"
        raise DpctlError("this version builds no engine to be trusted with --refit", got, "install another version")


def supported(library: ModuleType) -> list[str]:
    """Return the compute capabilities that TensorRT-RTX builds for, by its own list: 7.5, 8.0, ..."""
    found = [re.fullmatch(r"SM(\d+)(\d)", name) for name in library.ComputeCapability.__members__]
    numbers = sorted((int(match[1]), int(match[2])) for match in found if match)
    return [f"{major}.{minor}" for major, minor in numbers]


def targets_of(recipe: EngineRecipe) -> list[str]:
    """Return the compute capabilities that an engine of this recipe, its flavor chosen, will run on."""
    if recipe.flavor == "rtx":
        return sorted(recipe.compute_capability, key=float) or [PORTABLE + LATER]
    return [PORTABLE + LATER] if recipe.hardware_compatible else [capability_of(torch.device("cuda"))]


def label(recipe: EngineRecipe, precision: str) -> str:
    """Return what the engine's products are computed in: the graph's precision, or TF32."""
    return "tf32" if recipe.tf32 else precision


def engine_path(folder: Path, recipe: EngineRecipe, precision: str) -> Path:
    """Return where the engine of a recipe, its flavor chosen, lies among a graph of this precision."""
    return folder / engines.name(label(recipe, precision), recipe.flavor, targets_of(recipe))


def build(graph: Path, signature: Signature, recipe: EngineRecipe, precision: str) -> tuple[Path, EngineManifest]:
    """Build the engine of a graph beside it, with its manifest and its layers; `recipe` is what `check` returned.

    Raises a DpctlError where the parser or the builder refuses. The files are written one after the other: the caller
    sees to it that nobody reads them before (`artifact.writing`).
    """
    library = require(recipe.flavor)
    targets = targets_of(recipe)
    engine = engine_path(graph.parent, recipe, precision)
    log_of(library).lines.clear()
    began = time.perf_counter()
    builder = library.Builder(log_of(library))
    # The network's weights lie in the parser's memory: it stays until the engine is built.
    network, parser = parse(library, builder, graph)
    _check_tensors(network, signature, graph)
    profile = {tensor.name: signature.bounds(tensor) for tensor in signature.inputs}
    plan = _plan(library, builder, network, recipe, profile, engine.with_suffix(CACHE))
    build_s = time.perf_counter() - began
    del parser
    memory = logged_memory(library)
    engine.write_bytes(plan)
    manifest = EngineManifest(
        flavor=recipe.flavor,
        version=library.__version__,
        targets=targets,
        gpu=torch.cuda.get_device_name() if recipe.flavor == "tensorrt" and not recipe.hardware_compatible else None,
        precision=label(recipe, precision),
        profile={name: [list(shape) for shape in shapes] for name, shapes in profile.items()},
        weights_bytes=memory.get("Weights"),
        activation_bytes=memory.get("Activation"),
        build_s=round(build_s, 3),
        sha256=artifact.hash_file(engine),
        size_bytes=engine.stat().st_size,
        onnx=engines.graph_digests(graph),
        recipe=to_dict(recipe),
        built_on=environment.describe(),
    )
    layers = network_layers(network)
    if (loaded := _loaded(library, engine, manifest)) is not None:
        manifest = dataclasses.replace(manifest, activation_bytes=loaded.device_memory_size_v2)
        layers = engine_layers(library, loaded)
    engines.sidecar(engine).write_text(manifest.to_json(), encoding="utf-8")
    engines.layers(engine).write_text(json.dumps(layers, indent=1) + "\n", encoding="utf-8")
    return engine, manifest


def _loaded(library: ModuleType, engine: Path, manifest: EngineManifest) -> Any | None:
    """Return the engine in memory, where this machine has a GPU that it is for and the library to load it."""
    if not torch.cuda.is_available() or manifest.engine_recipe.version_compatible:
        return None
    device = torch.device("cuda")
    try:
        engines.check_target(engine, manifest, capability_of(device), torch.cuda.get_device_name(device))
    except DpctlError:
        return None
    return load(library, engine, manifest)


def parse(library: ModuleType, builder: Any, graph: Path) -> tuple[Any, Any]:
    """Return the strongly typed network of an ONNX file and its parser; a DpctlError names a node that is not read."""
    typed = getattr(library.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # the only kind, where it is gone
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = library.OnnxParser(network, log_of(library))
    # From the file, so that weights beside it are found.
    if parser.parse_from_file(str(graph)):
        return network, parser
    errors = [parser.get_error(index) for index in range(parser.num_errors)]
    raise _unreadable(library, graph, errors)


def _check_tensors(network: Any, signature: Signature, graph: Path) -> None:
    """Raise a DpctlError unless the network takes and gives what the signature says."""
    given = [network.get_input(index) for index in range(network.num_inputs)]
    given += [network.get_output(index) for index in range(network.num_outputs)]
    wanted = {tensor.name: dynamic(tensor.shape) for tensor in (*signature.inputs, *signature.outputs)}
    found = {tensor.name: tuple(tensor.shape) for tensor in given}
    if found != wanted:
        got = f"{graph}: {found or 'none'}"
        raise DpctlError("the graph's tensors are not those of the signature", got, "export the model again")


def _unreadable(library: ModuleType, graph: Path, errors: list[Any]) -> DpctlError:
    name = f"{library.__name__} {library.__version__}"
    if not errors or not errors[0].node_operator():
        got = f"{graph}: {_one_line(errors[0].desc()) if errors else 'it does not say why'}"
        return DpctlError(f"{name} cannot read the graph", got, "export the model again")
    first = errors[0]
    got = f"{graph}: node {first.node_name()} ({first.node_operator()}): {_one_line(first.desc())}"
    got += f"; and {len(errors) - 1} more" if len(errors) > 1 else ""
    todo = "run this network by the backend ort, or try another version of the library; report the node with its config"
    return DpctlError(f"{name} cannot read a node of the graph", got, todo)


def _one_line(text: str) -> str:
    """Return the first sentence of the library's text, without where in its source it was said."""
    return " ".join(re.sub(r" In \S+ at \S+\)?", "", line) for line in text.strip().splitlines()[:2]).strip()


def _plan(
    library: ModuleType,
    builder: Any,
    network: Any,
    recipe: EngineRecipe,
    profile: Mapping[str, tuple[tuple[int, ...], ...]],
    cache: Path,
) -> Any:
    """Return the serialized engine, a buffer; a DpctlError where the builder refuses."""
    config = builder.create_builder_config()
    shapes = builder.create_optimization_profile()
    for name, (low, best, high) in profile.items():
        shapes.set_shape(name, low, best, high)
    if config.add_optimization_profile(shapes) < 0:
        raise DpctlError("the optimization profile is refused", _said(library), "export with another --batch")
    _configure(library, config, recipe)
    timings = _timing_cache(config, cache) if recipe.flavor == "tensorrt" else None
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        todo = "see the message" + (", or give more --workspace" if recipe.workspace_gib is not None else "")
        # Turing has neither products of float32 in TensorRT-RTX nor bfloat16.
        turing = ", leave 7.5 out or export with --precision fp16, the only one that it has"
        other = ", leave a compute capability out" if recipe.compute_capability else ""
        todo += turing if TURING in recipe.compute_capability else other
        raise DpctlError(f"{NAMES[recipe.flavor]} cannot build the engine", _said(library), todo)
    if timings is not None:
        cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return plan


def _said(library: ModuleType) -> str:
    return "; ".join(_one_line(line) for line in errors_of(library)) or "it does not say why"


def _configure(library: ModuleType, config: Any, recipe: EngineRecipe) -> None:
    """Set what the recipe asks for; every flag that is not asked for is off, TF32 too."""
    flags = library.BuilderFlag
    config.profiling_verbosity = library.ProfilingVerbosity.DETAILED
    config.clear_flag(flags.TF32)
    if recipe.tf32:
        config.set_flag(flags.TF32)
    if recipe.refit:
        config.set_flag(flags.REFIT)
    if recipe.version_compatible:
        config.set_flag(flags.VERSION_COMPATIBLE)
        # Code found in a directory is never run: the lean runtime is installed, not taken from the engine.
        config.set_flag(flags.EXCLUDE_LEAN_RUNTIME)
    if recipe.hardware_compatible:
        config.hardware_compatibility_level = library.HardwareCompatibilityLevel.AMPERE_PLUS
    if recipe.optimization_level is not None:
        config.builder_optimization_level = recipe.optimization_level
    if recipe.workspace_gib is not None:
        config.set_memory_pool_limit(library.MemoryPoolType.WORKSPACE, int(recipe.workspace_gib * 2**30))
    if recipe.compute_capability:
        config.num_compute_capabilities = len(recipe.compute_capability)
        for index, capability in enumerate(sorted(recipe.compute_capability, key=float)):
            target = getattr(library.ComputeCapability, f"SM{capability.replace('.', '')}")
            config.set_compute_capability(target, index)


def _timing_cache(config: Any, path: Path) -> Any:
    """Attach the timings of an earlier build of this engine, if they are of this GPU and version, or an empty cache."""
    earlier = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    if earlier is None or not config.set_timing_cache(earlier, False):
        earlier = config.create_timing_cache(b"")
        config.set_timing_cache(earlier, False)
    return earlier


def logged_memory(library: ModuleType) -> dict[str, int]:
    """Return the bytes that the build named: Weights and Activation, which is scratch at the largest shapes."""
    found = (re.match(r"Total (\w+) Memory: (\d+) bytes", message) for _, message in log_of(library).lines)
    return {match[1]: int(match[2]) for match in found if match}


def engine_layers(library: ModuleType, loaded: Any) -> dict[str, Any]:
    """Return the layers as built: fused, with the kernels that were chosen."""
    told = loaded.create_engine_inspector().get_engine_information(library.LayerInformationFormat.JSON)
    return {"of": "the engine as built", **json.loads(told)}


def network_layers(network: Any) -> dict[str, Any]:
    """Return the layers of the parsed network, before any fusion."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    rows = [
        {
            "name": layer.name,
            "type": layer.type.name,
            "inputs": list(_tensors(layer.get_input, layer.num_inputs)),
            "outputs": list(_tensors(layer.get_output, layer.num_outputs)),
        }
        for layer in layers
    ]
    return {"of": "the parsed network: kernels are chosen on the GPU", "layers": rows}


def _tensors(get: Any, count: int) -> Iterator[dict[str, Any]]:
    tensors = (get(index) for index in range(count))
    for tensor in tensors:
        if tensor is not None:
            yield {"name": tensor.name, "dtype": tensor.dtype.name, "shape": list(tensor.shape)}


def refitted(engine: Path, about: EngineManifest, graph: Path) -> Any:
    """Return an engine with the weights of a graph of the same shape in place of its own, serialized: a buffer.

    The engine must be loaded for that: this needs the GPU that it is for. Raises a DpctlError where weights are missing
    or refused.
    """
    library = require(about.flavor)
    loaded = load(library, engine, about)
    refitter = library.Refitter(loaded, log_of(library))
    # The parser knows under which names it gave the graph's weights to the engine, and which it had folded together.
    parser = library.OnnxParserRefitter(refitter, log_of(library))
    taken = parser.refit_from_file(str(graph))
    missing = refitter.get_missing_weights()
    if not taken or missing or not refitter.refit_cuda_engine():
        got = f"missing: {', '.join(missing)}" if missing else _said(library)
        todo = f"build a new engine: {engines.rebuild(engine, about.engine_recipe)}"
        raise DpctlError("the engine does not take the new weights", got, todo)
    settings = loaded.create_serialization_config()
    settings.set_flag(library.SerializationFlag.INCLUDE_REFIT)
    return loaded.serialize_with_config(settings)
