"""What a training will take is measured before it begins, and the training does not notice."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpctl import progress
from dpctl.data import TrainingSet
from dpctl.finetune import estimate, finetune, guards, loop
from dpctl.finetune.draws import Draws
from dpctl.finetune.estimate import Estimate, Saved, Trial
from dpctl.finetune.loss import Objective
from dpctl.finetune.processes import open_accelerator
from dpctl.recipe import FinetuneRecipe, LoopRecipe

RECIPE = LoopRecipe(steps=3, batch_size=6, learning_rate=1e-2, warmup_steps=1)


def recipe(**changed: Any) -> LoopRecipe:
    return LoopRecipe(**(vars(RECIPE) | changed))


def trial(unet: Any, objective: Objective, examples: TrainingSet, recipe: LoopRecipe) -> Trial:
    accelerator = open_accelerator(recipe)
    _, state = loop._prepare(unet, objective, recipe, accelerator)
    return Trial(state, objective, Draws(examples, recipe), accelerator)


def counted(saved: Saved) -> Any:
    return torch.autograd.graph.saved_tensors_hooks(saved.keep, lambda tensor: tensor)


def test_a_storage_counts_once_and_weights_do_not() -> None:
    weight = nn.Parameter(torch.ones(1000))
    given = torch.ones(3, 1000)
    saved = Saved({weight.untyped_storage().data_ptr()})
    with counted(saved):
        scaled = given * weight  # keeps what was given; of the weight nothing would be new
        rectified = scaled.relu()  # keeps its result
        (rectified * rectified).sum()  # keeps that again, twice
    assert saved.bytes == 4 * (3000 + 3000)


def test_of_layers_that_are_computed_anew_the_inputs_and_the_largest_count() -> None:
    given = torch.ones(1000, requires_grad=True)
    saved = Saved(set())
    with counted(saved):
        middle = saved.anew(lambda x: x.exp().exp().exp(), given)  # would keep three results
        saved.anew(lambda x: x.exp(), middle)
    assert saved.bytes == 4 * 1000 * (2 + 3)  # both inputs, one of which is the third result of the first


@pytest.mark.parametrize("changed", [{}, {"mixed_precision": "bf16"}, {"gradient_checkpointing": True}])
def test_two_and_three_images_tell_of_more(
    changed: dict[str, Any], make_unet: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    wanted = recipe(**changed)
    tried = trial(make_unet(), Objective(scheduler, make_unet(1), distillation=1.0), images, wanted)
    found = estimate.measure(tried, wanted, 6)
    assert found.per_image > 0
    assert found.fixed + 6 * found.per_image == pytest.approx(tried.activations(6), rel=1e-3)


def test_precision_and_checkpointing_save_memory(
    make_unet: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    options: list[dict[str, Any]] = [{}, {"mixed_precision": "bf16"}, {"gradient_checkpointing": True}]
    plain, narrow, anew = (
        estimate.measure(trial(make_unet(), Objective(scheduler), images, recipe(**each)), RECIPE, 2).per_image
        for each in options
    )
    assert narrow < plain
    assert anew < plain


def test_what_is_held_is_by_the_size_of_the_network(
    make_unet: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    unet = make_unet()
    size = 4 * unet.num_parameters()
    found = estimate.measure(trial(unet, Objective(scheduler), images, RECIPE), RECIPE, 2)
    assert found.held == {"weights": size, "gradients": size, "moments": 2 * size, "EMA": size}
    assert found.taken == 2 * size
    taught = trial(unet, Objective(scheduler, make_unet(1), distillation=1.0), images, RECIPE)
    assert estimate.measure(taught, RECIPE, 2).held["teacher"] == size


@pytest.mark.parametrize(
    "changed", [{}, {"mixed_precision": "bf16"}, {"gradient_checkpointing": True, "accumulation": 2}]
)
def test_training_does_not_notice(
    changed: dict[str, Any], tmp_path: Path, make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    told: list[str] = []
    weights = []
    for say in (None, told.append):
        unet, wanted = make_tiny(dropout=0.5), recipe(**changed)
        objective = Objective(scheduler, make_tiny(seed=1), distillation=1.0)
        torch.manual_seed(0)
        loop.train(
            unet, objective, images, wanted, accelerator=open_accelerator(wanted), folder=tmp_path / "c", say=say
        )
        weights.append([p.detach().clone() for p in unet.parameters()])
        assert unet.is_gradient_checkpointing == wanted.gradient_checkpointing
    assert all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    assert [line.split(":")[0] for line in told] == ["memory", "time"]


def test_a_trial_leaves_no_gradient_and_no_random_number(
    make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet
) -> None:
    tried = trial(make_tiny(dropout=0.5), Objective(scheduler), images, RECIPE)
    before = torch.get_rng_state()
    estimate.tell(tried.state, tried.objective, tried.draws, RECIPE, tried.accelerator, lambda line: None)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(p.grad is None for p in tried.state.unet.parameters())
    assert tried.state.unet.training


def test_the_warning_names_parts_that_fit(
    make_tiny: Callable[..., Any], scheduler: Any, images: TrainingSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = trial(make_tiny(), Objective(scheduler), images, RECIPE)
    found = estimate.measure(tried, RECIPE, 6)
    monkeypatch.setattr(estimate, "free", lambda device: found.need(2) - found.taken)
    told: list[str] = []
    estimate.tell(tried.state, tried.objective, tried.draws, RECIPE, tried.accelerator, told.append)
    assert told[-1].startswith("warning: ")
    assert "--accumulation 3," in told[-1]  # three parts of two images


def test_what_fits_is_what_is_free_and_there_already() -> None:
    found = Estimate({"weights": 10, "gradients": 10}, fixed=5, per_image=7, taken=10, free=30)
    assert found.need(2) == 39
    assert (found.most(), found.fits(2), found.fits(3)) == (2, True, False)


def test_saving_memory_is_advised_where_it_is_not_done_yet() -> None:
    assert guards.less_memory(recipe(batch_size=6), 1, 4)[0].startswith("--accumulation 2,")
    assert guards.less_memory(recipe(batch_size=6, accumulation=2), 1, 3) == [
        "--gradient-checkpointing", "--ema-on-cpu", "--optimizer adamw-8bit",
    ]  # fmt: skip
    assert guards.less_memory(recipe(ema_on_cpu=True, optimizer="adamw-8bit", batch_size=8), 2, 0)[1:] == [
        "--gradient-checkpointing"
    ]


def test_a_run_with_a_progress_bar_says_it_on_stderr(
    family: Path, tuning: Callable[..., FinetuneRecipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finetune(str(family / "pruned"), tmp_path / "out", tuning(), bar=progress.bar)
    said = capsys.readouterr()
    assert "memory: about" in said.err
    assert "teacher" in said.err
    assert said.out == ""
