"""The text-image score by a real CLIPModel at toy size, against torchmetrics over the same model."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import CLIPModel, CLIPProcessor

from dpctl.bench.metrics import Drawn, LeftOut, clip_score
from dpctl.bench.quality import Samples, assess, judge, save_samples
from dpctl.errors import DpctlError

PROMPTS = ("a cat", "a tab", "tab", "bat", "c")


def pictures(channels: int = 3) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, size=(5, 24, 20, channels), dtype=np.uint8)


class Unwrapped:
    """The model as torchmetrics calls it: transformers 5 returns the features inside of an object."""

    def __init__(self, model: Any) -> None:
        self.model, self.config = model, model.config

    def to(self, _: Any) -> "Unwrapped":
        return self

    def get_image_features(self, *given: Any) -> torch.Tensor:
        return getattr(found := self.model.get_image_features(*given), "pooler_output", found)

    def get_text_features(self, *given: Any) -> torch.Tensor:
        return getattr(found := self.model.get_text_features(*given), "pooler_output", found)


@pytest.mark.parametrize("channels", [3, 1])
def test_the_score_is_that_of_torchmetrics(channels: int, toy_clip: Path) -> None:
    from torchmetrics.functional.multimodal import clip_score as theirs

    images = pictures(channels)
    loaded = CLIPModel.from_pretrained(toy_clip).eval(), CLIPProcessor.from_pretrained(toy_clip)
    grey = torch.from_numpy(images.repeat(3 // channels, 3)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        each = [
            float(theirs(one, prompt, lambda: (Unwrapped(loaded[0]), loaded[1])))  # type: ignore[arg-type,return-value]
            for one, prompt in zip(grey, PROMPTS, strict=True)
        ]
    scores = clip_score.per_image(images, PROMPTS, *clip_score.load(toy_clip))
    assert scores.clip(min=0) == pytest.approx(each, abs=1e-3)  # theirs are at least 0, each
    assert len({round(score, 3) for score in each}) > 2
    found = clip_score.measure(Drawn(images, None, prompts=PROMPTS, clip=toy_clip))
    assert found.value == pytest.approx(scores.mean())
    assert found.low < found.value < found.high
    assert (found.count, found.against) == (5, "its prompts, by toy-clip")


def test_batches_do_not_matter(toy_clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = clip_score.measure(Drawn(pictures(), None, prompts=PROMPTS, clip=toy_clip))
    monkeypatch.setattr(clip_score, "BATCH", 2)
    assert clip_score.measure(Drawn(pictures(), None, prompts=PROMPTS, clip=toy_clip)).value == pytest.approx(
        whole.value, abs=1e-4
    )


def test_a_long_prompt_is_cut_off(toy_clip: Path) -> None:
    # Six positions: start, four letters, end.
    long, cut = ("a b c t a b c t",) * 5, ("a b c t",) * 5
    loaded = clip_score.load(toy_clip)
    found, expected = (clip_score.per_image(pictures(), prompts, *loaded) for prompts in (long, cut))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("prompts", "given", "said"),
    [
        (None, True, "without prompts"),
        (PROMPTS, False, "no CLIP model"),
        (PROMPTS[:2], True, "2 prompts for 5 pictures"),
    ],
)
def test_without_prompts_or_a_model_it_is_left_out(
    prompts: tuple[str, ...] | None, given: bool, said: str, toy_clip: Path
) -> None:
    drawn = Drawn(pictures(), None, prompts=prompts, clip=toy_clip if given else None)
    assert said in judge(drawn)[1]["clip-score"]


def test_a_model_of_numbers_that_are_not_finite_is_left_out(toy_clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    broken = copy(toy_clip, tmp_path / "nan")
    weights = load_file(broken / "model.safetensors")
    weights["text_projection.weight"].fill_(torch.nan)
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(LeftOut, match="not finite"):
        clip_score.measure(Drawn(pictures(), None, prompts=PROMPTS, clip=broken))


def copy(toy_clip: Path, directory: Path) -> Path:
    directory.mkdir()
    for path in toy_clip.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    return directory


def test_what_is_no_whole_clip_model_in_safetensors_is_refused(toy_clip: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    with pytest.raises(DpctlError, match=r"no config\.json"):
        clip_score.load(tmp_path)
    pickled = copy(toy_clip, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    with pytest.raises(DpctlError, match="cannot be loaded"):
        clip_score.load(pickled)
    other = copy(toy_clip, tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    config["projection_dim"] = 9
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(DpctlError, match="CLIP model"):
        clip_score.load(other)
    part = copy(toy_clip, tmp_path / "part")
    weights = load_file(part / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, part / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DpctlError, match="1 weights missing, visual_projection"):
        clip_score.load(part)


def test_a_benchmark_hands_prompts_and_model_on(toy_clip: Path, tmp_path: Path) -> None:
    save_samples(tmp_path / "one.npz", [pictures()])
    samples = [Samples("one", "eager", 2, "one.npz")]
    (found,) = assess(samples, tmp_path, "one", None, prompts=PROMPTS, clip=str(toy_clip))
    assert found.figures == {"clip-score": clip_score.measure(Drawn(pictures(), None, prompts=PROMPTS, clip=toy_clip))}
