"""Figures as text: three significant digits, SI units, no exponents."""

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpctl import units

SCALE = {"": 1, "k": 1e3, "M": 1e6, "G": 1e9, "B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}
SECONDS = {"s": 1, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 s"),
        (0.0123, "12.3 ms"),
        (1.5e-5, "15 us"),
        (1e-9, "1 ns"),
        (0.9999, "1 s"),
        (59.94, "59.9 s"),
        (119.4, "119 s"),
        (200, "3 min 20 s"),
        (3600, "60 min 00 s"),
        (7500, "2 h 05 min"),
        (-0.25, "-250 ms"),
        (math.inf, "inf s"),
        (math.nan, "nan s"),
    ],
)
def test_seconds(value: float, text: str) -> None:
    assert units.seconds(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1024, "1.02 kB"),
        (999_999, "1 MB"),
        (10_912_345, "10.9 MB"),
        (5e12, "5000 GB"),
    ],
)
def test_bytes(value: float, text: str) -> None:
    assert units.bytes_(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (12, "12"), (2_734_000, "2.73M"), (288e6, "288M"), (6.05e9, "6.05G")]
)
def test_count(value: float, text: str) -> None:
    assert units.count(value) == text


def test_percent_and_ratio() -> None:
    assert units.percent(0.4987) == "49.9 %"
    assert units.percent(1) == "100.0 %"
    assert units.ratio(1.6249) == "1.62x"


def read(text: str, scales: dict[str, float]) -> float:
    match = re.fullmatch(r"(-?[0-9.]+) ?([A-Za-z]*)", text)
    assert match is not None, text
    return float(match[1]) * scales[match[2]]


@given(st.floats(min_value=1e-12, max_value=119))
def test_a_duration_can_be_read_back(value: float) -> None:
    assert read(units.seconds(value), SECONDS) == pytest.approx(value, rel=0.0051)


@given(st.integers(min_value=0, max_value=10**14))
def test_a_size_and_a_count_can_be_read_back(value: int) -> None:
    assert read(units.bytes_(value), SCALE) == pytest.approx(value, rel=0.0051)
    assert read(units.count(value), SCALE) == pytest.approx(value, rel=0.0051)


@given(st.floats(min_value=120, max_value=1e7))
def test_a_long_duration_can_be_read_back(value: float) -> None:
    text = units.seconds(value)
    first, unit, second, _ = text.split()
    whole = int(first) * 3600 + int(second) * 60 if unit == "h" else int(first) * 60 + int(second)
    assert 0 <= value - whole < (60 if unit == "h" else 1)


@given(st.floats(), st.sampled_from([units.seconds, units.bytes_, units.count, units.percent, units.ratio]))
def test_every_figure_has_a_text_without_an_exponent(value: float, text_of) -> None:
    assert not re.search(r"\de[+-]", text_of(value))
