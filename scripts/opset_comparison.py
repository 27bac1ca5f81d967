"""Compare GroupNorm as the exporter writes it up to opset 20 (InstanceNormalization) with opset 22's one operator.

On ONNX Runtime by the time of whole passes in turns, one thread; in TensorRT-RTX by what the builder says of an engine
for compute capability 8.9 and batches of 1 to 64. Everything goes to the folder `--out`, and a second run goes on.
"""

import argparse
import functools
import json
import re
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
import torch
from diffusers import UNet2DModel

from dpctl.bench.compare import paired_ratio
from dpctl.models import load_model
from dpctl.signature import of_unet
from dpctl.units import bytes_
from export import precision
from export.graph import write_graph
from runtime.network import Network

ROUNDS, BUILDS = {1: 60, 8: 21}, 5
BATCH = (1, 8, 64)
# Of the paper: docs/pruning.md.
CIFAR = {
    "sample_size": 32,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": None,
    "norm_eps": 1e-6,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "downsample_padding": 0,
}
NETWORKS: dict[str, Callable[[], Any]] = {
    "reference": lambda: load_model("reference").unet,
    "CIFAR-10": lambda: UNet2DModel(**CIFAR).eval(),
}
# Precision and opset. The last has GroupNormalization's inputs and outputs in float16, and float32 statistics by its
# stash_type alone; else they are float32 by type.
FP32, FP16 = ("fp32 18", "fp32 22"), ("fp16 18", "fp16 22", "fp16 22, stash_type")


class Comparison:
    """The graphs of one network, and the folder of what was measured before."""

    def __init__(self, name: str, folder: Path) -> None:
        self.folder = folder / name
        self.folder.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(0)
        self.unet = NETWORKS[name]()
        self.signature = of_unet({**self.unet.config, "_class_name": type(self.unet).__name__}, BATCH)

    def graph(self, variant: str) -> Path:
        """Return the graph of a variant, exported and lowered."""
        label, opset = re.match(r"(\w+) (\d+)", variant).groups()  # type: ignore[union-attr]
        plain, path = self.folder / f"fp32 {opset}.onnx", self.folder / f"{variant}.onnx"
        if not plain.is_file():
            with mock.patch("export.graph.OPSET", int(opset)):
                write_graph(Network(self.unet).eval(), self.signature, plain, {})
        if not path.is_file():
            norm = "GroupNormalization"
            stash = variant.endswith("stash_type")
            low = precision.LOW | {norm} if stash else precision.LOW
            kept = {kind: why for kind, why in precision.FP32.items() if kind != norm or not stash}
            with mock.patch.multiple(precision, LOW=low, FP32=kept):
                ir.save(precision.lower(ir.load(plain), label).model, path)
        return path

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return what was measured under a name, from the folder where it is there."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            path.write_text(json.dumps(measure()), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))

    def times(self, variants: tuple[str, ...], batch: int) -> dict[str, list[float]]:
        """Return the seconds of passes in turns, round by round, by variant."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        sessions = {
            name: onnxruntime.InferenceSession(self.graph(name), options, providers=["CPUExecutionProvider"])
            for name in variants
        }
        random = np.random.default_rng(0)
        given = {
            "sample": random.standard_normal(self.signature.input("sample").at(batch), dtype=np.float32),
            "timestep": np.linspace(0, 999, batch, dtype=np.float32),
        }
        found: dict[str, list[float]] = {name: [] for name in variants}
        for turn in range(-2, ROUNDS[batch]):
            for name in variants if turn % 2 else reversed(variants):
                start = time.perf_counter()
                sessions[name].run(None, given)
                if turn >= 0:
                    found[name].append(time.perf_counter() - start)
        return found

    def engines(self, variants: tuple[str, ...]) -> dict[str, dict[str, Any]]:
        """Build the engines in turns; return what the builder says of each, with the seconds of every turn."""
        self.engine(variants[0])  # loads the builder
        turns = [{name: self.engine(name) for name in variants} for _ in range(BUILDS)]
        return {name: turns[0][name] | {"build_s": [turn[name]["build_s"] for turn in turns]} for name in variants}

    def engine(self, variant: str) -> dict[str, Any]:
        """Build the engine of a variant; return its bytes, its memory, the layers parsed and the seconds it took."""
        import tensorrt_rtx as trt

        # One logger for the process: the builder keeps the first that it is given.
        logger = _logger()
        logger.lines.clear()
        start = time.perf_counter()
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(self.graph(variant))):
            raise SystemExit(f"{variant}: {parser.get_error(0).desc()}")
        config, profile = builder.create_builder_config(), builder.create_optimization_profile()
        for tensor in self.signature.inputs:
            profile.set_shape(tensor.name, *(tensor.at(size) for size in BATCH))
        config.add_optimization_profile(profile)
        config.num_compute_capabilities = 1
        config.set_compute_capability(trt.ComputeCapability.SM89, 0)
        engine = builder.build_serialized_network(network, config)
        took, text = time.perf_counter() - start, "\n".join(logger.lines)
        activation, weights = (
            int(re.findall(rf"Total {kind} Memory: (\d+)", text)[-1]) for kind in ("Activation", "Weights")
        )
        return {
            "bytes": engine.nbytes,
            "activation_bytes": activation,
            "weights_bytes": weights,
            "layers": network.num_layers,
            "build_s": took,
        }


@functools.cache
def _logger() -> Any:
    import tensorrt_rtx as trt

    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            self.lines.append(message)

    return Logger()


def rows(name: str, folder: Path) -> Iterator[str]:
    """Yield the lines of one network, measuring what is not there yet."""
    comparison = Comparison(name, folder)
    for variants in (FP32, FP16):
        first = variants[0]
        taken = {
            batch: comparison.once(f"{first[:4]}-batch-{batch}", partial(comparison.times, variants, batch))
            for batch in ROUNDS
        }
        engines = comparison.once(f"{first[:4]}-engines", partial(comparison.engines, variants))
        for variant in variants:
            engine = engines[variant]
            nodes = len(ir.load(comparison.graph(variant)).graph)
            ratios = [paired_ratio(found[variant], found[first]) for found in taken.values()]
            ratios.append(paired_ratio(engine["build_s"], engines[first]["build_s"]))
            told = [f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]" if variant != first else "1" for r in ratios]
            memory = [bytes_(engine[key]) for key in ("bytes", "activation_bytes", "weights_bytes")]
            cells = [name, variant, str(nodes), *told[:2], str(engine["layers"]), *memory, told[2]]
            yield "| " + " | ".join(cells) + " |"


def main() -> None:
    """Print the table as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/opset-comparison"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    heads = ["network", "graph", "nodes", "ORT, batch 1", "ORT, batch 8", "RTX layers"]
    heads += ["engine", "activations", "weights", "build time"]
    print(f"| {' | '.join(heads)} |", "|---" * len(heads) + "|", sep="\n")
    for name in NETWORKS:
        for line in rows(name, given.out):
            print(line, flush=True)


if __name__ == "__main__":
    main()
