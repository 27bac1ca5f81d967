"""`make bench-scoring`: agreement means what it says, and what was measured is not measured again."""

from typing import Any

import pytest
import torch

from scripts import bench_scoring as script


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return script.Bench(tmp_path_factory.mktemp("scoring"))


def drawn(bench: Any, seed: int) -> dict[str, list[float]]:
    generator = torch.Generator().manual_seed(seed)
    return {span.name: torch.rand(span.width, generator=generator).tolist() for span in bench.network.spans}


def test_agreement_is_corrected_for_chance(bench: Any) -> None:
    one, other = drawn(bench, 1), drawn(bench, 2)
    assert bench.agreement(one, one, "local") == bench.agreement(one, one, "global") == 1.0
    assert abs(bench.agreement(one, other, "local")) < 0.1  # two thirds of the channels are kept by both
    worst = {name: [-value for value in values] for name, values in one.items()}
    assert bench.agreement(one, worst, "local") < -0.3


def test_what_was_measured_is_read_from_the_folder(bench: Any) -> None:
    scores, took = bench.once("arm", lambda: {"sum-abs": {"a": [1.0, 2.0]}})
    again, same = bench.once("arm", lambda: pytest.fail("measured twice"))
    assert (scores, took) == (again, same)
    assert scores == {"sum-abs": {"a": [1.0, 2.0]}}


def test_our_scores_are_those_of_the_recipe(bench: Any) -> None:
    found = bench.ours(0, 8, "abs-sum")["abs-sum"]
    assert {name: len(values) for name, values in found.items()} == bench.network.full()
    assert found != bench.ours(1, 8, "abs-sum")["abs-sum"]
