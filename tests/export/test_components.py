"""The other networks of a pipeline: with them an exported directory makes the image that the pipeline makes."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from toys import TEXT
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from dpctl import artifact
from dpctl.errors import DpctlError, GateError
from dpctl.models import load_model, write_pipeline
from dpctl.recipe import ExportRecipe
from dpctl.signature import of_unet
from export import components, export_model, verify_directory
from export.components import load_components
from export.graph import write_graph
from runtime import open_denoiser


def save_pipeline(directory: Path, kind: str, unet: Any, *encoders: Any) -> Path:
    """Write a Stable Diffusion pipeline without its tokenizers, whose vocabulary no toy has."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = AutoencoderKL(
            latent_channels=4,
            block_out_channels=(8, 16),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=4,
        )
    write_pipeline(
        directory, unet=unet, scheduler=DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    )
    vae.save_pretrained(directory / "vae")
    index = json.loads((directory / "model_index.json").read_text())
    index |= {"_class_name": kind, "vae": ["diffusers", "AutoencoderKL"]}
    for entry, encoder in zip(("text_encoder", "text_encoder_2"), encoders, strict=False):
        encoder.save_pretrained(directory / entry)
        index |= {entry: ["transformers", type(encoder).__name__]}
    (directory / "model_index.json").write_text(json.dumps(index))
    return directory


@pytest.fixture(scope="module")
def pipeline(families: dict[str, Callable[..., Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = CLIPTextModel(CLIPTextConfig(**TEXT))
    unet = families["stable-diffusion"](in_channels=4, out_channels=4)
    return save_pipeline(tmp_path_factory.mktemp("components") / "sd", "StableDiffusionPipeline", unet, encoder)


@pytest.fixture(scope="module")
def exported(pipeline: Path) -> Path:
    out = pipeline.with_name("exported")
    export_model(load_model(pipeline), out, ExportRecipe(batch=(1, 1, 2), components=True))
    return out


def session(path: Path) -> Any:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def encoded(exported: Path, entry: str, ids: torch.Tensor, *outputs: str) -> list[torch.Tensor]:
    """Return outputs of a text encoder's graph."""
    return [
        torch.from_numpy(value)
        for value in session(exported / entry / "model.onnx").run(list(outputs), {"input_ids": ids.numpy()})
    ]


def by_hand(exported: Path, noise: torch.Tensor, scaling: float, **conditions: torch.Tensor) -> torch.Tensor:
    """Make an image as a pipeline does, under guidance, with nothing of torch's networks: unconditional rows first."""
    unet, decoder = (session(exported / name) for name in ("unet/model.fp32.onnx", "vae/decoder.onnx"))
    scheduler = DDIMScheduler.from_pretrained(exported / "scheduler")
    scheduler.set_timesteps(4)
    latents = noise
    for t in scheduler.timesteps:
        given = {"sample": latents.repeat(2, 1, 1, 1), "timestep": t.float().repeat(2), **conditions}
        out = torch.from_numpy(unet.run(None, {name: value.numpy() for name, value in given.items()})[0])
        unconditional, conditional = out.chunk(2)
        guided = unconditional + 5.0 * (conditional - unconditional)
        latents = scheduler.step(guided, t, latents).prev_sample
    image = torch.from_numpy(decoder.run(None, {"latent_sample": (latents / scaling).numpy()})[0])
    return (image / 2 + 0.5).clamp(0, 1)


def test_the_graphs_alone_make_the_image_that_the_pipeline_makes(pipeline: Path, exported: Path) -> None:
    ids, blank = torch.randint(1, 98, (1, 77)), torch.full((1, 77), 99)
    noise = torch.randn(1, 4, 8, 8)
    parts = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    loaded: dict[str, Any] = {name: kind.from_pretrained(pipeline / name).eval() for name, kind in parts.items()}
    stock = StableDiffusionPipeline(
        **loaded,
        scheduler=DDIMScheduler.from_pretrained(pipeline / "scheduler"),
        tokenizer=None,  # type: ignore[arg-type]
        safety_checker=None,  # type: ignore[arg-type]
        feature_extractor=None,  # type: ignore[arg-type]
        requires_safety_checker=False,
    )
    stock.set_progress_bar_config(disable=True)
    with torch.no_grad():
        expected = stock(
            prompt_embeds=loaded["text_encoder"](ids)[0],
            negative_prompt_embeds=loaded["text_encoder"](blank)[0],
            latents=noise,
            num_inference_steps=4,
            guidance_scale=5.0,
            output_type="pt",
        ).images

    (states,) = encoded(exported, "text_encoder", torch.cat([blank, ids]), "last_hidden_state")
    image = by_hand(exported, noise, loaded["vae"].config.scaling_factor, encoder_hidden_states=states)
    torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_the_graphs_of_an_sdxl_alone_make_its_image(families: dict[str, Callable[..., Any]], tmp_path: Path) -> None:
    # Widths that differ, so that no state and no embedding fits where another belongs: 8 + 16, and 12 pooled.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = CLIPTextModel(CLIPTextConfig(**TEXT | {"hidden_size": 8}))
        second = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT | {"hidden_size": 16, "projection_dim": 12}))
    unet = families["sdxl"](in_channels=4, out_channels=4, projection_class_embeddings_input_dim=12 + 6 * 8)
    source = save_pipeline(tmp_path / "sdxl", "StableDiffusionXLPipeline", unet, first, second)
    exported = tmp_path / "exported"
    export_model(load_model(source), exported, ExportRecipe(batch=(1, 1, 2), components=True))

    ids, blank, noise = torch.randint(1, 98, (1, 77)), torch.full((1, 77), 99), torch.randn(1, 4, 8, 8)
    ids[:, 20:] = 99  # a text ends: the pooled embedding is of there
    kinds: dict[str, Any] = {"vae": AutoencoderKL, "unet": UNet2DConditionModel, "text_encoder": CLIPTextModel}
    kinds["text_encoder_2"] = CLIPTextModelWithProjection
    loaded: dict[str, Any] = {name: kind.from_pretrained(source / name).eval() for name, kind in kinds.items()}
    stock = StableDiffusionXLPipeline(
        **loaded,
        scheduler=DDIMScheduler.from_pretrained(source / "scheduler"),
        tokenizer=None,  # type: ignore[arg-type]
        tokenizer_2=None,  # type: ignore[arg-type]
        add_watermarker=False,
    )
    stock.set_progress_bar_config(disable=True)
    with torch.no_grad():
        one, two = (
            [loaded[name](text, output_hidden_states=True) for text in (blank, ids)]
            for name in ("text_encoder", "text_encoder_2")
        )
        negative, prompt = (
            torch.cat([a.hidden_states[-2], b.hidden_states[-2]], -1) for a, b in zip(one, two, strict=True)
        )
        expected = stock(
            prompt_embeds=prompt,
            negative_prompt_embeds=negative,
            pooled_prompt_embeds=two[1].text_embeds,
            negative_pooled_prompt_embeds=two[0].text_embeds,
            latents=noise,
            num_inference_steps=4,
            guidance_scale=5.0,
            output_type="pt",
        ).images

    both = torch.cat([blank, ids])
    (left,) = encoded(exported, "text_encoder", both, "penultimate_hidden_state")
    right, pooled = encoded(exported, "text_encoder_2", both, "penultimate_hidden_state", "text_embeds")
    image = by_hand(
        exported,
        noise,
        loaded["vae"].config.scaling_factor,
        encoder_hidden_states=torch.cat([left, right], -1),
        text_embeds=pooled,
        time_ids=torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).repeat(2, 1),
    )
    torch.testing.assert_close(image, expected, rtol=1e-3, atol=1e-4)


def test_the_manifest_holds_graph_signature_and_verdict_of_each(exported: Path) -> None:
    manifest = artifact.read_manifest(exported)
    assert manifest is not None
    found = (manifest.parity or {})["components"]
    assert {name: (part["graph"], part["verdict"]) for name, part in found.items()} == {
        "text_encoder": ("text_encoder/model.onnx", "passed"),
        "vae": ("vae/decoder.onnx", "passed"),
    }
    outputs = [tensor["name"] for tensor in found["text_encoder"]["signature"]["outputs"]]
    assert outputs == ["last_hidden_state", "penultimate_hidden_state", "pooler_output"]
    assert found["vae"]["signature"]["outputs"][0]["shape"] == ["batch", 3, 16, 16]
    assert found["vae"]["signature"]["batch"] == [1, 1, 2]
    assert (manifest.signature or {})["batch"] == [1, 2, 4]
    artifact.verify_files(exported, manifest)


def test_a_component_that_fails_fails_the_export_and_is_kept_where_asked(
    plain: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoiled(network: Any, signature: Any, path: Path, *more: Any) -> Any:
        told = write_graph(network, signature, path, *more)
        if path.name == "decoder.onnx":
            with torch.no_grad():
                network.vae.decoder.conv_out.weight.mul_(1.01)
        return told

    monkeypatch.setattr(components, "write_graph", spoiled)
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(plain.directory, source)
    AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).save_pretrained(source / "vae")
    index = json.loads((source / "model_index.json").read_text()) | {"vae": ["diffusers", "AutoencoderKL"]}
    (source / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(GateError, match=r"component vae failed \(error .*, tolerance 1.0e-04\) at sample, batch"):
        export_model(load_model(source), out, ExportRecipe(batch=(1, 1, 2), components=True), keep_failed=True)
    manifest = artifact.read_manifest(out)
    assert manifest is not None
    artifact.verify_files(out, manifest)
    parity = manifest.parity or {}
    assert (parity["verdict"], parity["components"]["vae"]["verdict"]) == ("failed", "failed")
    assert all(check["verdict"] != "failed" for check in parity["checks"].values())
    with pytest.raises(DpctlError, match="did not pass its parity check"):
        open_denoiser(out, "ort")
    with pytest.raises(GateError, match="component vae failed"):
        verify_directory(out)


def test_a_projected_text_encoder_gives_its_embedding(pipeline: Path, tmp_path: Path) -> None:
    encoder = CLIPTextModelWithProjection(CLIPTextConfig(**TEXT))
    shutil.copytree(pipeline, tmp_path / "sd")
    shutil.rmtree(tmp_path / "sd/text_encoder")
    encoder.save_pretrained(tmp_path / "sd/text_encoder")
    index = json.loads((tmp_path / "sd/model_index.json").read_text())
    index["text_encoder"] = ["transformers", "CLIPTextModelWithProjection"]
    (tmp_path / "sd/model_index.json").write_text(json.dumps(index))
    model = load_model(tmp_path / "sd")
    signature = of_unet({**model.unet.config, "_class_name": "UNet2DConditionModel"})
    found = load_components(model, signature, (1, 1, 2))[0]
    assert [tensor.name for tensor in found.signature.outputs][-1] == "text_embeds"
    ids = torch.randint(1, 98, (2, 77))
    with torch.no_grad():
        assert torch.equal(found.network(ids)[2], encoder.eval()(ids).text_embeds)


def test_what_has_no_components_and_unknown_ones_are_refused(
    pipeline: Path, toy_pipeline: Path, tmp_path: Path
) -> None:
    with pytest.raises(DpctlError, match="no other components"):
        export_model(load_model(toy_pipeline), tmp_path / "out", ExportRecipe(components=True))
    shutil.copytree(pipeline, tmp_path / "sd")
    index = json.loads((tmp_path / "sd/model_index.json").read_text())
    index["text_encoder"] = ["somewhere", "T5Custom"]
    (tmp_path / "sd/model_index.json").write_text(json.dumps(index))
    with pytest.raises(DpctlError, match="text_encoder: T5Custom"):
        export_model(load_model(tmp_path / "sd"), tmp_path / "out", ExportRecipe(components=True))
    assert not (tmp_path / "out").exists()


def test_without_transformers_the_extra_is_named(
    pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(pipeline)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(DpctlError, match=r"dpctl-diffusion\[text\]"):
        export_model(model, tmp_path / "out", ExportRecipe(components=True))
    assert not (tmp_path / "out").exists()


def test_pickled_components_are_never_read(pipeline: Path, tmp_path: Path) -> None:
    shutil.copytree(pipeline, tmp_path / "sd")
    weights = tmp_path / "sd/vae/diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_suffix(".bin"))
    with pytest.raises(DpctlError, match="cannot be loaded"):
        export_model(load_model(tmp_path / "sd"), tmp_path / "out", ExportRecipe(components=True))
