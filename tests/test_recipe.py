"""Recipes and their TOML: one to one, strict about names and types."""

import dataclasses
import json
import types
import typing
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpctl.errors import DpctlError
from dpctl.recipe import (
    BenchRecipe,
    ChainRecipe,
    ExportRecipe,
    FinetuneRecipe,
    PruneRecipe,
    TrainRecipe,
    from_dict,
    read_recipe,
    to_dict,
)

KINDS = (TrainRecipe, FinetuneRecipe, PruneRecipe, ExportRecipe, BenchRecipe, ChainRecipe)

PLAIN: dict[Any, st.SearchStrategy] = {
    str: st.text(max_size=10),
    int: st.integers(),
    float: st.floats(allow_nan=False),
    bool: st.booleans(),
}


def values(hint: Any) -> st.SearchStrategy:
    """Return what an entry of this type may hold."""
    if dataclasses.is_dataclass(hint):
        return recipes(hint)
    if isinstance(hint, types.UnionType):
        return st.one_of(st.none() if option is types.NoneType else values(option) for option in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        options = typing.get_args(hint)
        if options[-1] is Ellipsis:
            return st.lists(values(options[0]), max_size=3).map(tuple)
        return st.tuples(*(values(option) for option in options))
    return PLAIN[hint]


def recipes(kind: Any) -> st.SearchStrategy:
    return st.builds(kind, **{name: values(hint) for name, hint in typing.get_type_hints(kind).items()})


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_a_recipe_survives_json(kind: type, data: st.DataObject) -> None:
    recipe = data.draw(recipes(kind))
    plain = json.loads(json.dumps(to_dict(recipe)))
    assert from_dict(kind, plain, "recipe") == recipe
    assert to_dict(from_dict(kind, plain, "recipe")) == plain


@pytest.mark.parametrize("kind", KINDS)
def test_the_defaults_are_what_nothing_gives(kind: type) -> None:
    assert from_dict(kind, {}, "recipe") == kind()
    assert from_dict(kind, to_dict(kind()), "recipe") == kind()


@pytest.mark.parametrize("kind", KINDS)
@given(name=st.text(max_size=10))
def test_an_unknown_entry_is_named(kind: type, name: str) -> None:
    known = typing.get_type_hints(kind)
    if name in known:
        return
    with pytest.raises(DpctlError, match="unknown entry") as caught:
        from_dict(kind, {name: 1}, "my.toml")
    assert name in caught.value.got
    assert "my.toml" in caught.value.got
    assert all(entry in caught.value.todo for entry in known)


WRONG: dict[Any, list[Any]] = {
    str: [1, 1.5, True, None, ["a"], {}],
    int: ["1", 1.5, True, None, [1], {}],
    float: ["1.5", True, None, [1.5], {}, 10**400],
    bool: [0, 1, "true", None, [True], {}],
}


def wrong(hint: Any) -> list[Any]:
    """Return what an entry of this type must not hold."""
    if dataclasses.is_dataclass(hint):
        return [1, "x", None, [], [{}]]
    if isinstance(hint, types.UnionType):
        return wrong(typing.get_args(hint)[0])
    if typing.get_origin(hint) is tuple:
        inner = [[bad] * 3 for bad in wrong(typing.get_args(hint)[0])]
        return [1, "a", None, {}, *inner]
    return WRONG[hint]


ILL_TYPED = [
    pytest.param(kind, name, bad, id=f"{kind.__name__}.{name}={str(bad)[:9]}")
    for kind in KINDS
    for name, hint in typing.get_type_hints(kind).items()
    for bad in wrong(hint)
]


@pytest.mark.parametrize(("kind", "name", "bad"), ILL_TYPED)
def test_an_ill_typed_entry_is_named(kind: type, name: str, bad: Any) -> None:
    with pytest.raises(DpctlError, match="wrong type|out of range") as caught:
        from_dict(kind, {name: bad}, "my.toml")
    assert f"my.toml: {name} = " in caught.value.got


def test_an_entry_of_an_inner_recipe_is_named_with_its_path() -> None:
    with pytest.raises(DpctlError) as caught:
        from_dict(ChainRecipe, {"prune": {"ratio": "half"}}, "my.toml")
    assert caught.value.got == "my.toml: prune: ratio = 'half'"
    with pytest.raises(DpctlError, match="unknown entry") as caught:
        from_dict(ChainRecipe, {"prune": {"ration": 0.5}}, "my.toml")
    assert "my.toml: prune: ration" in caught.value.got


@pytest.mark.parametrize("batch", [[], [1], [1, 2], [1, 2, 3, 4]])
def test_a_list_of_another_length_is_named(batch: list[int]) -> None:
    with pytest.raises(DpctlError, match="wrong length") as caught:
        from_dict(ExportRecipe, {"batch": batch}, "my.toml")
    assert "my.toml: batch" in caught.value.got


def test_a_whole_number_is_a_number() -> None:
    assert from_dict(PruneRecipe, {"ratio": 1}, "x").ratio == 1.0
    assert type(from_dict(PruneRecipe, {"ratio": 1}, "x").ratio) is float


def test_recipes_are_frozen() -> None:
    for kind in KINDS:
        with pytest.raises(dataclasses.FrozenInstanceError):
            kind().__setattr__(dataclasses.fields(kind)[0].name, None)


# --- TOML --------------------------------------------------------------------------------------------------------

TOML = """
model = "runs/base"
scratch = true

[prune]
criterion = "magnitude"
target_macs = 0.4
threshold = 0

[finetune]
steps = 1_000
learning_rate = 2e-4

[export]
batch = [1, 4, 16]

[bench]
backends = ["ort"]
num_inference_steps = [10, 50]
"""


def test_a_toml_file_maps_onto_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text(TOML)
    assert read_recipe(tmp_path / "r.toml", ChainRecipe) == ChainRecipe(
        model="runs/base",
        scratch=True,
        prune=PruneRecipe("magnitude", target_macs=0.4, threshold=0.0, align=16),
        finetune=FinetuneRecipe(steps=1000, learning_rate=2e-4),
        export=ExportRecipe(batch=(1, 4, 16)),
        bench=BenchRecipe(backends=("ort",), num_inference_steps=(10, 50), rounds=10, samples=256),
    )


def test_an_empty_file_is_the_default(tmp_path: Path) -> None:
    (tmp_path / "r.toml").touch()
    assert read_recipe(tmp_path / "r.toml", ChainRecipe) == ChainRecipe()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prune = ", "not TOML"),
        (b"a = 1\na = 2", "not TOML"),
        (b"\xff\xfe\x00", "not TOML"),
        (b"\x80\x04cos\nsystem\n", "not TOML"),
        (b"seed = " + b"9" * 5000, "not TOML"),
        (b"steps = 3", "unknown entry"),
        (b"[prune]\nratio = 1979-05-27", "wrong type"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    with pytest.raises(DpctlError, match=message) as caught:
        read_recipe(tmp_path / "r.toml", ChainRecipe)
    assert "r.toml" in caught.value.got


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DpctlError, match="no such recipe"):
        read_recipe(tmp_path / "missing.toml", ChainRecipe)
    with pytest.raises(DpctlError, match="cannot be read"):
        read_recipe(tmp_path, ChainRecipe)
    (tmp_path / "file").touch()
    with pytest.raises(DpctlError, match="cannot be read"):
        read_recipe(tmp_path / "file" / "r.toml", ChainRecipe)


# --- tables of a recipe file -------------------------------------------------------------------------------------


def chain_recipe(tmp_path: Path, text: str) -> ChainRecipe:
    (tmp_path / "r.toml").write_text(text, encoding="utf-8")
    return read_recipe(tmp_path / "r.toml", ChainRecipe)


@pytest.mark.parametrize("table", ["prune", "finetune", "between", "export", "bench"])
def test_a_table_with_one_entry_keeps_the_other_defaults_of_the_chain(tmp_path: Path, table: str) -> None:
    default = getattr(ChainRecipe(), table)
    entry = {
        "prune": "align = 24",
        "finetune": "seed = 7",
        "between": "seed = 7",
        "export": "batch = [1, 2, 3]",
        "bench": "seed = 7",
    }[table]
    found = getattr(chain_recipe(tmp_path, f"[{table}]\n{entry}\n"), table)
    name = entry.split(" ")[0]
    assert getattr(found, name) != getattr(default, name)
    assert dataclasses.replace(found, **{name: getattr(default, name)}) == default


@pytest.mark.parametrize("target", ["ratio", "target_macs", "target_params"])
def test_a_target_takes_the_place_of_the_default_one(tmp_path: Path, target: str) -> None:
    found = chain_recipe(tmp_path, f"[prune]\n{target} = 0.25\n").prune
    given = {name: getattr(found, name) for name in ("ratio", "target_macs", "target_params")}
    assert {name: value for name, value in given.items() if value is not None} == {target: 0.25}
    assert found.align == ChainRecipe().prune.align
