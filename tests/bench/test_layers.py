"""MACs against milliseconds by layer: planted profiles give the known answer, and everything adds up."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dpctl import cost
from dpctl.bench import layers
from dpctl.bench.layers import Kind, Layer
from dpctl.bench.process import Worker
from dpctl.bench.worker import Subject
from dpctl.prune.groups import find_groups
from dpctl.prune.network import describe
from dpctl.prune.plan import select, uniform
from dpctl.prune.surgery import kept_indices, slim
from runtime.backends import eager
from runtime.layers import LayerTime

BEFORE = {"conv_in": 100, "a.conv1": 1000, "a.conv2": 1000, "a.attention": 400}
AFTER = {"conv_in": 100, "a.conv1": 250, "a.conv2": 500, "a.attention": 100}


def profile(*parts: tuple[str, str, float]) -> list[LayerTime]:
    return [LayerTime(*part) for part in parts]


UNPRUNED = profile(
    ("conv_in", "Conv", 1),
    ("a.norm", "Norm", 2),
    ("a.conv1", "Conv", 8),
    ("a.conv2", "Conv", 6),
    ("a.conv2", "Add", 2),
    ("a.attention", "MatMul", 4),
    ("", "Cast", 1),
)
SLIM = profile(
    ("conv_in", "Conv", 1),
    ("a.norm", "Norm", 2),
    ("a.conv1", "Conv", 2),
    ("a.conv2", "Conv", 5),
    ("a.conv2", "Add", 1),
    ("a.attention", "MatMul", 4),
    ("", "Cast", 0.5),
)


def test_what_was_planted_is_found() -> None:
    found = layers.compare(UNPRUNED, SLIM, BEFORE, AFTER)
    assert found.layers == (
        Layer("conv_in", 100, 100, 1, 1, None, 0),
        Layer("a.conv1", 1000, 250, 8, 2, 1.0, 0),  # it followed to the second
        Layer("a.conv2", 1000, 500, 8, 6, 0.5, 2),  # a quarter of the time for half of the MACs
        Layer("a.attention", 400, 100, 4, 4, 0.0, 3),  # it did not at all
    )
    assert [layer.name for layer in found.lagging] == ["a.attention", "a.conv2"]
    assert found.without_macs == Kind("without MACs", 3, 2.5)
    assert found.kinds == (Kind("Norm", 2, 2), Kind("Cast", 1, 0.5))
    assert found.other == Layer("other", 0, 0, 0, 0, None, 0)


def test_the_whole_says_what_share_of_the_saving_became_time() -> None:
    whole = layers.compare(UNPRUNED, SLIM, BEFORE, AFTER).whole
    assert (whole.macs_before, whole.macs_after) == (2500, 950)
    assert (whole.latency_before_s, whole.latency_after_s) == (24, 15.5)
    assert whole.followed == pytest.approx((1 - 15.5 / 24) / (1 - 950 / 2500))


def test_a_network_that_was_not_pruned_has_nothing_to_follow() -> None:
    found = layers.compare(UNPRUNED, UNPRUNED, BEFORE, BEFORE)
    assert found.whole.followed is None
    assert found.lagging == ()


def test_what_is_not_in_both_is_other() -> None:
    gone = [part for part in SLIM if part.name != "a.conv2"]
    found = layers.compare(UNPRUNED, gone, BEFORE, AFTER)
    assert [layer.name for layer in found.layers] == ["conv_in", "a.conv1", "a.attention"]
    assert found.other == Layer("other", 1000, 500, 8, 0, 2.0, -4)
    renamed = {("b.conv2" if name == "a.conv2" else name): macs for name, macs in AFTER.items()}
    found = layers.compare(UNPRUNED, SLIM, BEFORE, renamed)
    assert (found.other.macs_before, found.other.macs_after) == (1000, 500)
    assert (found.other.latency_before_s, found.other.latency_after_s) == (8, 6)


def test_a_joined_kernel_counts_under_its_heaviest_module() -> None:
    joined = [LayerTime("conv_in + a.conv1 + a.norm", "Fused", 3.0), LayerTime("a.norm + a.act", "Fused", 1.0)]
    found = layers.compare(joined, joined, BEFORE, AFTER)
    assert [layer.name for layer in found.layers] == ["a.conv1"]
    assert found.without_macs == Kind("without MACs", 1, 1)
    assert found.other.macs_before == 2500 - 1000


def test_it_is_plain_json() -> None:
    found = layers.compare(UNPRUNED, SLIM, BEFORE, AFTER)
    told = json.loads(json.dumps(dataclasses.asdict(found), allow_nan=False))
    assert told["layers"][2] == {
        "name": "a.conv2",
        "macs_before": 1000,
        "macs_after": 500,
        "latency_before_s": 8,
        "latency_after_s": 6,
        "followed": 0.5,
        "lost_s": 2,
    }


def test_real_profiles_add_up(toy_unet: Any, toy_pipeline: Path) -> None:
    groups = find_groups(toy_unet)
    network = describe(toy_unet, groups)
    scores = {span.name: [float(i) for i in range(span.width)] for span in network.spans}
    small = slim(toy_unet, kept_indices(toy_unet, groups, select(network, scores, uniform(network, 0.4, 1))))
    before, after = cost.macs_by_module(toy_unet), cost.macs_by_module(small)
    taken = eager.profile(toy_pipeline, threads=1, runs=2)
    found = layers.compare(taken, taken, before, after)
    assert {layer.name for layer in found.layers} == before.keys() == after.keys()
    assert found.other == Layer("other", 0, 0, 0, 0, None, 0)
    assert sum(layer.macs_before for layer in found.layers) == found.whole.macs_before == sum(before.values())
    assert sum(layer.macs_after for layer in found.layers) == found.whole.macs_after == sum(after.values())
    parts = sum(layer.latency_before_s for layer in found.layers) + found.without_macs.latency_before_s
    assert parts == pytest.approx(found.whole.latency_before_s)
    assert parts == pytest.approx(sum(layer.latency_s for layer in taken))
    assert sum(kind.latency_before_s for kind in found.kinds) == pytest.approx(found.without_macs.latency_before_s)
    # The same time twice: nothing followed, and what was saved is lost.
    assert found.lagging
    assert all(layer.followed in (None, 0) for layer in found.layers)


def test_a_worker_profiles_its_subject_and_the_machine(tiny: Path) -> None:
    from dpctl.models import load_model

    with Worker("tiny / eager", threads=1) as worker:
        worker.ask("open", directory=str(tiny), backend="eager", scheduler="ddim", threads=1, seed=0)
        told = [LayerTime(**layer) for layer in worker.ask("profile", batch_size=2, runs=2)["layers"]]
        peak = worker.ask("light", threads=1)["flops"]
        turn = worker.ask("turn", batch_size=2, num_inference_steps=2)
    macs = cost.macs_by_module(load_model(tiny).unet)
    found = layers.compare(told, told, macs, macs)
    assert {layer.name for layer in found.layers} == macs.keys()
    assert peak > 1e8  # no processor that runs this is slower
    assert len(turn["step_latency_s"]) == 2  # its own network is as it was


def test_a_backend_without_a_profiler_has_no_layers(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject(str(tiny), "eager", threads=torch.get_num_threads(), scheduler="ddim", seed=0)
    monkeypatch.delattr(eager, "profile")
    assert subject.profile(batch_size=1, runs=1) == {"layers": None}
