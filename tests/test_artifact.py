"""The model directory: its manifest, its digest, and files that are not what they were."""

import errno
import json
import os
import random
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpctl import artifact
from dpctl.artifact import Manifest
from dpctl.errors import DpctlError

# --- the manifest ------------------------------------------------------------------------------------------------

texts = st.text(max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts
values = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
objects = st.dictionaries(texts, values, max_size=3)
digests = st.text("0123456789abcdef", min_size=64, max_size=64)
inside = texts.filter(lambda name: name and not name.startswith("/") and ".." not in name.split("/"))
file_maps = st.dictionaries(inside, digests, max_size=5)
manifests = st.builds(
    Manifest,
    kind=st.sampled_from(artifact.KINDS),
    recipe=objects,
    stats=objects,
    files=file_maps,
    parent=st.none() | digests,
    parent_source=st.none() | texts,
    lineage=st.lists(objects, max_size=3),
    signature=st.none() | objects,
    parity=st.none() | objects,
    environment=objects,
    created=texts,
)


@given(manifests)
def test_a_manifest_survives_json(manifest: Manifest) -> None:
    again = Manifest.from_json(manifest.to_json(), Path("dpctl.json"))
    assert again == manifest
    assert again.digest == manifest.digest


@given(file_maps, st.randoms(use_true_random=False))
def test_the_digest_does_not_depend_on_the_order(files: dict[str, str], shuffler: random.Random) -> None:
    pairs = list(files.items())
    shuffler.shuffle(pairs)
    assert artifact.digest(dict(pairs)) == artifact.digest(files)


@given(file_maps, st.data())
def test_the_digest_depends_on_every_name_and_every_content(files: dict[str, str], data: st.DataObject) -> None:
    name = data.draw(texts.filter(bool))
    other = data.draw(digests.filter(lambda sha256: sha256 != files.get(name)))
    assert artifact.digest({**files, name: other}) != artifact.digest(files)
    if name in files:
        fewer = {key: value for key, value in files.items() if key != name}
        assert artifact.digest(fewer) != artifact.digest(files)


@given(file_maps.filter(bool))
def test_the_digest_ignores_everything_but_the_files(files: dict[str, str]) -> None:
    one = Manifest(kind="pruned", recipe={}, stats={}, files=files, created="now")
    assert one.digest == replace(one, kind="exported", recipe={"a": 1}, created="later", parent="x").digest


def good() -> dict:
    return json.loads(Manifest(kind="pruned", recipe={}, stats={}, files={"a": "0" * 64}).to_json())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe\xff",
        b"[]",
        b"null",
        b'"text"',
        json.dumps(good() | {"format_version": 99}).encode(),
        json.dumps(good() | {"kind": "stolen"}).encode(),
        json.dumps(good() | {"kind": ["pruned"]}).encode(),
        json.dumps(good() | {"files": ["a"]}).encode(),
        json.dumps(good() | {"files": {"a": 1}}).encode(),
        json.dumps(good() | {"recipe": None}).encode(),
        json.dumps(good() | {"stats": 3}).encode(),
        json.dumps(good() | {"lineage": {}}).encode(),
        json.dumps(good() | {"parent": 1}).encode(),
        *(json.dumps({k: v for k, v in good().items() if k != gone}).encode() for gone in ("kind", "files", "recipe")),
    ],
)
def test_a_corrupt_manifest_is_explained(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "dpctl.json").write_bytes(content)
    with pytest.raises(DpctlError, match="manifest"):
        artifact.read_manifest(tmp_path)


def test_entries_of_a_later_dpctl_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "dpctl.json").write_text(json.dumps(good() | {"of_the_future": 1}))
    manifest = artifact.read_manifest(tmp_path)
    assert manifest is not None
    assert manifest.kind == "pruned"


def test_a_plain_directory_has_no_manifest(tmp_path: Path) -> None:
    assert artifact.read_manifest(tmp_path) is None


def test_an_unreadable_manifest_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    (tmp_path / "dpctl.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DpctlError, match="cannot be read"):
        artifact.read_manifest(tmp_path)


# --- the files ---------------------------------------------------------------------------------------------------


def write_small(directory: Path, text: str = "one") -> Manifest:
    (directory / "unet").mkdir()
    (directory / "unet" / "weights").write_text(text)
    (directory / "model_index.json").write_text("{}")
    return artifact.write_manifest(directory, kind="pruned", recipe={"seed": 0}, stats={"params": 1})


def test_the_manifest_lists_every_file_but_itself(tmp_path: Path) -> None:
    manifest = write_small(tmp_path)
    assert sorted(manifest.files) == ["model_index.json", "unet/weights"]
    assert artifact.read_manifest(tmp_path) == manifest
    assert manifest.digest == artifact.digest(artifact.hash_files(tmp_path))
    artifact.verify_files(tmp_path, manifest)


def test_a_changed_file_is_named(tmp_path: Path) -> None:
    manifest = write_small(tmp_path)
    (tmp_path / "unet" / "weights").write_text("two")
    with pytest.raises(DpctlError, match=r"differs from its digest[\s\S]*unet/weights"):
        artifact.verify_files(tmp_path, manifest)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    manifest = write_small(tmp_path)
    (tmp_path / "unet" / "weights").unlink()
    with pytest.raises(DpctlError, match=r"missing[\s\S]*unet/weights"):
        artifact.verify_files(tmp_path, manifest)


def test_further_files_do_no_harm(tmp_path: Path) -> None:
    manifest = write_small(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    artifact.verify_files(tmp_path, manifest)


def test_a_file_name_that_is_no_utf8_has_a_digest(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).write_text("x")
    files = artifact.hash_files(tmp_path)
    manifest = Manifest(kind="trained", recipe={}, stats={}, files=files)
    assert Manifest.from_json(manifest.to_json(), tmp_path).digest == artifact.digest(files)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "unet/../../outside"])
def test_a_manifest_of_files_outside_its_directory_is_refused(tmp_path: Path, name: str) -> None:
    text = Manifest(kind="trained", recipe={}, stats={}, files={name: "0" * 64}).to_json()
    with pytest.raises(DpctlError, match="wrong kind"):
        Manifest.from_json(text, tmp_path / "dpctl.json")
