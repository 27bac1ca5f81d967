"""What is particular to DeepCache: which calls are whole, what the others leave out, and that all else is exact."""

import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from toys import TEXT, decoder, tokenizer
from transformers import CLIPTextConfig, CLIPTextModel

import runtime
from dpctl import cost
from dpctl.errors import DpctlError
from dpctl.models import load_model
from dpctl.pruned_unet import PrunedUNet2DConditionModel, PrunedUNet2DModel
from runtime.backends.deepcache import DeepCache, DeepCacheDenoiser
from runtime.backends.eager import EagerDenoiser
from runtime.network import Network
from runtime.pipeline import draw_images

PLAIN = [
    *("ddpm", "ldm", "class-conditional", "resnet-resampling", "scale-shift"),
    *("stable-diffusion", "sdxl", "inpainting", "latent-consistency"),
]
Families = dict[str, Callable[..., Any]]
NARROWED = {
    "down_blocks.0.resnets.0.conv1": [32, 16],
    "down_blocks.0.resnets.0.time_emb_proj": [128, 16],
    "down_blocks.0.resnets.0.norm2": [16],
    "down_blocks.0.resnets.0.conv2": [16, 32],
}


def built(families: Families, family: str) -> Any:
    given = {"in_channels": 4, "out_channels": 4} if family in ("stable-diffusion", "sdxl") else {}
    return families[family](**given)


def inputs(unet: Any, seed: int = 0, batch: int = 2) -> dict[str, Tensor]:
    """Return inputs by their names in the signature: noise, and whole numbers where those are wanted."""
    generator = torch.Generator().manual_seed(seed)

    def like(value: Tensor) -> Tensor:
        if value.is_floating_point():
            return torch.randn(value.shape, generator=generator)
        return torch.randint(0, 5, value.shape, generator=generator)

    return {name: like(value) for name, value in cost.example_inputs(unet, batch).items() if name != "timestep"}


def at(timestep: float, batch: int = 2) -> Tensor:
    return torch.full((batch,), timestep)


@contextmanager
def counted_macs() -> Iterator[list[int]]:
    """Count the MACs of every convolution and linear layer that runs, whichever network it belongs to."""
    counts: list[int] = []

    def count(module: nn.Module, _: Any, output: Any) -> None:
        if cost.is_layer(module):
            counts.append(output.numel() // cost.width_out(module) * module.weight.numel())

    hook = register_module_forward_hook(count)
    try:
        yield counts
    finally:
        hook.remove()


def macs_of(denoiser: Any, timesteps: list[float], given: dict[str, Tensor]) -> list[int]:
    found = []
    for timestep in timesteps:
        with counted_macs() as counts:
            denoiser(timestep=at(timestep, len(given["sample"])), **given)
        found.append(sum(counts))
    return found


@pytest.mark.parametrize("family", PLAIN)
def test_with_an_interval_of_1_it_is_eager_bit_for_bit(families: Families, family: str) -> None:
    unet = built(families, family)
    ours, eager = DeepCacheDenoiser(unet, 1), EagerDenoiser(unet)
    for step, timestep in enumerate((90.0, 60.0, 30.0)):
        given = inputs(unet, step)
        assert torch.equal(ours(timestep=at(timestep), **given), eager(timestep=at(timestep), **given))


@pytest.mark.parametrize("family", PLAIN)
def test_every_third_call_is_whole_and_the_others_are_near(families: Families, family: str) -> None:
    unet = built(families, family)
    ours, eager, given = DeepCacheDenoiser(unet), EagerDenoiser(unet), inputs(unet)
    for step, timestep in enumerate((90.0, 89.0, 88.0, 60.0, 59.0)):
        found, expected = ours(timestep=at(timestep), **given), eager(timestep=at(timestep), **given)
        assert torch.equal(found, expected) == (step % 3 == 0)
        assert (found - expected).norm() < 0.3 * expected.norm()


@pytest.mark.parametrize("family", PLAIN)
def test_the_outermost_blocks_with_a_fresh_deep_feature_are_the_whole_network(families: Families, family: str) -> None:
    unet = built(families, family)
    cached, given = DeepCache(unet).eval(), inputs(unet)
    with torch.no_grad():
        whole = cached(timestep=at(50.0), **given)
        assert torch.equal(cached.outermost(timestep=at(50.0), **given), whole)
        # A sample of its own shows in the output: what is shallow is computed anew.
        moved = given | {"sample": given["sample"] + 1}
        assert not torch.equal(cached.outermost(timestep=at(50.0), **moved), whole)
        assert not torch.equal(cached.outermost(timestep=at(10.0), **given), whole)


@pytest.mark.parametrize("kind", ["PrunedUNet2DModel", "PrunedUNet2DConditionModel"])
def test_a_pruned_network_is_taken_too(families: Families, kind: str) -> None:
    family, make = {
        "PrunedUNet2DModel": ("ddpm", PrunedUNet2DModel),
        "PrunedUNet2DConditionModel": ("stable-diffusion", PrunedUNet2DConditionModel),
    }[kind]
    with torch.random.fork_rng():
        unet = make(base_config=dict(families[family]().config), channels=NARROWED).eval()
    ours, given = DeepCacheDenoiser(unet), inputs(unet)
    expected = Network(unet)(timestep=at(50.0), **given)
    assert torch.equal(ours(timestep=at(50.0), **given), expected)
    first, second = macs_of(ours, [49.0, 48.0], given)
    assert first == second < 2 * cost.macs(unet).linear


# --- trajectories -----------------------------------------------------------------------------------------------------


def is_whole(denoiser: Any, timestep: Tensor, given: dict[str, Tensor]) -> bool:
    unet = denoiser._network.whole.unet
    with counted_macs() as counts:
        denoiser(timestep=timestep, **given)
    return sum(counts) == len(timestep) * cost.macs(unet).linear


@pytest.mark.parametrize(
    ("timestep", "batch", "whole"),
    [
        (torch.tensor([20.0, 20.0]), 2, False),  # goes on
        (torch.tensor([99.0, 99.0]), 2, True),  # the next image
        (torch.tensor([50.0, 50.0]), 2, True),  # the next image, of one step
        (torch.tensor([20.0, 60.0]), 2, True),  # the next image in one row
        (torch.tensor([20.0]), 1, True),  # another batch
    ],
)
def test_a_new_trajectory_begins_with_a_whole_call(toy_unet: Any, timestep: Tensor, batch: int, whole: bool) -> None:
    denoiser = DeepCacheDenoiser(toy_unet)
    assert is_whole(denoiser, at(50.0), inputs(toy_unet))
    assert is_whole(denoiser, timestep, inputs(toy_unet, batch=batch)) == whole


def test_another_image_size_is_another_trajectory(toy_unet: Any) -> None:
    denoiser = DeepCacheDenoiser(toy_unet)
    expected = EagerDenoiser(toy_unet)(torch.ones(2, 1, 16, 16), at(20.0))
    denoiser(torch.zeros(2, 1, 8, 8), at(50.0))
    assert torch.equal(denoiser(torch.ones(2, 1, 16, 16), at(20.0)), expected)


def test_a_buffer_of_timesteps_that_the_caller_reuses_is_no_new_trajectory(toy_unet: Any) -> None:
    denoiser, given, timestep = DeepCacheDenoiser(toy_unet), inputs(toy_unet), at(50.0)
    assert is_whole(denoiser, timestep, given)
    timestep.fill_(49.0)
    assert not is_whole(denoiser, timestep, given)


def test_after_a_call_that_failed_comes_a_whole_one(toy_unet: Any) -> None:
    denoiser, given = DeepCacheDenoiser(toy_unet), inputs(toy_unet)
    denoiser(timestep=at(50.0), **given)
    with pytest.raises(ValueError, match="class_embedding"):
        denoiser(timestep=at(49.0), class_labels=torch.tensor([1, 2]), **given)
    assert is_whole(denoiser, at(48.0), given)


# --- what it saves ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["ddpm", "sdxl"])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_between_two_whole_calls_it_runs_fewer_macs(families: Families, family: str, interval: int) -> None:
    unet = built(families, family)
    given, whole = inputs(unet, batch=1), cost.macs(unet).linear
    steps = [100.0 - step for step in range(2 * interval + 1)]
    found = macs_of(DeepCacheDenoiser(unet, interval), steps, given)
    assert found[::interval] == [whole] * 3
    assert interval == 1 or max(found[1:interval]) < whole
    assert len(set(found)) == (1 if interval == 1 else 2)


# --- sampling and memory ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler_name", ["ddim", "dpm-solver++", "euler"])
def test_it_draws_images_near_those_of_eager(scheduler_name: str) -> None:
    # Of a trained network: only there are deep features alike from step to step.
    scheduler = runtime.make_scheduler(scheduler_name, load_model("reference").scheduler.config)
    asked: dict[str, Any] = {"indices": range(4), "num_inference_steps": 20}
    with runtime.open_denoiser("reference", "deepcache") as ours, runtime.open_denoiser("reference") as eager:
        images = runtime.sample(ours, scheduler, seed=0, **asked)
        again = runtime.sample(ours, scheduler, seed=0, **asked)
        expected, others = (runtime.sample(eager, scheduler, seed=seed, **asked) for seed in (0, 1))
    assert images.isfinite().all()
    assert torch.equal(images, again)  # nothing is left of the trajectory before
    assert 0 < (images - expected).abs().mean() < 0.5 * (others - expected).abs().mean()


def test_images_do_not_depend_on_the_batch(toy_pipeline: Path) -> None:
    scheduler = load_model(toy_pipeline).scheduler
    with runtime.open_denoiser(toy_pipeline, "deepcache") as denoiser:
        asked: dict[str, Any] = {"seed": 3, "num_inference_steps": 7}
        together = runtime.sample(denoiser, scheduler, indices=range(3), **asked)
        apart = [runtime.sample(denoiser, scheduler, indices=[i], **asked) for i in range(3)]
    torch.testing.assert_close(together, torch.cat(apart), rtol=0, atol=1e-4)


def test_the_copies_hold_the_weights_of_the_network_and_no_others(toy_unet: Any) -> None:
    before = {name: value.clone() for name, value in toy_unet.state_dict().items()}
    cached = DeepCache(toy_unet)
    assert {id(p) for p in cached.parameters()} == {id(p) for p in toy_unet.parameters()}
    # The network itself is as it was: no hooks, no parts missing.
    assert not any(module._forward_pre_hooks for module in toy_unet.modules())
    after = toy_unet.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_after_the_block_weights_and_feature_are_free(toy_pipeline: Path) -> None:
    gc.collect()
    gc.disable()  # it must not take a collection
    try:
        with runtime.open_denoiser(toy_pipeline, "deepcache") as denoiser:
            denoiser(torch.zeros(2, 1, 8, 8), at(50.0))
            kept = denoiser._network._kept.feature  # type: ignore[attr-defined]
            held = [weakref.ref(value) for value in (kept, next(denoiser._network.parameters()))]  # type: ignore[attr-defined]
            del kept
        assert [found() for found in held] == [None, None]
    finally:
        gc.enable()


# --- within diffusers' pipelines --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stable_diffusion(families: Families, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pipelines") / "sd"
    with torch.random.fork_rng():
        torch.manual_seed(1)
        parts: dict[str, Any] = {
            "vae": decoder(AutoencoderKL),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**TEXT)).eval(),
            "tokenizer": tokenizer(directory.with_name("words")),
            "unet": built(families, "stable-diffusion"),
            "scheduler": DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        }
    plain = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    StableDiffusionPipeline(**parts, **plain).save_pretrained(directory)
    return directory


def opened(directory: Path, backend: str) -> Any:
    pipe = runtime.load_pipeline(directory, backend, scheduler="ddim")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def images(pipe: Any, prompts: list[str], steps: int, guidance_scale: float = 4.0) -> Any:
    asked = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "np"}
    return pipe(prompts, generator=runtime.image_generators(0, range(len(prompts))), **asked).images


def test_a_pipelines_calls_share_no_features(stable_diffusion: Path) -> None:
    pipe, eager = opened(stable_diffusion, "deepcache"), opened(stable_diffusion, "eager")
    first = images(pipe, ["a cat"], 4)
    other = images(pipe, ["a bat"], 4)
    assert (first != other).any()
    assert (images(pipe, ["a cat"], 4) == first).all()
    assert (images(opened(stable_diffusion, "deepcache"), ["a bat"], 4) == other).all()
    # A trajectory's first call is whole, after any other: with and without guidance, of one image and of two.
    for prompts, scale in ((["a tab"], 4.0), (["a tab"], 1.0), (["a tab", "a cat"], 1.0), (["a tab"], 4.0)):
        images(pipe, ["a cat"], 2, scale)
        assert (images(pipe, prompts, 1, scale) == images(eager, prompts, 1, scale)).all()


def test_of_a_pipelines_calls_every_third_is_whole(stable_diffusion: Path) -> None:
    pipe, eager = opened(stable_diffusion, "deepcache"), opened(stable_diffusion, "eager")
    calls: list[bool] = []
    network = pipe.unet.denoiser._network
    network.whole.register_forward_hook(lambda *_: calls.append(True))
    network.outermost.register_forward_hook(lambda *_: calls.append(False))
    found = images(pipe, ["a cat"], 5)
    assert calls == [True, False, False, True, False]
    assert (found != images(eager, ["a cat"], 5)).any()
    images(pipe, ["a cat"], 2)
    assert calls[5:] == [True, False]


def test_who_draws_says_where_a_trajectory_begins(stable_diffusion: Path, toy_pipeline: Path) -> None:
    asked: dict[str, Any] = {"seed": 0, "indices": [0], "num_inference_steps": 1}
    texts: dict[str, Any] = {"prompts": ["a cat"], "guidance_scale": 4.0}
    pipe = opened(stable_diffusion, "deepcache")
    late = runtime.make_scheduler("ddim", pipe.scheduler.config)  # its one step is at timestep 1
    pipe.scheduler = runtime.make_scheduler("lcm", pipe.scheduler.config)  # and this one's at 999
    draw_images(pipe, **asked, **texts)
    pipe.scheduler = late
    assert torch.equal(
        draw_images(pipe, **asked, **texts), draw_images(opened(stable_diffusion, "eager"), **asked, **texts)
    )
    config = load_model(toy_pipeline).scheduler.config
    with runtime.open_denoiser(toy_pipeline, "deepcache") as ours, runtime.open_denoiser(toy_pipeline) as eager:
        runtime.sample(ours, runtime.make_scheduler("lcm", config), **asked)
        ddim = runtime.make_scheduler("ddim", config)
        assert torch.equal(runtime.sample(ours, ddim, **asked), runtime.sample(eager, ddim, **asked))


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_skip_connections_of_another_kind_are_refused_by_name(families: Families) -> None:
    with pytest.raises(DpctlError, match=r"hang together[\s\S]*SkipDownBlock2D[\s\S]*use the backend eager"):
        DeepCacheDenoiser(families["ncsnpp"]())


def test_one_level_is_refused(model_directory: Path) -> None:
    with pytest.raises(DpctlError, match="two levels or more"):
        runtime.open_denoiser(model_directory, "deepcache")


def test_an_outermost_up_block_that_reaches_deeper_is_refused(toy_unet: Any) -> None:
    toy_unet.up_blocks[-1].resnets.append(toy_unet.up_blocks[-1].resnets[-1])
    with pytest.raises(DpctlError, match=r"skip connections from deeper ones[\s\S]*3 residual blocks"):
        DeepCacheDenoiser(toy_unet)


@pytest.mark.parametrize("interval", [0, -3])
def test_an_interval_below_1_is_refused(toy_unet: Any, interval: int) -> None:
    with pytest.raises(DpctlError, match="below 1"):
        DeepCacheDenoiser(toy_unet, interval)
