import numpy as np
import pytest

from dpctl.bench import compare


def test_p99_needs_a_thousand_observations() -> None:
    assert compare.percentiles(range(999)).p99 is None
    found = compare.percentiles(range(1001))
    assert (found.p50, found.p90, found.p99, found.count) == (500, 900, 990, 1001)


def test_a_drift_that_both_share_leaves_the_ratio_alone() -> None:
    drift = np.geomspace(1, 3, 20)
    found = compare.paired_ratio(2 * drift, drift)
    assert (found.value, found.low, found.high, found.count) == (2, 2, 2, 20)
    assert not found.holds(1)


def test_a_subject_does_not_differ_from_itself() -> None:
    noise = np.random.default_rng(5).lognormal(0, 0.1, size=(2, 30))
    assert compare.paired_ratio(*noise).holds(1.0)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    draws = np.random.default_rng(0).lognormal(np.log(1.5), 0.2, size=(300, 20))
    covered = sum(compare.paired_ratio(draw, np.ones(20)).holds(1.5) for draw in draws)
    assert 0.89 <= covered / 300 <= 0.99


def test_the_same_values_give_the_same_interval() -> None:
    values = np.random.default_rng(0).uniform(1, 2, size=12)
    assert compare.paired_ratio(values, np.ones(12)) == compare.paired_ratio(values, np.ones(12))


def test_resamples_of_as_many_samples_are_the_same_draws() -> None:
    counts = compare.resample_counts(7, 5)
    assert counts.shape == (5, 7)
    assert (counts.sum(1) == 7).all()
    assert (counts == compare.resample_counts(7, 5)).all()


def test_the_spread_is_the_quartiles_over_the_median() -> None:
    assert compare.relative_spread([1, 2, 3, 4, 5]) == pytest.approx(2 / 3)
