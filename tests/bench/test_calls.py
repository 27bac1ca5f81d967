"""How often the worker calls a network: until that says enough, however long a call takes."""

from typing import Any

import pytest

from dpctl.bench import worker


@pytest.mark.parametrize(
    ("takes", "calls", "measured"),
    [
        (0.01, 11, 10),  # a tenth of a second of small ones, after one that warms up
        (0.06, 4, 3),
        (0.6, 3, 2),
        (5.0, 1, 1),
    ],
)
def test_a_turn_of_calls_is_as_long_as_it_has_to_be(
    monkeypatch: pytest.MonkeyPatch, takes: float, calls: int, measured: int
) -> None:
    made: list[float] = []

    def call(self: Any, inputs: Any) -> float:
        made.append(takes)
        return takes

    monkeypatch.setattr(worker, "random_inputs", lambda *_: {})
    monkeypatch.setattr(worker.Network, "_call", call)
    subject = worker.Network.__new__(worker.Network)
    subject._denoiser = type("Denoiser", (), {"signature": None, "config": None})()
    assert len(subject.calls(rows=1, least=3, least_s=0.1 - 1e-9)["latency_s"]) == measured
    assert len(made) == calls
