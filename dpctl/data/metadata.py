"""What a folder says about its images: `metadata.jsonl` or `metadata.csv`, and the names of its sub-folders.

The convention is that of "imagefolder" in the library datasets: `file_name`, relative to the metadata, names the image;
`text` (or `caption`) and `label` tell of it. Without metadata the sub-folders are the classes.
"""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from dpctl.data.images import CAPTION, Told, told_labels
from dpctl.errors import DpctlError

NAMES = ("metadata.jsonl", "metadata.csv")
TEXTS = ("text", "caption")


def read_told(paths: Sequence[str], files: Sequence[str]) -> Told:
    """Return what metadata files and sub-folders tell about the images at these paths.

    Raises a DpctlError for metadata that cannot be read, names missing images or leaves some out.
    """
    if not files:
        labels, classes = _by_folder(paths)
        about = "no metadata.jsonl or metadata.csv" + ("" if classes else ", no sub-folders of one depth")
        return Told(labels, classes, about=about)
    rows = _rows(files, {os.path.normpath(path): number for number, path in enumerate(paths)})
    left = [path for number, path in enumerate(paths) if number not in rows]
    if left:
        got = f"{len(left)} of {len(paths)}, the first: {left[0]}"
        raise DpctlError("images without a line in the metadata", got, "add their lines, or move them elsewhere")
    ordered = [rows[number] for number in range(len(paths))]
    columns = sorted({column for _, row in ordered for column in row})
    about = f"{', '.join(files)} with the columns {', '.join(columns)}"
    text = next((name for name in TEXTS if name in columns), None)
    captions = _column(ordered, text) if text else None
    if "label" in columns:
        labels, classes = told_labels(_numbered(_column(ordered, "label")), f"{', '.join(files)}, label")
    else:
        labels, classes = _by_folder(paths)
    return Told(labels, classes, captions, about)


def _rows(files: Sequence[str], numbers: dict[str, int]) -> dict[int, tuple[str, dict[str, Any]]]:
    """Return image number -> (the line's place, its values)."""
    rows: dict[int, tuple[str, dict[str, Any]]] = {}
    for file in files:
        for place, row in _lines(Path(file)):
            name = row.get("file_name")
            if not isinstance(name, str):
                got = f"{place}: the columns {', '.join(row)}"
                raise DpctlError("a line of the metadata has no file_name", got, f"give lines such as {CAPTION}")
            number = numbers.get(os.path.normpath(Path(file).parent / name))
            if number is None:
                todo = "correct file_name, a path from the metadata's folder to an image in it, or remove the line"
                raise DpctlError("the metadata names an image that is not there", f"{place}: {name}", todo)
            if number in rows:
                raise DpctlError(
                    "the metadata names an image twice", f"{rows[number][0]} and {place}: {name}", "remove one line"
                )
            rows[number] = (place, row)
    return rows


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the values of each line that has any."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            if path.suffix == ".csv":
                reader = csv.DictReader(stream)
                for row in reader:
                    yield (
                        f"{path}, line {reader.line_num}",
                        {k: v for k, v in row.items() if k is not None and v is not None},
                    )
                return
            for number, line in enumerate(stream, start=1):
                if line.strip():
                    yield f"{path}, line {number}", _object(line, number)
    except (OSError, ValueError, csv.Error) as problem:  # also JSON's and Unicode's
        todo = f"give UTF-8: CSV with a header line, or one JSON object per line, such as {CAPTION}"
        raise DpctlError("the metadata cannot be read", f"{path}: {problem}", todo) from None


def _object(line: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"line {number}: {problem}") from None
    if not isinstance(value, dict):
        raise ValueError(f"line {number} is no JSON object")
    return value


def _column(rows: Sequence[tuple[str, dict[str, Any]]], name: str) -> list[Any]:
    missing = next((place for place, row in rows if row.get(name) is None), None)
    if missing is not None:
        raise DpctlError(f"a line of the metadata has no {name}", missing, "give every image one, or none")
    return [row[name] for _, row in rows]


def _numbered(values: list[Any]) -> list[Any]:
    """Return the labels of a CSV, which are all texts, as the numbers that they may be."""
    digits = all(isinstance(value, str) and value.isascii() and value.isdigit() for value in values)
    return [int(value) for value in values] if digits else values


def _by_folder(paths: Sequence[str]) -> tuple[Any, int]:
    """Return each image's class by the name of its folder, where there are several of one depth."""
    names = [path.split("/")[-2] for path in paths]
    depths = {path.count("/") for path in paths}
    return told_labels(names, "") if len(depths) == 1 and len(set(names)) > 1 else (None, 0)
