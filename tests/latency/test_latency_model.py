"""The latency model: what it learns from a few networks holds for others, and its file is read strictly."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import UNet2DModel

from dpctl.errors import DpctlError
from dpctl.latency.document import Profile, architecture_of, read_profile, require_fitting
from dpctl.latency.model import Sample, accuracy, fit
from dpctl.latency.sampling import NARROWEST, nearest, stratified
from dpctl.latency.widths import importances
from dpctl.prune.plan import Layer, Network, Side, Span, best

TOY: dict[str, Any] = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
SPANS = tuple(Span(name, 64, 4) for name in ("a", "b", "c", "d"))


def side(*groups: str, fixed: int = 0) -> Side:
    return Side(fixed, {group: groups.count(group) for group in groups})


LAYERS = (
    Layer("first", 100, 9, side(fixed=3), side("a"), 1),
    Layer("norm", 0, 0, Side(0), side("a"), 2),
    Layer("middle", 100, 9, side("a"), side("b"), 1),
    Layer("joined", 50, 9, side("a", "b"), side("c"), 1),
    Layer("inner", 50, 1, side("c"), side("d"), 1),
    Layer("last", 100, 9, side("d", "c"), side(fixed=3), 1),
)
NETWORK = Network(SPANS, LAYERS)
# A residual branch over c, with a norm that only it reads.
BRANCHED = Network(
    (*SPANS, Span("e", 64, 4, optional=True)),
    (
        *LAYERS,
        Layer("before", 0, 0, Side(0), side("c"), 2, needs=("e",)),
        Layer("into", 50, 9, side("c"), side("e"), 1, needs=("e",)),
        Layer("back", 50, 9, side("e"), side("c"), 1),
    ),
)


def took(widths: dict[str, int], noise: Any = None, step: int = 8, network: Network = NETWORK, tile: int = 1) -> Sample:
    """Return what a machine would say whose kernels work in blocks, with a constant part and some noise."""
    layers = {}
    there = [x for x in network.layers if not x.is_gone(widths) and (x.inputs.width(widths) or not x.positions)]
    for layer in there:
        a, b = (-(-s.width(widths) // step) * step for s in (layer.inputs, layer.outputs))
        whole = -(-b // tile) * tile
        layers[layer.name] = 1e-5 + 1e-9 * layer.positions * layer.kernel * a * (b + whole) + 1e-7 * b
    layers["first.activation"] = 3e-5 + 1e-8 * sum(x.positions * x.outputs.width(widths) for x in there)
    layers[""] = 2e-5
    if noise is not None:
        layers = {name: value * noise.lognormal(0.0, 0.05) for name, value in layers.items()}
    # A profiler costs time, too: the whole is less than the sum of what it says.
    return Sample(widths, layers, 0.8 * sum(layers.values()) + 1e-4)


@pytest.mark.parametrize("step", [1, 8, 16])
def test_what_is_learnt_holds_for_networks_that_were_not_seen(step: int) -> None:
    noise = np.random.default_rng(0)
    model = fit(NETWORK, [took(w, noise, step) for w in [NETWORK.full(), *stratified(NETWORK, 24, 0)]])
    judged = accuracy(model, [took(w, None, step) for w in stratified(NETWORK, 20, 1)])
    assert judged.rank_correlation > 0.98
    assert judged.median_error < 0.04
    assert judged.worst_error < 0.12
    assert len(judged.pairs) == 20


def test_without_noise_it_is_exact_and_knows_the_blocks() -> None:
    model = fit(NETWORK, [took(w, step=16) for w in [NETWORK.full(), *stratified(NETWORK, 24, 0)]])
    assert model.step == 16
    assert accuracy(model, [took(w, step=16) for w in stratified(NETWORK, 20, 1)]).worst_error < 0.01


def test_outputs_that_are_computed_together_are_found() -> None:
    known, others = ([took(w, tile=32) for w in stratified(NETWORK, 24, seed)] for seed in (0, 1))
    model = fit(NETWORK, known)
    assert (model.step, model.tile) == (8, 32)
    assert accuracy(model, others).worst_error < 0.01
    # Half a tile more is paid for at once, and the other half is free but for its own products.
    steps = np.diff([model.predict(NETWORK.full() | {"b": width}) for width in (32, 40, 48)])
    assert steps[0] > 2 * steps[1]


def test_no_tile_is_found_where_there_is_none() -> None:
    noise = np.random.default_rng(0)
    assert fit(NETWORK, [took(w, noise) for w in stratified(NETWORK, 24, 0)]).tile == 0


def test_a_network_without_a_branch_does_not_pay_for_it() -> None:
    model = fit(NETWORK, [took(w) for w in [NETWORK.full(), *stratified(NETWORK, 16, 0)]])
    gone = model.predict(NETWORK.full() | {"d": 0})
    inner = next(term for term in model.terms if term.name == "inner")
    assert gone < model.predict(NETWORK.full() | {"d": 4}) - inner.base / 2


def test_branches_that_are_gone_are_predicted_like_other_widths() -> None:
    whole, networks = BRANCHED.full(), stratified(BRANCHED, 30, 0)
    assert sum(widths["e"] == 0 for widths in networks) == 3
    assert all(width > 0 for widths in networks for name, width in widths.items() if name != "e")
    model = fit(BRANCHED, [took(widths, network=BRANCHED) for widths in [whole, *networks]])
    assert accuracy(model, [took(w, network=BRANCHED) for w in stratified(BRANCHED, 20, 1)]).worst_error < 0.01
    # None of the branch's layers is paid for any more, the norm before it neither.
    terms = {term.name: term.cost(whole | {"e": 0}) for term in model.terms}
    assert (terms["before"], terms["into"], terms["back"]) == (0.0, 0.0, 0.0)


def test_samples_cover_the_range_and_every_group_on_its_own() -> None:
    found = stratified(NETWORK, 32, 0)
    assert found == stratified(NETWORK, 32, 0) != stratified(NETWORK, 32, 1)
    sizes = np.array([[widths[span.name] for span in SPANS] for widths in found])
    assert {int(width) for width in sizes.flat} <= set(SPANS[0].widths(1))
    means = sizes.mean(1) / 64
    assert means.min() < NARROWEST + 0.2
    assert means.max() > 0.8
    for column in sizes.T:
        assert len(set(column.tolist())) >= 12  # of 16 widths
    # Groups do not all grow together: each is wide beside narrow ones too.
    assert np.abs(sizes - sizes.mean(1, keepdims=True)).mean() > 4


def test_the_nearest_width_is_an_allowed_one() -> None:
    assert Span("a", 60, 4).widths(8) == (8, 16, 24, 32, 40, 48, 56, 60)
    assert [nearest((8, 16, 60), wanted) for wanted in (0, 12, 37, 39, 100)] == [8, 8, 16, 60, 60]


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture
def made() -> Profile:
    conditions = {"backend": "ort", "precision": "fp32", "batch_size": 1, "rows": 1, "size": [8, 8], "threads": 1}
    return Profile("d" * 64, conditions, {"processor": "another one"}, 0, 0.01, (took(NETWORK.full()),))


def test_the_file_comes_back_as_it_was(made: Profile, tmp_path: Path) -> None:
    more = made.with_sample(took(NETWORK.full() | {"a": 4}), held_out=True)
    more.write(tmp_path / "latency.json")
    assert read_profile(tmp_path / "latency.json") == more
    assert [path.name for path in tmp_path.iterdir()] == ["latency.json"]
    assert not more.is_from_here


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("format_version", 99),
        ("architecture", 3),
        ("samples", [{"widths": {"a": 4}, "layers": {}, "latency_s": "fast"}]),
        ("samples", [{"widths": {"a": -4}, "layers": {}, "latency_s": 1.0}]),
        ("samples", [{"widths": {"a": 4}, "layers": {"x": "slow"}, "latency_s": 1.0}]),
        ("conditions", None),
    ],
)
def test_a_damaged_file_is_refused(made: Profile, tmp_path: Path, name: str, value: Any) -> None:
    path = tmp_path / "latency.json"
    path.write_text(json.dumps(dataclasses.asdict(made) | {name: value}), encoding="utf-8")
    with pytest.raises(DpctlError, match="the latency file is"):
        read_profile(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(DpctlError, match="cannot be read"):
        read_profile(path)
    with pytest.raises(DpctlError, match="no such latency file"):
        read_profile(tmp_path / "missing.json")


@pytest.mark.parametrize("name", ["backend", "precision", "batch_size", "rows", "size", "threads"])
def test_a_file_of_something_else_is_refused_by_what_differs(made: Profile, name: str) -> None:
    require_fitting(made, "d" * 64, "u", made.conditions, Path("x"))
    with pytest.raises(DpctlError, match="another measurement") as caught:
        require_fitting(made, "d" * 64, "u", {**made.conditions, name: "other"}, Path("x"))
    assert name.replace("_", " ") in caught.value.got
    with pytest.raises(DpctlError, match="another model"):
        require_fitting(made, "e" * 64, "u", made.conditions, Path("x"))


def test_weights_do_not_matter_to_a_file_and_widths_do() -> None:
    one, other, wider = (UNet2DModel(block_out_channels=(8, width), norm_num_groups=4, **TOY) for width in (8, 8, 16))
    one.register_to_config(_name_or_path="somewhere")
    assert architecture_of(one) == architecture_of(other) != architecture_of(wider)


# --- what a width is worth -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("segments", "block"), [(1, 1), (4, 1), (1, 8)])
def test_a_width_is_worth_the_channels_that_selection_keeps(segments: int, block: int) -> None:
    span = Span("a", 32, segments, block=block)
    values = np.random.default_rng(0).random(32).tolist()
    worth = importances(span, values)
    for width in span.widths(1):
        kept = sum(values[channel] for channel in best(span, values, width))
        assert worth[width // (segments * block)] == pytest.approx(kept)
