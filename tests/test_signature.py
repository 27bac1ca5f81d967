import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpctl.errors import DpctlError
from dpctl.signature import DTYPES, Signature, Tensor, images_of, of_unet, rows_of, unet_arguments

CONFIG: dict[str, Any] = {"_class_name": "UNet2DModel", "sample_size": 8, "in_channels": 1, "out_channels": 2}

axes = st.one_of(st.text(min_size=1), st.integers(1, 10**6))
tensors = st.builds(Tensor, st.text(min_size=1), st.sampled_from(DTYPES), st.lists(axes, max_size=5).map(tuple))
sides = st.lists(tensors, min_size=1, max_size=4).map(tuple)
batches = st.lists(st.integers(1, 10**6), min_size=3, max_size=3).map(lambda three: tuple(sorted(three)))


@given(st.builds(Signature, sides, sides, batches))
def test_json_gives_the_same_signature_back(signature: Signature) -> None:
    assert Signature.from_json(json.loads(json.dumps(signature.to_json()))) == signature


def test_an_unconditional_unet_takes_sample_and_timestep() -> None:
    signature = of_unet(CONFIG, (1, 2, 4))
    assert signature.inputs == (
        Tensor("sample", "float32", ("batch", 1, 8, 8)),
        Tensor("timestep", "float32", ("batch",)),
    )
    assert signature.outputs == (Tensor("out_sample", "float32", ("batch", 2, 8, 8)),)
    assert signature.batch == (1, 2, 4)


def test_a_class_conditional_pruned_unet_also_takes_labels() -> None:
    signature = of_unet(CONFIG | {"_class_name": "PrunedUNet2DModel", "num_class_embeds": 10, "sample_size": [8, 12]})
    assert signature.input("class_labels") == Tensor("class_labels", "int64", ("batch",))
    assert signature.input("sample").at(3) == (3, 1, 8, 12)


@pytest.mark.parametrize(
    "changed",
    [
        {"_class_name": "UNet3DConditionModel"},
        {"_class_name": None},
        {"class_embed_type": "timestep"},
        {"class_embed_type": "identity"},
        {"sample_size": None},
    ],
)
def test_a_network_that_the_contract_does_not_name_is_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(DpctlError):
        of_unet(CONFIG | changed)


@pytest.mark.parametrize("batch", [(0, 1, 2), (2, 1, 4), (1, 8, 4)])
def test_an_impossible_batch_range_is_refused(batch: tuple[int, int, int]) -> None:
    with pytest.raises(DpctlError, match="MIN,OPT,MAX"):
        of_unet(CONFIG, batch)


def test_an_axis_that_no_engine_takes_is_refused() -> None:
    for batch, sizes in (((1, 2, 2**31), None), ((1, 2, 4), (8, 8, 2**31))):
        with pytest.raises(DpctlError, match="no axis is so long"):
            of_unet(CONFIG, batch, sizes)


def test_check_returns_the_batch_of_fitting_shapes() -> None:
    assert of_unet(CONFIG, (2, 2, 4)).check({"sample": (3, 1, 8, 8), "timestep": (3,)}) == 3


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"sample": (5, 1, 8, 8), "timestep": (5,)}, "exported for 2 to 4"),
        ({"sample": (1, 1, 8, 8), "timestep": (1,)}, "exported for 2 to 4"),
        ({"sample": (), "timestep": (2,)}, "exported for 2 to 4"),
        ({"sample": (2, 3, 8, 8), "timestep": (2,)}, r"give \[2, 1, 8, 8\]"),
        ({"sample": (2, 1, 8, 8), "timestep": (1,)}, r"give \[2\]"),
        ({"sample": (2, 1, 8, 8), "timestep": ()}, r"give \[2\]"),
        ({"sample": (2, 1, 8, 8)}, "give exactly: sample, timestep"),
        ({"sample": (2, 1, 8, 8), "timestep": (2,), "class_labels": (2,)}, "give exactly: sample, timestep"),
    ],
)
def test_check_says_what_does_not_fit(shapes: dict[str, tuple[int, ...]], words: str) -> None:
    with pytest.raises(DpctlError, match=words):
        of_unet(CONFIG, (2, 2, 4)).check(shapes)


@pytest.mark.parametrize(
    ("config", "images"),
    [({}, 6), ({"cross_attention_dim": 8}, 3), ({"cross_attention_dim": 8, "time_cond_proj_dim": 4}, 6)],
)
def test_guidance_takes_two_rows_for_each_image(config: dict[str, int], images: int) -> None:
    assert images_of(config, 6) == images
    assert rows_of(config, (1, 1, images))[2] == 6
    assert images_of(config, 7) == images + (images == 6)


DYNAMIC = of_unet(CONFIG | {"block_out_channels": (8, 8, 8)}, (2, 2, 4), (4, 8, 16))


def test_a_dynamic_size_is_named_bounded_and_in_steps_of_what_the_network_halves() -> None:
    sample = DYNAMIC.input("sample")
    assert sample.shape == ("batch", 1, "height", "width")
    assert (sample.at(3, (4, 12)), DYNAMIC.shape(sample, 3)) == ((3, 1, 4, 12), (3, 1, 8, 8))
    assert DYNAMIC.bounds(sample) == ((2, 1, 4, 4), (2, 1, 8, 8), (4, 1, 16, 16))
    assert DYNAMIC.check({"sample": (3, 1, 4, 12), "timestep": (3,)}) == 3
    assert Signature.from_json(json.loads(json.dumps(DYNAMIC.to_json()))) == DYNAMIC
    with pytest.raises(ValueError, match="dynamic size"):
        sample.at(3)


@pytest.mark.parametrize("size", [(2, 8), (8, 20), (6, 8), (8,), ()])
def test_a_size_out_of_range_or_between_the_steps_is_refused(size: tuple[int, ...]) -> None:
    with pytest.raises(DpctlError, match="4 to 16 in multiples of 4"):
        DYNAMIC.check({"sample": (2, 1, *size), "timestep": (2,)})


@pytest.mark.parametrize("sizes", [(4, 8, 18), (8, 4, 16), (0, 8, 16)])
def test_impossible_sizes_are_refused(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(DpctlError, match="in multiples of 4"):
        of_unet(CONFIG | {"block_out_channels": (8, 8, 8)}, (1, 1, 1), sizes)


@pytest.mark.parametrize(
    "change",
    [
        {"inputs": []},
        {"inputs": None},
        {"batch": [1, 2]},
        {"batch": [1, 2, 2.5]},
        {"batch": [True, 2, 3]},
        {"batch": [3, 2, 1]},
        {"extra": 1},
        {"outputs": [{"name": "x", "dtype": "float32"}]},
        {"outputs": [{"name": "x", "dtype": "float8", "shape": [1]}]},
        {"outputs": [{"name": "x", "dtype": "float32", "shape": [0]}]},
        {"outputs": [{"name": "x", "dtype": "float32", "shape": "batch"}]},
    ],
)
def test_what_is_no_signature_is_a_clean_error(change: dict[str, Any]) -> None:
    with pytest.raises(DpctlError):
        Signature.from_json(of_unet(CONFIG).to_json() | change)


@pytest.mark.parametrize("values", [None, [], "text", {}])
def test_what_is_no_object_is_a_clean_error(values: Any) -> None:
    with pytest.raises(DpctlError):
        Signature.from_json(values)


# --- conditions --------------------------------------------------------------------------------------------------

TEXT = CONFIG | {"_class_name": "UNet2DConditionModel", "cross_attention_dim": 24}
SDXL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80}


def conditions(**changed: Any) -> dict[str, tuple[int | str, ...]]:
    inputs = of_unet(TEXT | changed).inputs
    return {tensor.name: tensor.shape for tensor in inputs if tensor.name not in ("sample", "timestep")}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {"encoder_hidden_states": ("batch", 77, 24)}),
        ({"_class_name": "PrunedUNet2DConditionModel"}, {"encoder_hidden_states": ("batch", 77, 24)}),
        ({"cross_attention_dim": [24, 24]}, {"encoder_hidden_states": ("batch", 77, 24)}),
        (
            {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"},
            {"encoder_hidden_states": ("batch", 77, 32)},
        ),
        (
            SDXL,
            {"encoder_hidden_states": ("batch", 77, 24), "text_embeds": ("batch", 32), "time_ids": ("batch", 6)},
        ),
        (
            {"time_cond_proj_dim": 16, "num_class_embeds": 3},
            {"class_labels": ("batch",), "encoder_hidden_states": ("batch", 77, 24), "timestep_cond": ("batch", 16)},
        ),
    ],
)
def test_a_text_conditional_network_names_its_conditions(changed: dict[str, Any], expected: dict[str, Any]) -> None:
    assert conditions(**changed) == expected


@pytest.mark.parametrize(
    "changed",
    [{"encoder_hid_dim_type": "ip_image_proj"}, {"addition_embed_type": "image"}, {"addition_embed_type": "text"}],
)
def test_an_input_outside_the_contract_is_named(changed: dict[str, Any]) -> None:
    with pytest.raises(DpctlError, match=str(next(iter(changed.values())))):
        of_unet(TEXT | changed)


def test_unet_arguments_put_pooled_text_and_times_where_diffusers_wants_them() -> None:
    given = {"sample": 1, "timestep": 2, "text_embeds": 3, "time_ids": 4}
    assert unet_arguments(given) == {
        "sample": 1,
        "timestep": 2,
        "added_cond_kwargs": {"text_embeds": 3, "time_ids": 4},
    }
    assert unet_arguments({"sample": 1}) == {"sample": 1}
