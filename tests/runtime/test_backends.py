"""What every backend promises: one test per promise, over the folder of backends."""

import contextlib
import gc
import inspect
import sys
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from dpctl import registry
from dpctl.bench.result import INEXACT
from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.signature import of_unet
from runtime.backends.eager import PRECISIONS, EagerDenoiser, lowered
from runtime.layers import random_inputs

NAMES = registry.names(runtime.BACKENDS)


# What a backend needs to run, beside the processor: compiled needs time, for every batch size.
NEEDS = {"compiled": [pytest.mark.slow], "trt": [pytest.mark.gpu, pytest.mark.trt]}
# They run the weights, the others what was exported.
WEIGHTS = {"compiled", "deepcache", "eager"}
# Where it keeps what is large.
HOLDS = {
    "compiled": {"_network"},
    "deepcache": {"_network"},
    "eager": {"_network"},
    "ort": {"_session", "_binding"},
    "ov": {"_model", "_core"},
    "trt": {"_engine"},
}
# The library beside torch that a backend stands on, and the extra that brings it. (trt asks for a GPU first.)
LIBRARIES = {"ort": "onnxruntime", "ov": "openvino"}
EXTRAS = {"ort": "cpu", "ov": "openvino"}


@pytest.fixture(params=[pytest.param(name, marks=NEEDS.get(name, [])) for name in NAMES])
def backend(request: pytest.FixtureRequest) -> str:
    if request.param == "compiled":
        torch.compiler.reset()  # it takes 8 variants of one function, in all tests together
    return request.param


@pytest.fixture
def model(backend: str, request: pytest.FixtureRequest) -> Path:
    """The model that the backend runs: deepcache's has a level to leave out."""
    return request.getfixturevalue("toy_pipeline" if backend == "deepcache" else "model_directory")


@pytest.fixture
def directory(backend: str, model: Path, request: pytest.FixtureRequest) -> Path:
    """What the backend runs; skips where it cannot."""
    if backend in WEIGHTS:
        return model
    return request.getfixturevalue("engine_directory" if backend == "trt" else "exported_directory")


def inputs(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, 1, 8, 8, generator=generator), torch.linspace(0.5, 99, batch)


def test_the_names_are_the_files() -> None:
    assert set(NAMES) >= {"compiled", "deepcache", "eager", "ort", "ov", "trt"}
    modules = {name: registry.load(runtime.BACKENDS, name, "backend") for name in NAMES}
    assert {name for name, module in modules.items() if not module.RUNS_EXPORTED} == WEIGHTS
    assert {name for name, module in modules.items() if not getattr(module, "EXACT", True)} == INEXACT


@pytest.mark.parametrize("backend", NAMES)
def test_a_backend_has_the_documented_door(backend: str) -> None:
    module = registry.load(runtime.BACKENDS, backend, "backend")
    wanted = ["directory", "threads", "device", "failed" if module.RUNS_EXPORTED else "precision"]
    assert list(inspect.signature(module.open_denoiser).parameters) == wanted


def test_it_gives_what_torch_gives(backend: str, directory: Path, model: Path) -> None:
    sample, timestep = inputs()
    with torch.no_grad():
        expected = load_model(model).unet(sample, timestep).sample
    with runtime.open_denoiser(directory, backend) as denoiser:
        found = denoiser(sample, timestep)
        denoiser.synchronize()
    assert found.dtype == denoiser.dtype == torch.float32
    assert found.device == denoiser.device
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_it_gives_what_torch_gives_in_it(
    backend: str, directory: Path, model: Path, precision: str
) -> None:
    if backend not in WEIGHTS:
        with pytest.raises(DpctlError, match="an exported directory has its precision"):
            runtime.open_denoiser(directory, backend, precision=precision)
        return
    (sample, timestep), half = inputs(), {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    unet = load_model(model).unet
    with torch.no_grad():
        whole = unet(sample, timestep).sample
        expected = torch.nn.Module.to(unet, half)(sample.to(half), timestep).sample.float()
    with runtime.open_denoiser(directory, backend, precision=precision) as denoiser:
        found = denoiser(sample, timestep)
    assert (denoiser.precision, denoiser.dtype, found.dtype) == (precision, torch.float32, torch.float32)
    assert not torch.equal(found, whole)
    # Compiled, what is rounded after every layer in eager is not.
    near = {"rtol": 0, "atol": float(3 * (expected - whole).abs().max())} if backend == "compiled" else {}
    torch.testing.assert_close(found, expected, **near)


def test_an_output_belongs_to_the_caller(backend: str, directory: Path) -> None:
    sample, timestep = inputs()
    with runtime.open_denoiser(directory, backend) as denoiser:
        first = denoiser(sample, timestep)
        kept = first.clone()
        denoiser(2 * sample, timestep)
    assert torch.equal(first, kept)


def test_inputs_are_not_changed_and_need_not_be_contiguous(backend: str, directory: Path) -> None:
    sample, timestep = inputs()
    with runtime.open_denoiser(directory, backend) as denoiser:
        expected = denoiser(sample, timestep)
        turned = sample.transpose(2, 3).contiguous().transpose(2, 3)
        assert not turned.is_contiguous()
        torch.testing.assert_close(denoiser(turned, timestep.double().float()), expected, rtol=0, atol=1e-6)
    assert torch.equal(sample, inputs()[0])


def test_changing_batch_sizes_give_the_same_rows(backend: str, directory: Path) -> None:
    sample, timestep = inputs(4)
    with runtime.open_denoiser(directory, backend) as denoiser:
        together = denoiser(sample, timestep)
        for size in (1, 3, 2):
            torch.testing.assert_close(denoiser(sample[:size], timestep[:size]), together[:size], rtol=1e-4, atol=1e-5)


def running_threads() -> set[int]:
    """Return the threads of this process that run or would, this one left out."""
    states = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # it has just ended
            states[int(task.name)] = (task / "stat").read_text().rpartition(")")[2].split()[0]
    return {task for task, state in states.items() if state == "R"} - {threading.get_native_id()}


def test_an_idle_denoiser_has_no_thread_that_runs(backend: str, directory: Path) -> None:
    before = torch.get_num_threads()
    try:
        with runtime.open_denoiser(directory, backend, threads=2) as denoiser:
            denoiser(*inputs())
            denoiser.synchronize()
            # On a busy machine its threads get to their rest late; one that spins never does.
            for _ in range(200):
                if not (running := running_threads()):
                    break
                time.sleep(0.05)
            assert not running
    finally:
        torch.set_num_threads(before)


def test_after_the_block_it_holds_nothing(backend: str, directory: Path) -> None:
    with runtime.open_denoiser(directory, backend) as denoiser:
        denoiser(*inputs())
        held = [weakref.ref(value) for name, value in vars(denoiser).items() if name in HOLDS[backend]]
    assert len(held) == len(HOLDS[backend])
    gc.collect()
    assert [found() for found in held] == [None] * len(held)


@pytest.mark.parametrize(("backend", "library"), LIBRARIES.items())
def test_without_its_library_it_says_what_it_needs(
    backend: str, library: str, exported_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(DpctlError, match=rf"pip install 'dpctl-diffusion\[{EXTRAS[backend]}\]'"):
        runtime.open_denoiser(exported_directory, backend)


def test_it_knows_its_config_and_its_memory(backend: str, directory: Path) -> None:
    with runtime.open_denoiser(directory, backend) as denoiser:
        assert (denoiser.config.in_channels, denoiser.config.sample_size) == (1, 8)
        used = denoiser.memory()
    assert 0 < used["resident_bytes"] <= used["peak_resident_bytes"]


@pytest.mark.parametrize("scheduler_name", ["ddpm", "ddim", "euler-ancestral", "lcm"])
def test_it_samples_what_eager_samples(backend: str, directory: Path, model: Path, scheduler_name: str) -> None:
    if backend in INEXACT:
        pytest.skip(f"{backend} does not compute the network's own output at every call")
    scheduler = runtime.make_scheduler(scheduler_name, load_model(model).scheduler.config)

    def drawn(path: Path, name: str, batch: int) -> torch.Tensor:
        with runtime.open_denoiser(path, name) as denoiser:
            parts = [
                runtime.sample(denoiser, scheduler, seed=1, indices=range(i, i + batch), num_inference_steps=5)
                for i in range(0, 4, batch)
            ]
        return torch.cat(parts)

    expected = drawn(model, "eager", 4)
    for batch in (1, 2, 4):
        torch.testing.assert_close(drawn(directory, backend, batch), expected, rtol=0, atol=1e-4)


def test_an_unknown_backend_is_refused_with_a_hint(model_directory: Path) -> None:
    with pytest.raises(DpctlError, match="did you mean eager"):
        runtime.open_denoiser(model_directory, "eagr")


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"threads": 0}, "give 1 or more"),
        ({"device": "tpu9"}, "use cpu, cuda"),
        ({"device": "meta"}, "use cpu, cuda"),
        ({"device": "cuda:99"}, "no such GPU"),
    ],
)
@pytest.mark.parametrize("backend", NAMES)
def test_what_this_machine_has_not_is_a_clean_error(
    backend: str, model_directory: Path, exported_directory: Path, kwargs: dict[str, Any], words: str
) -> None:
    directory = model_directory if backend in WEIGHTS else exported_directory
    with pytest.raises(DpctlError, match=words):
        runtime.open_denoiser(directory, backend, **kwargs)


def test_a_directory_of_the_other_kind_is_refused(model_directory: Path, exported_directory: Path) -> None:
    for name in NAMES:
        directory, words = (exported_directory, "exported") if name in WEIGHTS else (model_directory, "dpctl export")
        with pytest.raises(DpctlError, match=words):
            runtime.open_denoiser(directory, name)


def test_eager_sets_the_threads_that_were_asked_for(model_directory: Path) -> None:
    before = torch.get_num_threads()
    try:
        with runtime.open_denoiser(model_directory, threads=3):
            assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("family", ["class-conditional", "ldm", "stable-diffusion", "sdxl", "ncsnpp"])
def test_every_family_runs_in_half_precision(
    families: dict[str, Callable[..., Any]], family: str, precision: str
) -> None:
    given = {"in_channels": 4, "out_channels": 4} if family in ("stable-diffusion", "sdxl") else {}
    unet = families[family](**given)
    asked = random_inputs(of_unet({**unet.config, "_class_name": type(unet).__name__}), unet.config, 2)
    expected = EagerDenoiser(unet)(**asked)
    found = EagerDenoiser(lowered(unet, PRECISIONS[precision]))(**asked)
    assert found.dtype == torch.float32
    epsilon = torch.finfo(PRECISIONS[precision]).eps
    assert 0 < (found - expected).norm() < 10 * epsilon * expected.norm()


@pytest.mark.parametrize("backend", sorted(WEIGHTS))
def test_an_unknown_precision_is_refused(backend: str, toy_pipeline: Path) -> None:
    with pytest.raises(DpctlError, match=r"unknown precision[\s\S]*fp32, fp16, bf16"):
        runtime.open_denoiser(toy_pipeline, backend, precision="fp8")


def test_sizes_keep_all_of_float32_in_a_narrow_network(families: dict[str, Callable[..., Any]]) -> None:
    unet, seen = families["sdxl"](in_channels=4, out_channels=4), []
    unet.add_time_proj.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    given = {
        "encoder_hidden_states": torch.randn(1, 77, 24),
        "text_embeds": torch.randn(1, 32),
        "time_ids": torch.tensor([[1021.0, 999.0, 13.0, 7.0, 1021.0, 999.0]]),
    }
    EagerDenoiser(torch.nn.Module.to(unet, torch.bfloat16))(torch.randn(1, 4, 8, 8), torch.tensor([999.0]), **given)
    assert torch.equal(seen[0], given["time_ids"][0])


# --- a directory that is not as it was exported -----------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["ort", "ov"])
def test_a_changed_file_is_refused(copied: Path, backend: str) -> None:
    with (copied / "unet" / "model.fp32.onnx").open("r+b") as stream:
        stream.seek(1000)
        stream.write(b"\0\1\2\3")
    with pytest.raises(DpctlError, match="differs from its digest"):
        runtime.open_denoiser(copied, backend)


@pytest.mark.parametrize("backend", ["ort", "ov"])
def test_a_damaged_graph_is_a_clean_error(copied: Path, backend: str, rewrite_manifest: Callable[..., None]) -> None:
    graph = copied / "unet" / "model.fp32.onnx"
    data = graph.read_bytes()
    graph.write_bytes(data[: len(data) // 2])
    rewrite_manifest(copied)
    with pytest.raises(DpctlError, match="cannot load the graph"):
        runtime.open_denoiser(copied, backend)
