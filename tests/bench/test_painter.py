"""Whole images of every kind of model: the images are those of the pipeline, and the times are arithmetic."""

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import runtime
from dpctl import bench, cli
from dpctl.artifact import MANIFEST
from dpctl.bench import painter, subjects
from dpctl.bench.document import read_result
from dpctl.bench.painter import Painter, Times, Watch, open_painter
from dpctl.bench.quality import load_samples
from dpctl.data import read_prompts
from dpctl.errors import DpctlError
from dpctl.models import load_model, load_scheduler
from dpctl.prune import prune
from dpctl.recipe import BenchRecipe, ExportRecipe, PruneRecipe
from export import export_model

PROMPTS = ("a cat", "a bat", "tab")
KINDS = ("tiny", "sd", "sdxl", "ldm", "ldm-text")
TEXTUAL = ("sd", "sdxl", "ldm-text", "sd-exported")
STEPS = 3


@pytest.fixture(scope="module")
def directories(pipelines: dict[str, Path], tiny: Path) -> dict[str, Path]:
    return {**pipelines, "tiny": tiny}


def opened(directory: Path, backend: str = "eager", scheduler: str = "ddim", **more: Any) -> Painter:
    text: dict[str, Any] = {"prompts": PROMPTS} if directory.name in TEXTUAL else {}
    return open_painter(directory, backend, scheduler=scheduler, threads=1, seed=7, **text | more)


def expected(directory: Path, indices: list[int], scheduler: str = "ddim", **more: Any) -> torch.Tensor:
    """Draw with what the painter is made of."""
    if directory.name == "tiny":
        plan = runtime.make_scheduler(scheduler, load_scheduler(directory).config)
        with runtime.open_denoiser(directory) as denoiser:
            return runtime.sample(denoiser, plan, seed=7, indices=indices, num_inference_steps=STEPS)
    pipe = runtime.load_pipeline(directory, scheduler=scheduler)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler.set_timesteps(STEPS)  # a fresh latent diffusion pipeline scales its first noise for 1000 steps
    texts = [PROMPTS[index % 3] for index in indices]
    number: dict[str, Any] = {"prompt": texts} if directory.name in TEXTUAL else {"batch_size": len(indices)}
    asked = {"generator": runtime.image_generators(7, indices), "num_inference_steps": STEPS, "output_type": "np"}
    return torch.from_numpy(pipe(**number, **asked, **more).images).permute(0, 3, 1, 2) * 2 - 1


@pytest.mark.parametrize("scheduler", ["ddim", "dpm-solver++", "euler"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_paints_what_the_pipeline_draws_timed_or_not(
    directories: dict[str, Path], kind: str, scheduler: str
) -> None:
    brush = opened(directories[kind], scheduler=scheduler)
    images = brush.paint([4, 1], STEPS)
    assert images.dtype == torch.float32
    assert torch.equal(images, expected(directories[kind], [4, 1], scheduler))
    again, times = brush.timed([4, 1], STEPS)
    assert torch.equal(again, images)
    assert torch.equal(brush.paint([4, 1], STEPS), images)
    assert len(times.network_latency_s) == len(times.step_latency_s) == STEPS
    brush.close()


@pytest.mark.parametrize("scheduler", ["ddpm", "euler-ancestral", "lcm"])
@pytest.mark.parametrize("kind", KINDS)
def test_noise_of_the_scheduler_is_the_images_own(directories: dict[str, Path], kind: str, scheduler: str) -> None:
    with opened(directories[kind], scheduler=scheduler) as brush:
        together = brush.paint([0, 1, 2], STEPS)
        torch.manual_seed(1)  # what others draw does not count
        backwards = brush.paint([2, 0], STEPS)
        timed, _ = brush.timed([1], STEPS)
    torch.testing.assert_close(backwards, together[[2, 0]], rtol=0, atol=1e-4)
    torch.testing.assert_close(timed, together[[1]], rtol=0, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_parts_are_the_whole(directories: dict[str, Path], kind: str) -> None:
    brush = opened(directories[kind])
    _, times = brush.timed(range(2), STEPS)
    textual = kind in TEXTUAL
    assert tuple(times.parts_s) == painter.PARTS
    assert min(times.parts_s.values()) >= 0
    assert math.fsum(times.parts_s.values()) == pytest.approx(times.latency_s, rel=1e-9)
    assert math.fsum(times.network_latency_s) == pytest.approx(times.parts_s["denoiser"], rel=1e-9)
    found = {part for part, spent in times.parts_s.items() if spent > 0}
    missing = ({"text encoder"} if not textual else set()) | ({"vae"} if kind == "tiny" else set())
    assert found == set(painter.PARTS) - missing
    # Latent diffusion from texts guides only where it is asked to.
    assert times.network_batch_size == (4 if kind.startswith("sd") else 2)
    brush.close()


def test_without_guidance_there_is_a_row_for_each_image(directories: dict[str, Path]) -> None:
    brush = opened(directories["sd"], guidance_scale=1.0)
    images, times = brush.timed([0, 1, 2], STEPS)
    assert times.network_batch_size == 3
    assert torch.equal(images, expected(directories["sd"], [0, 1, 2], guidance_scale=1.0))
    brush.close()
    with pytest.raises(DpctlError, match="the network is closed"):
        brush.paint([0], 1)


def test_a_thing_keeps_its_class_and_is_timed_only_within_the_block() -> None:
    class Thing:
        def step(self, number: int) -> int:
            return number + 1

    thing, watch = Thing(), Watch(lambda: None)
    with pytest.raises(KeyError), watch.on("vae", thing, ["step"]):
        assert type(thing).__qualname__ == Thing.__qualname__
        assert thing.step(1) == 2
        raise KeyError
    assert type(thing) is Thing
    assert thing.step(1) == 2
    assert len(watch.calls) == 1


def test_every_reading_waits_for_the_device_and_a_call_within_another_counts_once() -> None:
    events: list[str] = []
    ticks = itertools.count(0, 10**9)

    class Scheduler:
        def scale_model_input(self) -> None: ...

        def step(self) -> None:
            self.scale_model_input()

    class Network:
        def __call__(self, sample: torch.Tensor) -> None: ...

    def clock() -> int:
        events.append("read")
        return next(ticks)

    watch = Watch(lambda: events.append("wait"), clock)
    network, scheduler = Network(), Scheduler()
    with watch.on("denoiser", network, ["__call__"]), watch.on("scheduler", scheduler, ["step", "scale_model_input"]):
        began = watch.now()
        for _ in range(2):
            scheduler.scale_model_input()
            network(torch.zeros(6))
            scheduler.step()
        times = watch.times(began, watch.now())
    assert events == ["wait", "read"] * 14
    # The clock counts its readings: a call takes one second, and one second lies between two calls.
    parts = {"text encoder": 0.0, "denoiser": 2.0, "scheduler": 4.0, "vae": 0.0, "other": 7.0}
    assert times == Times(13.0, (3.0, 6.0), (1.0, 1.0), parts, 6)


def test_prompts_are_the_lines_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\ufeffa red cat\r\n\n  a bat \n \n", encoding="utf-8")
    assert read_prompts(tmp_path / "prompts.txt") == ("a red cat", "a bat")


@pytest.mark.parametrize(
    ("content", "said"), [(None, "cannot be read"), (b"\n \n", "there are no prompts"), (b"\xff\xfe\x00", "not text")]
)
def test_prompts_that_are_none_are_refused(content: bytes | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "prompts.txt").write_bytes(content)
    with pytest.raises(DpctlError, match=said) as problem:
        read_prompts(tmp_path / "prompts.txt")
    assert "one prompt per line" in problem.value.todo


@pytest.mark.parametrize(
    ("kind", "asked", "said"),
    [
        ("sd", {"prompts": ()}, "or --prompts FILE"),
        ("ldm", {"prompts": PROMPTS}, "takes no text"),
        ("tiny", {"prompts": PROMPTS}, "takes no text"),
        ("ldm", {"guidance_scale": 2.0}, "guidance is towards a text"),
        ("sd", {"guidance_scale": math.nan}, "not a finite number"),
    ],
)
def test_prompts_go_with_models_that_take_them(
    directories: dict[str, Path], kind: str, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(DpctlError, match=said):
        opened(directories[kind], **asked)


def test_steps_that_a_pipeline_cannot_take_are_refused(directories: dict[str, Path]) -> None:
    brush = opened(directories["sd"])
    with pytest.raises(DpctlError, match="the pipeline refuses this"):
        brush.paint([0], 2000)
    brush.close()


@pytest.mark.parametrize(
    ("kind", "shape"), [("tiny", (1, 8, 8)), ("sd", (3, 16, 16)), ("ldm", (3, 16, 16)), ("ldm-text", (3, 64, 64))]
)
def test_the_shape_is_that_of_the_pictures(
    directories: dict[str, Path], kind: str, shape: tuple[int, int, int]
) -> None:
    (model,) = subjects.describe(BenchRecipe(baseline=str(directories[kind])))
    assert subjects.shape(model) == shape
    assert tuple(opened(directories[kind]).paint([0], 1).shape[1:]) == shape


def test_batches_are_counted_in_images(directories: dict[str, Path], tmp_path: Path) -> None:
    export_model(load_model(directories["sd"]), tmp_path / "sd-exported", ExportRecipe(batch=(1, 1, 3)))
    three = BenchRecipe(baseline=str(directories["sd"]), backends=("ort",), baselines=(), batch_sizes=(1, 3))
    (entry,) = subjects.prepare(three, subjects.describe(three), [tmp_path / "sd-exported"], bench.progress.no_bar)
    assert entry.directory == tmp_path / "sd-exported"
    brush = opened(entry.directory, "ort")
    images, times = brush.timed(range(3), STEPS)
    assert times.network_batch_size == 6
    torch.testing.assert_close(images, opened(directories["sd"]).paint(range(3), STEPS), rtol=1e-3, atol=1e-3)
    assert [subjects.largest_batch(entry, count) for count in (2, 100)] == [2, 3]
    own = BenchRecipe(baseline=str(entry.directory), backends=("ort",), baselines=(), batch_sizes=(4,))
    (beyond,) = subjects.prepare(own, subjects.describe(own), [], bench.progress.no_bar)
    assert "batches of 3 at most, and 4 was asked for" in (beyond.refused or "")
    told = (entry.directory / MANIFEST).read_text()
    (entry.directory / MANIFEST).write_text(json.dumps(json.loads(told) | {"signature": {"batch": "many"}}))
    with pytest.raises(DpctlError, match="what the manifest records of the export cannot be read"):
        subjects.prepare(three, subjects.describe(three), [entry.directory], bench.progress.no_bar)


def test_the_command_line_takes_prompts(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat")
    models, out = [str(directories["ldm"])] * 2, str(tmp_path / "out")
    asked = {("--prompts", str(tmp_path / "prompts.txt")): "takes no text", ("--guidance-scale", "2"): "towards a text"}
    for more, said in asked.items():
        monkeypatch.setattr("sys.argv", ["dpctl", "bench", *models, "--out", out, *more])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert ended.value.code == 1
        assert said in capfd.readouterr().err
        assert not (tmp_path / "out").exists()


def test_pipelines_are_measured_as_a_whole(directories: dict[str, Path], toy_clip: Path, tmp_path: Path) -> None:
    prune(str(directories["sd"]), tmp_path / "slim", PruneRecipe("magnitude", ratio=0.5, compensate=False))
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    recipe = BenchRecipe(
        baseline=str(directories["sd"]),
        candidates=(str(tmp_path / "slim"),),
        backends=("eager",),
        baselines=(),
        batch_sizes=(2,),
        num_inference_steps=(2,),
        rounds=1,
        samples=4,
        threads=1,
        fewer_steps=False,
        clip=str(toy_clip),
        prompts=str(tmp_path / "prompts.txt"),
        guidance_scale=3.0,
    )
    result = bench.run_bench(recipe, tmp_path / "out")
    assert read_result(tmp_path / "out/bench.json") == result
    assert [subject.failure for subject in result.subjects] == [None, None]
    assert result.environment["prompts_digest"] == hashlib.sha256("\n".join(PROMPTS).encode()).hexdigest()
    for subject in result.subjects:
        (turn,) = (turn for turn in subject.turns if turn.round == 1)
        assert math.fsum(turn.parts_s.values()) == pytest.approx(turn.latency_s, rel=1e-9)
        assert set(turn.parts_s) == set(painter.PARTS)
        assert turn.network_batch_size == 4
    assert [quality.figures["clip-score"].count for quality in result.quality] == [4, 4]
    whole, slim = (load_samples(tmp_path / "out" / quality.samples) for quality in result.quality)
    assert whole.shape == slim.shape == (4, 16, 16, 3)
    assert (whole != slim).any()
    asked: dict[str, Any] = {"prompts": PROMPTS, "guidance_scale": 3.0, "threads": 1}
    fourth = open_painter(directories["sd"], "eager", scheduler="ddim", **asked).paint([3], 2)[0]
    assert ((fourth + 1) * 127.5 - torch.from_numpy(whole[3]).permute(2, 0, 1)).abs().max() < 0.51
