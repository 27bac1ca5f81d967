"""Made-up results for what derives from them, and a toy feature network for what judges images."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from toys import TEXT, decoder, tokenizer

from dpctl.bench.metrics._features import FeatureSpace
from dpctl.bench.result import SCHEMA_VERSION, BenchResult, Memory, Model, Subject, Turn


def _model(name: str, macs: int) -> Model:
    return Model(name, name, name * 3, "trained", 1000, macs, 0, 4000, ())


def _turn(number: int, latency: float) -> Turn:
    return Turn(number, 1, 2, latency, (latency / 2, latency / 2), (latency / 4, latency / 4))


def _subject(model: str, backend: str, latencies: list[float]) -> Subject:
    turns = tuple(_turn(number, latency) for number, latency in enumerate([9.0, *latencies]))  # round 0 warms up
    return Subject(model, backend, model, 4000, None, 0.1, 10**8, 10**6, (Memory(1, 10**6),), turns)


@pytest.fixture
def make_result() -> Callable[..., BenchResult]:
    """Return `make_result({(model, backend): latencies}, **environment)`: batch 1, two steps, one turn per latency."""

    def make(latencies: dict[tuple[str, str], list[float]], **environment: Any) -> BenchResult:
        models = tuple(
            _model(name, 100 - 50 * i) for i, name in enumerate(dict.fromkeys(model for model, _ in latencies))
        )
        rounds = max(len(values) for values in latencies.values())
        recipe = {"batch_sizes": [1], "num_inference_steps": [2], "rounds": rounds, "seed": 0, "scheduler": "ddim"}
        subjects = tuple(_subject(model, backend, values) for (model, backend), values in latencies.items())
        version = SCHEMA_VERSION
        return BenchResult(
            version, "2026-01-01T00:00:00+00:00", "dpctl", recipe, 1, environment, None, models, subjects, ()
        )

    return make


@pytest.fixture(scope="session")
def toy_space(tmp_path_factory: pytest.TempPathFactory) -> FeatureSpace:
    """A real ONNX network (8x8 images with one channel -> 6 features) and statistics of 500 random images."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder = tmp_path_factory.mktemp("features")
    weight = np.random.default_rng(1).normal(size=(64, 6)).astype(np.float32) / 8
    graph = helper.make_graph(
        [
            helper.make_node("Flatten", ["images"], ["flat"], axis=1),
            helper.make_node("MatMul", ["flat", "weight"], ["features"]),
        ],
        "toy",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, ["batch", 6])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, folder / "features.onnx")
    pixels = np.random.default_rng(2).integers(0, 256, size=(500, 8, 8, 1), dtype=np.uint8)
    rows = (pixels.astype(np.float32) / 127.5 - 1).reshape(500, 64) @ weight
    np.savez(
        folder / "statistics.npz",
        mean=rows.mean(0).astype(np.float64),
        covariance=np.cov(rows, rowvar=False),
        count=np.int64(500),
        features=rows.astype(np.float16),
    )
    return FeatureSpace(
        Path(folder / "features.onnx"), Path(folder / "statistics.npz"), "a toy; against 500 random images"
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline directory as stock diffusers saves it, whose network exports in seconds."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            layers_per_block=1,
            block_out_channels=(8,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
            norm_num_groups=4,
        )
    directory = tmp_path_factory.mktemp("bench") / "tiny"
    DDPMPipeline(unet, DDPMScheduler(num_train_timesteps=100)).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def toy_clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as transformers saves it: random weights, a tokenizer of single letters, 16x16 pictures."""
    import torch
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    directory = tmp_path_factory.mktemp("models") / "toy-clip"
    words = ["<|startoftext|>", "<|endoftext|>", *(f"{letter}{end}" for letter in "abct" for end in ("", "</w>"))]
    tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[])
    images = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    narrow = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = CLIPModel(
            CLIPConfig(
                text_config=narrow
                | {"vocab_size": len(words), "max_position_embeddings": 6, "bos_token_id": 0, "eos_token_id": 1},
                vision_config=narrow | {"image_size": 16, "patch_size": 8},
                projection_dim=8,
            )
        )
    model.save_pretrained(directory)
    CLIPProcessor(images, tokenizer).save_pretrained(directory)
    return directory


# As few nodes as an export of a network over latents can have.
LATENTS: dict[str, Any] = {
    "sample_size": 8,
    "layers_per_block": 1,
    "block_out_channels": (8,),
    "norm_num_groups": 4,
    "attention_head_dim": 4,
}


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory: pytest.TempPathFactory, families: dict[str, Callable[..., Any]]) -> dict[str, Path]:
    """Directories of pipelines with a VAE, by kind: latents of 8x8, pictures of 16x16 (ldm-text: 64x64)."""
    import diffusers
    import torch
    from diffusers.pipelines.latent_diffusion.pipeline_latent_diffusion import LDMBertConfig, LDMBertModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    folder = tmp_path_factory.mktemp("pipelines")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        words, text = tokenizer(folder / "words"), CLIPTextModel(CLIPTextConfig(**TEXT)).eval()
        second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT | {"projection_dim": 32})).eval()
        vae, scheduler = decoder(diffusers.AutoencoderKL), diffusers.DDIMScheduler(clip_sample=False, steps_offset=1)
        kinds = {"down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
        small = diffusers.UNet2DConditionModel(**LATENTS, **kinds, mid_block_type=None, cross_attention_dim=24)
        shared: dict[str, Any] = {"vae": vae, "scheduler": scheduler, "text_encoder": text, "tokenizer": words}
        plain = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        diffusers.StableDiffusionPipeline(unet=small.eval(), **shared, **plain).save_pretrained(folder / "sd")
        large = families["sdxl"](in_channels=4, out_channels=4, cross_attention_dim=48)
        both = {"text_encoder_2": second, "tokenizer_2": words, "add_watermarker": False}
        diffusers.StableDiffusionXLPipeline(unet=large, **shared, **both).save_pretrained(folder / "sdxl")
        kinds = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",)}
        unet = diffusers.UNet2DModel(**LATENTS, **kinds, in_channels=3, out_channels=3, add_attention=False)
        vqvae = decoder(diffusers.VQModel, latent_channels=3, num_vq_embeddings=16)
        diffusers.LDMPipeline(vqvae=vqvae, unet=unet.eval(), scheduler=scheduler).save_pretrained(folder / "ldm")
        sizes = {
            "d_model": 24,
            "encoder_layers": 1,
            "encoder_ffn_dim": 32,
            "encoder_attention_heads": 2,
            "head_dim": 12,
        }
        bert = LDMBertModel(LDMBertConfig(vocab_size=100, max_position_embeddings=77, pad_token_id=0, **sizes))
        levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
        eighth = decoder(diffusers.AutoencoderKL, block_out_channels=(8,) * 4, **levels)  # it divides sizes by 8
        parts = {"vqvae": eighth, "bert": bert.eval(), "tokenizer": words, "unet": small, "scheduler": scheduler}
        diffusers.LDMTextToImagePipeline(**parts).save_pretrained(folder / "ldm-text")
    return {kind: folder / kind for kind in ("sd", "sdxl", "ldm", "ldm-text")}
