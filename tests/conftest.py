"""What every test may use: a toy diffusion pipeline of real diffusers classes, and a few images that fit it.

Everything here is small on purpose (a forward pass takes milliseconds) and the same on every run. Nothing reaches for
the network.
"""

import copy
import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from toys import PIPELINES, Done, save_photos

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")

# Timing is never asserted in a test: on a busy machine a deadline fails by chance.
settings.register_profile("house", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("house")

# What takes longest comes first: with a file to a process, one of them would else be alone with it at the end.
FIRST = ("test_readme.py", "test_chain.py", "test_chain_rounds.py", "test_processes.py", "test_run_bench.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the dearest files before all others, which stay in their order."""
    items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


TOY_SIZE = 8
TOY_CONFIG: dict[str, Any] = {
    "sample_size": TOY_SIZE,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}


def _toy_unet(seed: int = 0, **changed: Any) -> Any:
    """Return a UNet2DModel of the toy's shape (or with `changed` config values) in eval mode.

    Norms and biases are random too: at their initial ones and zeros many mistakes would not show.
    """
    import torch
    from diffusers import UNet2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DModel(**(TOY_CONFIG | changed))
        with torch.no_grad():
            for parameter in unet.parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return unet.eval()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Exports made for measurements go to a cache of this test run, not to the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def make_unet() -> Callable[..., Any]:
    """Return the function that makes a network of the toy's shape: `make_unet(seed, **changed_config)`."""
    return _toy_unet


@pytest.fixture(scope="session")
def toy_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a DDPM pipeline as stock diffusers saves it. Shared: copy it before changing a file."""
    from diffusers import DDPMPipeline, DDPMScheduler

    directory = tmp_path_factory.mktemp("toy") / "pipeline"
    scheduler = DDPMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2)
    DDPMPipeline(_toy_unet(), scheduler).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def toy_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An `.npz` of 48 images of 8x8 with one channel: soft bright spots on black, each somewhere else."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:TOY_SIZE, :TOY_SIZE]
    centres = generator.uniform(1, TOY_SIZE - 2, size=(48, 2, 1, 1))
    distance = (rows - centres[:, 0]) ** 2 + (columns - centres[:, 1]) ** 2
    path = tmp_path_factory.mktemp("toy") / "images.npz"
    np.savez_compressed(path, images=np.uint8(255 * np.exp(-distance / 4)))
    return path


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of pictures with classes and captions. Shared: copy it before changing a file."""
    return save_photos(tmp_path_factory.mktemp("data") / "photos")


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return what saves a toy of `toys.PIPELINES`, once. Shared: copy it before changing a file."""
    folder = tmp_path_factory.mktemp("pipelines")

    def make(name: str) -> Path:
        return folder / name if (folder / name).exists() else PIPELINES[name](folder / name)

    return make


@pytest.fixture(scope="session")
def _loaded_toy(toy_pipeline: Path) -> Any:
    from dpctl.models import load_model

    return load_model(toy_pipeline)


@pytest.fixture
def toy_model(_loaded_toy: Any) -> Any:
    """The toy as `load_model` gives it; a copy for every test."""
    return copy.deepcopy(_loaded_toy)


@pytest.fixture
def toy_unet(toy_model: Any) -> Any:
    """The network of `toy_model`."""
    return toy_model.unet


# One toy of every family of UNets that users bring: (diffusers class, config).
_TOY = {"layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8, "attention_head_dim": 16}
_ATTENTION = {
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}
_PIXELS = {"sample_size": 8, "in_channels": 3, "out_channels": 3, **_TOY, **_ATTENTION}
_TEXT = {
    "sample_size": 8,
    **_TOY,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "attention_head_dim": 4,
    "cross_attention_dim": 24,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ddpm": ("UNet2DModel", _PIXELS | {"layers_per_block": 2, "attention_head_dim": None, "downsample_padding": 0}),
    "ldm": (
        "UNet2DModel",
        _PIXELS | {"down_block_types": ("AttnDownBlock2D",) * 2, "up_block_types": ("AttnUpBlock2D",) * 2},
    ),
    "class-conditional": ("UNet2DModel", _PIXELS | {"num_class_embeds": 5}),
    "ncsnpp": (
        "UNet2DModel",
        _PIXELS
        | {
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "block_out_channels": (128, 256),  # as the real ones: 32 norm groups everywhere
            "norm_num_groups": None,
            "attention_head_dim": None,
            "time_embedding_type": "fourier",
            "mid_block_scale_factor": 1.414,
        },
    ),
    "resnet-resampling": (
        "UNet2DModel",
        _PIXELS
        | {
            "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
        },
    ),
    "scale-shift": ("UNet2DModel", _PIXELS | {"resnet_time_scale_shift": "scale_shift", "out_channels": 6}),
    "stable-diffusion": ("UNet2DConditionModel", _TEXT),
    "sdxl": (
        "UNet2DConditionModel",
        _TEXT
        | {
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "transformer_layers_per_block": (1, 2),
            "projection_class_embeddings_input_dim": 80,
        },
    ),
    "inpainting": ("UNet2DConditionModel", _TEXT | {"in_channels": 9}),
    "latent-consistency": ("UNet2DConditionModel", _TEXT | {"time_cond_proj_dim": 16}),
}


@pytest.fixture(scope="session")
def families() -> dict[str, Callable[..., Any]]:
    """Return family name -> function that builds its toy in eval mode, norms and biases random too.

    It takes config values to change.
    """

    def make(kind: str, config: dict[str, Any], **changed: Any) -> Any:
        import diffusers
        import torch

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = getattr(diffusers, kind)(**(config | changed))
            with torch.no_grad():
                for parameter in unet.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(0.2 * torch.randn_like(parameter))
        return unet.eval()

    return {name: functools.partial(make, *what) for name, what in FAMILIES.items()}


class Checked:
    """Stands in for an object of a class of TensorRT: what that class has not, or does not take so, fails the test.

    The classes are compiled, and have no signatures but those in their docstrings. `does` says what a method does and
    what a property gives; what is set is kept.
    """

    def __init__(self, real: type, **does: Any) -> None:
        unknown = [name for name in does if not hasattr(real, name)]
        assert not unknown, f"{real.__name__} has no {unknown}"
        self.__dict__.update(_real=real, _does=does, _calls=[])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        member = getattr(self._real, name)  # AttributeError where there is none
        assert name in self._does, f"the test does not say what {self._real.__name__}.{name} does"
        found = self._does[name]
        if isinstance(member, property):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            check_call(member, (self, *args), kwargs)
            self._calls.append((name, *args))
            return found(*args, **kwargs) if callable(found) else found

        return call

    def __setattr__(self, name: str, value: Any) -> None:
        member = getattr(self._real, name)
        assert isinstance(member, property), f"{self._real.__name__}.{name} is no property"
        assert member.fset is not None, f"{self._real.__name__}.{name} is read-only"
        self._does[name] = value


def check_call(function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Fail unless one of the signatures in the docstring of a compiled function takes these arguments."""
    name, told = function.__name__, function.__doc__ or ""
    signatures = [
        found[1] for line in told.splitlines() if (found := re.match(rf"(?:\d+\. )?{name}\((.*)\) -> ", line))
    ]
    real = [text for text in signatures if "*args" not in text]
    assert real, f"{name} has no signature in its docstring"
    assert any(_takes(text, args, kwargs) for text in real), f"{name}{args}{kwargs} fits none of {real}"


def _takes(signature: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Tell whether a signature such as ``self: a.b.C, name: str, shape: tuple = ()`` takes the arguments."""
    parts = [part.strip() for part in re.split(r",(?![^\[(<]*[\])>])", signature) if part.strip()]
    named = [re.match(r"(\w+)(?:: ([^=]+?))?( = .*)?$", part) for part in parts]
    assert all(named), signature
    kinds = {found[1]: found[2] for found in named if found}
    given = dict(zip(kinds, args, strict=False)) | kwargs
    needed = {found[1] for found in named if found and not found[3]}
    if len(args) > len(kinds) or not needed <= given.keys() <= kinds.keys():
        return False
    return all(_is(value, kinds[name]) for name, value in given.items())


def _is(value: Any, kind: str | None) -> bool:
    if kind is None or value is None:
        return True
    word = re.split(r"[.:]", kind)[-1].strip()
    plain: dict[str, Any] = {"SupportsInt": int, "str": str, "bool": bool, "tuple": tuple, "Buffer": bytes}
    if word in plain:
        return isinstance(value, plain[word])
    family = value._real.__mro__ if isinstance(value, Checked) else type(value).__mro__
    return word in {base.__name__ for base in family}


@pytest.fixture(scope="session")
def checked() -> type[Checked]:
    """Return the class of stand-ins for TensorRT's objects."""
    return Checked


@pytest.fixture(scope="session")
def stand_in() -> Callable[..., Any]:
    """Return `stand_in(real, name, **classes)`: a library with the real one's names, and classes put in for some."""

    class Library(ModuleType):
        def __init__(self, real: ModuleType, name: str, **classes: Any) -> None:
            super().__init__(name)
            self.__dict__.update(_real=real, __version__=real.__version__)
            for called, make in classes.items():
                self.__dict__[called] = functools.partial(self._make, getattr(real, called), make)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._real, name)

        @staticmethod
        def _make(real: type, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            check_call(real.__init__, (Checked(real), *args), kwargs)
            return make(*args, **kwargs)

    return Library


@pytest.fixture
def dpctl(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> Callable[..., Done]:
    """Return the command, run in this process: a traceback fails the test."""
    from dpctl import cli

    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["dpctl", *map(str, arguments)])
        capfd.readouterr()
        code: object = 0
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        return Done(int(code or 0), *capfd.readouterr())  # type: ignore[call-overload]

    return run
