"""A made-up result as a real run leaves it: two models on two backends, samples, lineage."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpctl.bench.metrics import Figure
from dpctl.bench.quality import save_samples
from dpctl.bench.result import SCHEMA_VERSION, BenchResult, FewerSteps, Memory, Model, Quality, Subject, Turn

TRAINED = {"digest": "1" * 64, "source": "reference", "kind": "trained", "recipe": {"steps": 4000}}
PRUNED = {"digest": "2" * 64, "source": "", "kind": "pruned", "recipe": {"criterion": "diff-pruning"}}
FINETUNED = {"digest": "3" * 64, "source": "", "kind": "finetuned", "recipe": {"steps": 100, "from_scratch": False}}
RECIPE = {
    "baseline": "reference",
    "candidates": ["runs/it's slim"],
    "backends": ["eager", "ort"],
    "batch_sizes": [1, 8],
    "num_inference_steps": [20],
    "baselines": [],
    "fewer_steps": False,
    "precision": "fp32",
    "scheduler": "ddim",
    "rounds": 8,
    "samples": 24,
    "seed": 0,
}


def _subject(model: str, backend: str, seconds: dict[int, float]) -> Subject:
    noise = np.random.default_rng(len(model + backend)).normal(1, 0.01, size=(9, 2))
    turns = tuple(
        Turn(number, size, 20, latency, (latency / 20,) * 20, (latency / 22,) * 20)
        for number in range(9)
        for size, latency in ((size, seconds[size] * float(noise[number, i])) for i, size in enumerate((1, 8)))
    )
    parity = {"verdict": "passed", "worst": {"relative_l2": 3e-7}} if backend == "ort" else None
    memory = (Memory(1, 20_000_000), Memory(8, 50_000_000))
    return Subject(model, backend, model, 4_000_000, parity, 0.1, 4 * 10**8, 10**7, memory, turns)


def _figure(value: float, error: float, better: str) -> Figure:
    replicates = tuple(float(r) for r in value + error * np.linspace(-2, 2, 41))
    return Figure(value, value - 1.9 * error, value + 1.9 * error, 24, "real images", better, replicates)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A folder with the samples of `make_result`'s models: each picture of one grey, the baseline's darker."""
    for position in (0, 1):
        greys = np.arange(24, dtype=np.uint8).reshape(24, 1, 1, 1) + 100 * position
        save_samples(tmp_path / f"samples/{position}-20-steps.npz", [np.broadcast_to(greys, (24, 8, 8, 1))])
    return tmp_path


@pytest.fixture
def make_result() -> Callable[..., BenchResult]:
    """Return `make_result(speed={1: 1.5, 8: 1.5}, fid=11.0, **fields)`: the slim model's speed-up and FID (else 10)."""

    def make(speed: dict[int, float] | None = None, fid: float = 11.0, **fields: Any) -> BenchResult:
        speed = speed or {1: 1.5, 8: 1.5}
        models = (
            Model("reference", "reference", "1" * 64, "trained", 2_730_000, 288_000_000, 10**6, 11 * 10**6, (TRAINED,)),
            Model("slim", "runs/it's slim", "3" * 64, "finetuned", 1_400_000, 144_000_000, 10**6, 6 * 10**6,
                  (TRAINED, PRUNED, FINETUNED)),
        )  # fmt: skip
        subjects = tuple(
            _subject(
                model, backend, {n: (1 if n == 1 else 5) * base / (speed[n] if model == "slim" else 1) for n in (1, 8)}
            )
            for model, backend, base in (
                (model, backend, 0.4 if backend == "eager" else 0.3)
                for model in ("reference", "slim")
                for backend in ("eager", "ort")
            )
        )
        scores = {"fid": _figure(fid, 0.1, "lower"), "ssim": _figure(0.8, 0.01, "higher")}
        quality = (
            Quality(
                "reference", "ort", 20, "samples/0-20-steps.npz", {"fid": _figure(10.0, 0.2, "lower")}, {"ssim": "it"}
            ),
            Quality("slim", "ort", 20, "samples/1-20-steps.npz", scores, {}),
        )
        environment = {"processor": "a processor", "libraries": {"torch": "2"}, "other_processes_busy_cores": 0.1}
        given: dict[str, Any] = {
            "schema_version": SCHEMA_VERSION, "created": "2026-01-02T03:04:05+00:00", "command": "dpctl run --out demo",
            "recipe": RECIPE, "threads": 2, "environment": environment,
            "features": {"about": "a small network; against 10 images", "real_images": 10},
            "models": models, "subjects": subjects, "quality": quality, "warnings": (),
        }  # fmt: skip
        return BenchResult(**given | fields)

    return make


PARTS = {"text encoder": 0.1, "denoiser": 0.6, "scheduler": 0.05, "vae": 0.2, "other": 0.05}


def _whole_turn(turn: Turn, steps: int, seconds: float) -> Turn:
    """Return a turn of that many steps in that many times the seconds, split, on a GPU that says what it takes."""
    latency = turn.latency_s * seconds
    return dataclasses.replace(
        turn,
        num_inference_steps=steps,
        latency_s=latency,
        step_latency_s=(latency / steps,) * steps,
        network_latency_s=(PARTS["denoiser"] * latency / steps,) * steps,
        parts_s={name: share * latency for name, share in PARTS.items()},
        network_batch_size=2 * turn.batch_size,
        energy_j=30.0 * latency,
    )


def _whole_subject(subject: Subject, steps: tuple[int, ...], backend: str | None = None, faster: float = 1) -> Subject:
    turns = tuple(_whole_turn(turn, n, n / 20 / faster) for n in steps for turn in subject.turns)
    memory = tuple(dataclasses.replace(m, peak_device_memory_bytes=3 * m.peak_memory_bytes) for m in subject.memory)
    told = {"first_image_latency_s": 2.5, "build_latency_s": 42.0 if subject.backend == "ort" else None}
    return dataclasses.replace(subject, backend=backend or subject.backend, turns=turns, memory=memory, **told)


@pytest.fixture
def full_result(make_result: Callable[..., BenchResult], out: Path) -> BenchResult:
    """All that schema 3 can hold: 10 and 20 steps, the baseline with 13 for 20 and with DeepCache, parts, energy."""
    few = make_result()
    whole = [_whole_subject(s, (10, 20, 13) if s.model == "reference" else (10, 20)) for s in few.subjects]
    cached = _whole_subject(few.subjects[0], (10, 20), "deepcache", 1.8)
    drawn = [("reference", "ort", 10, 12.0), ("reference", "ort", 20, 10.0), ("reference", "ort", 13, 11.0),
             ("slim", "ort", 10, 12.5), ("slim", "ort", 20, 10.5),
             ("reference", "deepcache", 10, 14.0), ("reference", "deepcache", 20, 13.0)]  # fmt: skip
    quality = []
    for number, (model, backend, steps, fid) in enumerate(drawn):
        file = f"samples/{number}.npz"
        greys = np.arange(24, dtype=np.uint8).reshape(24, 1, 1, 1) + 30 * number
        save_samples(out / file, [np.broadcast_to(greys, (24, 8, 8, 1))])
        quality.append(Quality(model, backend, steps, file, {"fid": _figure(fid, 0.2, "lower")}, {}))
    return dataclasses.replace(
        few,
        recipe=few.recipe | {"num_inference_steps": [20, 10], "baselines": ["eager", "deepcache"], "fewer_steps": True},
        subjects=(*whole[:2], cached, *whole[2:]),
        quality=tuple(quality),
        fewer_steps=(FewerSteps("slim", "eager", 20, 13), FewerSteps("slim", "ort", 20, 13)),
        peak_flops=(400e9, 500e9, 450e9),
    )
