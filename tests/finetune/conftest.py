"""A training that takes milliseconds per step: a UNet of one block on the shared toy images."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from dpctl.data import Images, TrainingSet
from dpctl.errors import DpctlError
from dpctl.recipe import FinetuneRecipe, PruneRecipe, TrainRecipe

TINY: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
    "add_attention": False,
    "norm_num_groups": 4,
}


@pytest.fixture
def make_tiny(make_unet: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that makes the network: `make_tiny(seed, **changed_config)`."""
    return lambda seed=0, **changed: make_unet(seed, **(TINY | changed))


@pytest.fixture
def scheduler() -> Any:
    from diffusers import DDPMScheduler

    return DDPMScheduler(num_train_timesteps=100, beta_start=1e-3, beta_end=0.2)


@pytest.fixture
def plain_images(toy_images: Path) -> Images:
    from dpctl.data import open_data

    return open_data(str(toy_images), channels=1, size=(8, 8))


@pytest.fixture
def images(plain_images: Images) -> TrainingSet:
    from dpctl.data import Pixels

    return Pixels(plain_images)


# --- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def tuning(toy_images: Path) -> Callable[..., FinetuneRecipe]:
    """Return the function that makes a recipe of a few steps: `tuning(**changed)`."""
    values = {"data": str(toy_images), "steps": 3, "batch_size": 4, "warmup_steps": 1, "checkpoint_every": 1}
    return lambda **changed: FinetuneRecipe(**(values | changed))


@pytest.fixture
def training(toy_images: Path, toy_pipeline: Path) -> Callable[..., TrainRecipe]:
    """Return the function that makes a recipe of a few steps: `training(**changed)`."""
    values = {"data": str(toy_images), "config": str(toy_pipeline), "steps": 3, "batch_size": 4, "checkpoint_every": 1}
    return lambda **changed: TrainRecipe(**(values | changed))


@pytest.fixture(scope="module")
def family(toy_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `teacher` and, pruned from it, `pruned`. Shared: copy it before changing a file."""
    directory = tmp_path_factory.mktemp("family")
    shutil.copytree(toy_pipeline, directory / "teacher")
    from dpctl.prune import prune

    prune(str(directory / "teacher"), directory / "pruned", PruneRecipe("magnitude", target_macs=0.6))
    return directory


@pytest.fixture
def own_family(family: Path, tmp_path: Path) -> Path:
    """A family of the test's own, whose `pruned` names its own `teacher`."""
    directory = tmp_path / "family"
    shutil.copytree(family, directory)
    path = directory / "pruned" / "dpctl.json"
    path.write_text(path.read_text().replace(str(family), str(directory)))
    return directory


class Stopped(Exception):
    """The process ends here."""


@pytest.fixture
def stopping() -> Callable[[int], AbstractContextManager[Any]]:
    """Return what gives a progress bar that stops the run inside: `with stopping(3) as bar:` does so after 3 steps."""

    @contextmanager
    def expecting(steps: int) -> Iterator[Any]:
        @contextmanager
        def bar(description: str, total: int, *, done: int = 0) -> Iterator[Any]:
            left = iter(range(steps - 1))

            def advance(*_: Any, **__: Any) -> None:
                if next(left, None) is None:
                    raise Stopped

            yield advance

        with pytest.raises(Stopped):
            yield bar

    return expecting


@pytest.fixture
def refused() -> Callable[..., AbstractContextManager[None]]:
    """Return what expects a DpctlError by its message and texts in its parts: `with refused("no such", got=...):`."""

    @contextmanager
    def expecting(message: str, **parts: str) -> Iterator[None]:
        with pytest.raises(DpctlError, match=message) as caught:
            yield
        for part, text in parts.items():
            assert text in getattr(caught.value, part)

    return expecting
