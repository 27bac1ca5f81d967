from collections.abc import Callable

import pytest

from dpctl.bench import stability
from dpctl.bench.result import BenchResult
from dpctl.bench.stability import Clock

Make = Callable[..., BenchResult]
STEADY = [1.0, 1.01, 0.99, 1.0, 1.02, 0.98, 1.0, 1.01]


def test_a_quiet_run_has_no_warnings(make_result: Make) -> None:
    result = make_result({("a", "eager"): STEADY, ("b", "eager"): STEADY}, other_processes_busy_cores=0.1)
    assert stability.warnings(result) == ()


@pytest.mark.parametrize(
    ("ours", "environment", "said"),
    [
        (STEADY, {"other_processes_busy_cores": 1.4}, "1.4 cores busy"),
        (STEADY, {"governor": "powersave"}, "powersave"),
        (STEADY[:3], {}, "--rounds"),
        ([0.5, 1.0, 0.6, 1.4, 0.5, 1.3, 0.7, 1.2], {}, "varies"),
    ],
)
def test_each_doubt_says_what_to_do(make_result: Make, ours: list[float], environment: dict, said: str) -> None:
    base = STEADY[: len(ours)]
    (warning,) = stability.warnings(make_result({("a", "eager"): base, ("b", "eager"): ours}, **environment))
    assert said in warning
    assert any(word in warning for word in ("measure", "set it"))


def test_a_drift_is_named(make_result: Make) -> None:
    slower = [1.0, 1.0, 1.0, 1.0, 1.5, 1.5, 1.5, 1.5]
    (warning,) = stability.warnings(make_result({("a", "eager"): slower, ("b", "eager"): slower}))
    assert "1.50x" in warning


def test_others_are_the_machine_less_ourselves() -> None:
    assert stability.others_busy(Clock(0, 100, 10), Clock(10, 118, 25)) == pytest.approx(0.3)
    assert stability.others_busy(None, Clock(10, 118, 25)) is None


def test_the_clocks_of_this_machine_run() -> None:
    before = stability.clock()
    sum(i * i for i in range(300_000))
    after = stability.clock([1])
    if before is None or after is None:
        pytest.skip("no /proc/stat here")
    assert after.wall_s > before.wall_s
    assert after.machine_s >= before.machine_s
