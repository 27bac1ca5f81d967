"""Real diffusers pipelines with their UNet on a backend: the images are those of the stock pipeline."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LDMPipeline,
    LDMTextToImagePipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
from PIL import Image
from toys import TEXT, decoder, tokenizer
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import runtime
from dpctl.errors import DpctlError
from dpctl.models import load_model, write_pipeline
from dpctl.pruned_unet import PrunedUNet2DConditionModel
from dpctl.recipe import ExportRecipe
from dpctl.sample import Wish, draw
from export import export_model

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm-solver++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "lcm": "LCMScheduler",
}
PROMPT = "a red cat"
# As few nodes as an export of a text-conditional network can have.
SMALL: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D",),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
NARROWED = {
    "down_blocks.0.resnets.0.conv1": [8, 4],
    "down_blocks.0.resnets.0.time_emb_proj": [32, 4],
    "down_blocks.0.resnets.0.norm2": [4],
    "down_blocks.0.resnets.0.conv2": [4, 8],
}


@pytest.fixture(autouse=True)
def _own_seed() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def own_scheduler() -> Any:
    return DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)


def save_text_to_image(directory: Path, kind: Any, unet: Any, encoders: tuple[Any, ...]) -> Path:
    words = tokenizer(directory.with_name("words"))
    texts = {f"text_encoder{mark}": one for mark, one in zip(("", "_2"), encoders, strict=False)}
    texts |= {f"tokenizer{mark}": words for mark, _ in zip(("", "_2"), encoders, strict=False)}
    own = {"safety_checker": None, "feature_extractor": None} if len(encoders) == 1 else {}
    own |= {"requires_safety_checker": False} if len(encoders) == 1 else {"add_watermarker": False}
    pipe = kind(vae=decoder(AutoencoderKL), unet=unet, scheduler=own_scheduler(), **texts, **own)
    pipe.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def text_encoder() -> CLIPTextModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return CLIPTextModel(CLIPTextConfig(**TEXT)).eval()


@pytest.fixture(scope="module")
def stable_diffusion(
    families: dict[str, Callable[..., Any]], text_encoder: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    unet = families["stable-diffusion"](in_channels=4, out_channels=4)
    directory = tmp_path_factory.mktemp("pipelines") / "sd"
    return save_text_to_image(directory, StableDiffusionPipeline, unet, (text_encoder,))


@pytest.fixture(scope="module")
def pruned(text_encoder: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion pipeline whose network has widths of its own."""
    directory = tmp_path_factory.mktemp("pipelines") / "pruned"
    with torch.random.fork_rng():
        torch.manual_seed(2)
        unet = PrunedUNet2DConditionModel(SMALL, NARROWED).eval()
        plain = UNet2DConditionModel(**SMALL)
    save_text_to_image(directory, StableDiffusionPipeline, plain, (text_encoder,))
    shutil.rmtree(directory / "unet")
    write_pipeline(directory, unet=unet, scheduler=own_scheduler())
    return directory


@pytest.fixture(scope="module")
def exported(pruned: Path) -> Path:
    out = pruned.with_name("exported")
    export_model(load_model(pruned), out, ExportRecipe(batch=(1, 1, 3)))
    return out


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An unconditional latent diffusion pipeline."""
    config = SMALL | {"in_channels": 3, "out_channels": 3, "down_block_types": ("AttnDownBlock2D",)}
    del config["cross_attention_dim"], config["mid_block_type"]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = UNet2DModel(**config, add_attention=False).eval()
        vae = decoder(VQModel, latent_channels=3, num_vq_embeddings=16)
    directory = tmp_path_factory.mktemp("pipelines") / "ldm"
    LDMPipeline(vqvae=vae, unet=unet, scheduler=own_scheduler()).save_pretrained(directory)
    return directory


def quiet(pipe: Any, scheduler: str | None = None) -> Any:
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
    return pipe


def generators(*indices: int) -> list[torch.Generator]:
    return runtime.image_generators(0, indices)


def drawn(pipe: Any, *indices: int, **more: Any) -> torch.Tensor:
    asked = {"num_inference_steps": 3, "guidance_scale": 4.0, "output_type": "pt"} | more
    return pipe([PROMPT] * len(indices), generator=generators(*indices), **asked).images


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_stable_diffusion_on_eager_is_the_stock_pipeline_bit_for_bit(stable_diffusion: Path, scheduler: str) -> None:
    stock = quiet(StableDiffusionPipeline.from_pretrained(stable_diffusion, safety_checker=None), scheduler)
    pipe = quiet(runtime.load_pipeline(stable_diffusion), scheduler)
    assert type(pipe) is StableDiffusionPipeline
    image = drawn(pipe, 5)
    assert image.shape == (1, 3, 16, 16)
    assert torch.equal(image, drawn(stock, 5))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_a_pruned_pipeline_on_ort_draws_what_stock_draws(pruned: Path, exported: Path, scheduler: str) -> None:
    stock = quiet(StableDiffusionPipeline.from_pretrained(pruned, trust_remote_code=True), scheduler)
    pipe = quiet(runtime.load_pipeline(exported, "ort"), scheduler)
    expected = drawn(stock, 5)
    torch.testing.assert_close(drawn(pipe, 5), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(drawn(quiet(runtime.load_pipeline(pruned), scheduler), 5), expected)


def sdxl(families: dict[str, Callable[..., Any]], text_encoder: Any, directory: Path) -> Path:
    second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT | {"projection_dim": 32})).eval()
    unet = families["sdxl"](in_channels=4, out_channels=4, cross_attention_dim=48)
    return save_text_to_image(directory, StableDiffusionXLPipeline, unet, (text_encoder, second))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_sdxl_on_eager_is_the_stock_pipeline_bit_for_bit(
    families: dict[str, Callable[..., Any]], text_encoder: Any, tmp_path: Path, scheduler: str
) -> None:
    directory = sdxl(families, text_encoder, tmp_path / "sdxl")
    stock = quiet(StableDiffusionXLPipeline.from_pretrained(directory, add_watermarker=False), scheduler)
    pipe = quiet(runtime.load_pipeline(directory), scheduler)
    image = drawn(pipe, 5)
    assert image.shape == (1, 3, 16, 16)
    assert torch.equal(image, drawn(stock, 5))


@pytest.mark.slow
def test_sdxl_on_ort_draws_what_stock_draws(
    families: dict[str, Callable[..., Any]], text_encoder: Any, tmp_path: Path
) -> None:
    directory = sdxl(families, text_encoder, tmp_path / "sdxl")
    export_model(load_model(directory), tmp_path / "exported", ExportRecipe(batch=(1, 1, 2)))
    stock = quiet(StableDiffusionXLPipeline.from_pretrained(directory, add_watermarker=False))
    pipe = quiet(runtime.load_pipeline(tmp_path / "exported", "ort"))
    torch.testing.assert_close(drawn(pipe, 5), drawn(stock, 5), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_latent_diffusion_on_eager_is_the_stock_pipeline_bit_for_bit(latent: Path, scheduler: str) -> None:
    stock = quiet(LDMPipeline.from_pretrained(latent), scheduler)
    pipe = quiet(runtime.load_pipeline(latent), scheduler)
    asked = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
    own = generators(1, 2)
    if scheduler == "lcm":  # the stock loop gives its scheduler no generator, ours does
        stock.scheduler.step = functools.partial(stock.scheduler.step, generator=own)
    expected = stock(generator=own, **asked).images
    found = pipe(generator=generators(1, 2), **asked).images
    assert found.shape == (2, 16, 16, 3)
    assert (found == expected).all()


def test_latent_diffusion_on_ort_draws_what_stock_draws(latent: Path, tmp_path: Path) -> None:
    export_model(load_model(latent), tmp_path / "exported", ExportRecipe(batch=(1, 1, 2)))
    asked = {"batch_size": 2, "num_inference_steps": 3, "output_type": "np"}
    expected = quiet(LDMPipeline.from_pretrained(latent))(generator=generators(1, 2), **asked).images
    found = quiet(runtime.load_pipeline(tmp_path / "exported", "ort"))(generator=generators(1, 2), **asked).images
    # Quantized latents may jump where rounding moves them to the next code: nearly all pixels agree.
    assert (abs(found - expected) < 1e-3).mean() > 0.99


def test_latent_diffusion_from_texts_is_the_stock_pipeline_bit_for_bit(
    families: dict[str, Callable[..., Any]], tmp_path: Path
) -> None:
    sizes = {"d_model": 24, "encoder_layers": 1, "encoder_ffn_dim": 32, "encoder_attention_heads": 2, "head_dim": 12}
    pipe = LDMTextToImagePipeline(
        vqvae=decoder(AutoencoderKL),
        bert=LDMBertModel(LDMBertConfig(vocab_size=100, max_position_embeddings=77, pad_token_id=0, **sizes)),
        tokenizer=tokenizer(tmp_path / "words"),
        unet=families["stable-diffusion"](in_channels=4, out_channels=4),
        scheduler=own_scheduler(),
    )
    pipe.save_pretrained(tmp_path / "ldm")
    # It divides sizes by 8 whatever its VAE does.
    asked = {"num_inference_steps": 2, "guidance_scale": 3.0, "height": 64, "width": 64, "output_type": "np"}
    stock = quiet(LDMTextToImagePipeline.from_pretrained(tmp_path / "ldm"))
    expected = stock([PROMPT], generator=generators(1), **asked).images
    found = quiet(runtime.load_pipeline(tmp_path / "ldm"))([PROMPT], generator=generators(1), **asked).images
    assert (found == expected).all()


def test_a_latent_consistency_model_gets_its_strength_of_guidance(text_encoder: Any, tmp_path: Path) -> None:
    unet = UNet2DConditionModel(**SMALL, time_cond_proj_dim=16).eval()
    pipe = LatentConsistencyModelPipeline(
        vae=decoder(AutoencoderKL),
        text_encoder=text_encoder,
        tokenizer=tokenizer(tmp_path / "words"),
        unet=unet,
        scheduler=diffusers.LCMScheduler(),
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    pipe.save_pretrained(tmp_path / "lcm")
    stock = quiet(LatentConsistencyModelPipeline.from_pretrained(tmp_path / "lcm"))
    ours = quiet(runtime.load_pipeline(tmp_path / "lcm"))
    weak, strong = (drawn(ours, 5, guidance_scale=scale) for scale in (2.0, 8.0))
    assert torch.equal(weak, drawn(stock, 5, guidance_scale=2.0))
    assert not torch.equal(weak, strong)


@pytest.mark.parametrize("one", [True, False])
def test_latent_diffusion_hands_its_generator_to_the_scheduler(latent: Path, one: bool) -> None:
    pipe = quiet(runtime.load_pipeline(latent, scheduler="euler-ancestral"))
    assert (type(pipe).__name__, isinstance(pipe, LDMPipeline)) == ("LDMPipeline", True)

    def images() -> torch.Tensor:
        pipe.scheduler.set_timesteps(3)  # it scales its first noise by the steps of the last call
        generator = generators(0)[0] if one else generators(0)  # given by its place
        return torch.from_numpy(pipe(1, generator, num_inference_steps=3, output_type="np").images)

    first = images()
    torch.rand(1)
    assert torch.equal(images(), first)
    assert "step" not in vars(pipe.scheduler)
    pipe(batch_size=1, num_inference_steps=1, output_type="np")  # without one, it is torch's global one as in stock


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_network_in_half_precision_draws_nearly_the_same(stable_diffusion: Path, precision: str) -> None:
    whole = drawn(quiet(runtime.load_pipeline(stable_diffusion)), 0, 1)
    pipe = quiet(runtime.load_pipeline(stable_diffusion, precision=precision))
    half = drawn(pipe, 0, 1)
    assert (pipe.unet.denoiser.precision, pipe.unet.dtype) == (precision, torch.float32)
    assert 0 < (half - whole).abs().mean() < 0.02


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_an_image_is_the_same_in_every_batch(exported: Path, scheduler: str) -> None:
    pipe = quiet(runtime.load_pipeline(exported, "ort"), scheduler)
    together = drawn(pipe, 0, 1, 2)
    alone = torch.cat([drawn(pipe, index) for index in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2


def test_a_pipeline_moves_only_to_where_its_network_runs(stable_diffusion: Path) -> None:
    pipe = runtime.load_pipeline(stable_diffusion)
    assert pipe.to("cpu", torch.float32) is pipe
    assert pipe.components["unet"] is pipe.unet
    assert (pipe.device, pipe.dtype, pipe.unet.dtype) == (torch.device("cpu"), torch.float32, torch.float32)
    for move in (lambda: pipe.to("meta"), lambda: pipe.to(torch.float16), pipe.unet.half):
        with pytest.raises(DpctlError, match="stays where its backend runs it"):
            move()
    with pytest.raises(DpctlError, match="a LoRA cannot be attached"):
        pipe.unet.load_lora_adapter({})


def test_schedulers_by_name(stable_diffusion: Path) -> None:
    pipe = runtime.load_pipeline(stable_diffusion, scheduler="euler", threads=1)
    assert type(pipe.scheduler).__name__ == "EulerDiscreteScheduler"
    assert pipe.scheduler.config.steps_offset == 1
    with pytest.raises(DpctlError, match="unknown scheduler"):
        runtime.load_pipeline(stable_diffusion, scheduler="eular")


def test_what_is_no_pipeline_for_a_backend_is_refused(
    toy_pipeline: Path, stable_diffusion: Path, exported: Path
) -> None:
    with pytest.raises(DpctlError, match=r"(?s)own loop.*DDPMPipeline.*runtime.sample.*dpctl sample"):
        runtime.load_pipeline(toy_pipeline)
    with pytest.raises(DpctlError, match="not a pipeline"):
        runtime.load_pipeline(stable_diffusion / "unet")
    with pytest.raises(DpctlError, match="runs exported directories"):
        runtime.load_pipeline(stable_diffusion, "ort")
    with pytest.raises(DpctlError, match="no weights for torch"):
        runtime.load_pipeline(exported, "eager")
    with pytest.raises(DpctlError, match="unknown backend"):
        runtime.load_pipeline(stable_diffusion, "eagre")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vae": ["evil", "AutoencoderKL"]}, "not of diffusers or transformers"),
        ({"vae": ["diffusers", "DDPMPipeline"]}, "not of diffusers or transformers"),
        ({"vae": ["StableDiffusionPipeline", "AutoencoderKL"]}, "not of diffusers or transformers"),
        ({"tokenizer": ["transformers", "AutoTokenizer"]}, "not of diffusers or transformers"),
        ({"tokenizer": "transformers"}, "not of diffusers or transformers"),
        ({"_class_name": ["evil", "Pipeline"]}, "unknown pipeline"),
        ({"_class_name": "UNet2DModel"}, "unknown pipeline"),
        ({"_class_name": "FluxPipeline"}, "cannot run on a backend"),
        ({}, "cannot be loaded"),  # None.py, which diffusers takes for a custom pipeline
    ],
)
def test_code_in_a_directory_is_never_run(
    stable_diffusion: Path, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    directory = shutil.copytree(stable_diffusion, tmp_path / "sd")
    (directory / "model_index.json").write_text(
        json.dumps(json.loads((directory / "model_index.json").read_text()) | changed)
    )
    for name in ("evil.py", "vae/evil.py", "pipeline.py", *([] if changed else ["None.py"])):
        (directory / name).write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(DpctlError, match=message):
        runtime.load_pipeline(directory)
    assert not (tmp_path / "ran").exists()


def test_pickles_are_never_read_and_the_network_is_freed(
    stable_diffusion: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = shutil.copytree(stable_diffusion, tmp_path / "sd")
    (directory / "vae/diffusion_pytorch_model.safetensors").unlink()
    decoder(AutoencoderKL).save_pretrained(directory / "vae", safe_serialization=False)
    assert (directory / "vae/diffusion_pytorch_model.bin").is_file()
    closed = []
    monkeypatch.setattr("runtime.backends.eager.EagerDenoiser.__exit__", lambda *_: closed.append(True))
    with pytest.raises(DpctlError, match="cannot be loaded"):
        runtime.load_pipeline(directory)
    assert closed == [True]


@pytest.mark.parametrize("kind", ["stable_diffusion", "latent"])
def test_dpctl_sample_draws_with_the_pipeline(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    directory = request.getfixturevalue(kind)
    text: Any = {"prompt": PROMPT, "guidance_scale": 4.0} if kind == "stable_diffusion" else {}
    draw(str(directory), tmp_path / "out", Wish(count=3, num_inference_steps=2, batch_size=2, **text))
    pipe = quiet(runtime.load_pipeline(directory))
    alone = pipe(generator=generators(2), num_inference_steps=2, output_type="np", **text).images
    difference = np.asarray(Image.open(tmp_path / "out/00002.png"), dtype=float) - 255 * alone[0]
    assert abs(difference).max() < 0.51


def test_dpctl_sample_asks_for_a_text_where_there_is_one(stable_diffusion: Path, latent: Path, tmp_path: Path) -> None:
    for model, wish, message in (
        (str(stable_diffusion), Wish(), "give one: --prompt TEXT"),
        (str(latent), Wish(prompt=PROMPT), "takes no text"),
        ("reference", Wish(prompt=PROMPT), "takes no text"),
        (str(latent), Wish(guidance_scale=2.0), "guidance is towards a text"),
        (str(stable_diffusion), Wish(prompt=PROMPT, num_inference_steps=2000), "the pipeline refuses this"),
    ):
        with pytest.raises(DpctlError, match=message):
            draw(model, tmp_path / "out", wish)
        assert not (tmp_path / "out").exists()
