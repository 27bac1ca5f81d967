import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest

from dpctl import registry
from dpctl.bench.metrics import Drawn, Figure, LeftOut, fid, kid, psnr, ssim
from dpctl.bench.metrics._features import FeatureSpace, Statistics
from dpctl.bench.quality import METRICS, judge
from dpctl.bench.result import difference
from dpctl.errors import DpctlError


def pictures(seed: int, count: int = 40, size: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, size=(count, size, size, 1), dtype=np.uint8)


NUMBERS = itertools.count()


class Given(FeatureSpace):
    """A space whose features are the pictures' own rows: for oracles."""

    def __init__(self, real: np.ndarray) -> None:
        super().__init__(Path(str(next(NUMBERS))), Path(), "")
        statistics = Statistics(real.mean(0), np.cov(real, rowvar=False), len(real), real)
        self.__dict__["statistics"] = statistics


def drawn(features: np.ndarray, real: np.ndarray) -> Drawn:
    found = Drawn(np.zeros((len(features), 1, 1, 1), np.uint8), None, Given(real))
    found.__dict__["features"] = features
    return found


@pytest.mark.parametrize("name", registry.names(METRICS))
def test_a_metric_keeps_the_contract(name: str, toy_space: FeatureSpace, toy_clip: Path) -> None:
    module = registry.load(METRICS, name, "metric")
    drawn = Drawn(pictures(0), pictures(1), toy_space, ("a cat", "a tab") * 20, toy_clip)
    found = module.measure(drawn)
    assert isinstance(found, Figure)
    assert found.better == module.BETTER
    assert found.better in ("lower", "higher")
    assert found.low <= found.value <= found.high
    assert found.count == 40
    assert found.replicates
    assert module.measure(drawn) == found


def test_ssim_of_constant_pictures_is_the_formula() -> None:
    one, other = (np.full((3, 12, 12, 1), value, np.uint8) for value in (51, 204))
    a, b, c1 = 0.2, 0.8, 0.01**2
    assert ssim.per_image(one, other) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1))


def test_ssim_of_the_same_pictures_is_one() -> None:
    found = ssim.measure(Drawn(pictures(0), pictures(0)))
    assert (found.value, found.low, found.high) == pytest.approx((1, 1, 1))


def test_psnr_is_the_mean_of_each_pictures_own() -> None:
    one = np.zeros((2, 4, 4, 3), np.uint8)
    other = one.copy()
    other[0] += 5  # a mean squared error of 25
    other[1, :2] += 20  # of 400 in half of the picture
    expected = [10 * np.log10(255**2 / 25), 10 * np.log10(255**2 / 200)]
    assert psnr.per_image(one, other) == pytest.approx(expected)
    found = psnr.measure(Drawn(one, other))
    assert found.value == pytest.approx(np.mean(expected))
    assert (found.low, found.high) == pytest.approx((min(expected), max(expected)))  # of two: both, or one twice


def test_psnr_of_the_same_pictures_is_finite_and_beaten_by_none() -> None:
    other = pictures(0, size=32)
    other[0, 0, 0, 0] ^= 1  # finer than what rounding to bytes does to a picture
    found = psnr.measure(Drawn(pictures(0, size=32), other))
    assert (found.value, found.low, found.high) == pytest.approx((58.922,) * 3, abs=1e-3)


def test_fid_of_gaussians_is_the_formula() -> None:
    # Of two diagonal covariances: |m - m'|^2 + sum (s - s')^2
    mean, deviation = np.array([1.0, -2.0]), np.array([2.0, 0.5])
    found = fid.distance(np.zeros(2), fid.matrix_root(np.eye(2)), mean, np.diag(deviation**2))
    assert found == pytest.approx(5.0 + 1.0 + 0.25)


def test_fid_agrees_with_torchmetrics() -> None:
    import torch
    from torchmetrics.image.fid import _compute_fid

    features, real = np.random.default_rng(0).normal(size=(2, 200, 12)) @ np.random.default_rng(1).normal(size=(12, 12))
    sides = [(torch.tensor(rows.mean(0)), torch.tensor(np.cov(rows, rowvar=False))) for rows in (features, real)]
    assert fid.measure(drawn(features, real)).value == pytest.approx(
        float(_compute_fid(*sides[0], *sides[1])), rel=1e-6
    )


def test_fid_of_the_real_images_themselves_is_zero() -> None:
    real = np.random.default_rng(0).normal(size=(100, 5))
    assert fid.measure(drawn(real, real)).value == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("count", [40, 5])  # with five samples of six features the covariance is singular
def test_contributions_to_the_fid_are_its_derivative(count: int) -> None:
    generator = np.random.default_rng(0)
    rows, real = generator.normal(0.3, 1.0, size=(count, 6)), generator.normal(size=(200, 6))
    mean, root = real.mean(0), fid.matrix_root(np.cov(real, rowvar=False))
    direction = generator.normal(size=count)
    direction -= direction.mean()

    def weighted(step: float) -> float:
        weights = 1 + step * direction
        own = weights @ rows / count
        return fid.distance(mean, root, own, (rows - own).T @ ((rows - own) * weights[:, None]) / (count - 1))

    assert weighted(0) == pytest.approx(fid.distance(mean, root, *fid.moments(rows)))
    slope = (weighted(1e-3) - weighted(-1e-3)) / 2e-3
    found = fid.contributions(rows, mean, root)
    assert found @ direction / count == pytest.approx(slope, rel=1e-3)
    assert found.mean() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count", [100, 10])
def test_fids_interval_is_about_as_wide_as_its_error(count: int) -> None:
    generator = np.random.default_rng(0)
    real = generator.normal(size=(4000, 16))
    found = [fid.measure(drawn(generator.normal(0.3, 1.0, size=(count, 16)), real)) for _ in range(150)]
    scatter = np.std([figure.value for figure in found])
    widths = np.mean([figure.high - figure.low for figure in found])
    assert 0.8 < widths / (2 * 1.96 * scatter) < 1.4


def test_kid_is_the_mean_over_all_pairs() -> None:
    rows, real = np.random.default_rng(0).normal(size=(2, 9, 4))

    def kernel(x: np.ndarray, y: np.ndarray) -> float:
        return float((x @ y / 4 + 1) ** 3)

    def among(points: np.ndarray) -> float:
        return float(np.mean([kernel(x, y) for i, x in enumerate(points) for j, y in enumerate(points) if i != j]))

    between = float(np.mean([kernel(x, y) for x in rows for y in real]))
    assert kid.measure(drawn(rows, real)).value == pytest.approx(among(rows) + among(real) - 2 * between)


def test_kid_is_unbiased_and_its_interval_as_wide_as_its_error() -> None:
    generator = np.random.default_rng(0)
    real = generator.normal(size=(400, 4))
    found = [kid.measure(drawn(generator.normal(0.3, 1.0, size=(60, 4)), real)) for _ in range(100)]
    values = np.array([figure.value for figure in found])
    # The same distance from forty times as many samples.
    truth = kid.measure(drawn(generator.normal(0.3, 1.0, size=(2500, 4)), real)).value
    assert abs(values.mean() - truth) < 4 * values.std() / np.sqrt(len(values)) + 0.01
    widths = np.mean([figure.high - figure.low for figure in found])
    assert 0.7 < widths / (2 * 1.96 * values.std()) < 1.3


def test_blocks_of_rows_give_the_same_kernel_means(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.random.default_rng(0).normal(size=(11, 3))
    whole = kid.mean_kernel(rows, rows, exclude_self=True)
    monkeypatch.setattr(kid, "ROWS", 4)
    assert kid.mean_kernel(rows, rows, exclude_self=True) == pytest.approx(whole)


def test_a_model_does_not_differ_from_itself(toy_space: FeatureSpace) -> None:
    found = fid.measure(Drawn(pictures(0), None, toy_space))
    apart = difference(found, found)
    assert apart is not None
    assert (apart.value, apart.low, apart.high) == (0, 0, 0)
    assert difference(found, dataclasses.replace(found, count=39)) is None


def test_a_model_that_draws_one_picture_over_and_over_has_finite_figures(toy_space: FeatureSpace) -> None:
    same = pictures(0, count=1).repeat(40, axis=0)
    figures, _ = judge(Drawn(same, same, toy_space))
    assert set(figures) == {"fid", "kid", "psnr", "ssim"}
    for found in figures.values():
        assert np.isfinite([found.value, found.low, found.high, *found.replicates]).all()
        assert found.low == pytest.approx(found.high)


def test_what_does_not_apply_is_left_out_with_its_reason(toy_space: FeatureSpace) -> None:
    figures, left_out = judge(Drawn(pictures(0, size=12), pictures(1, size=12), toy_space))
    assert set(figures) == {"psnr", "ssim"}
    assert left_out["fid"] == left_out["kid"] == "the feature network takes 1x8x8 images, the model draws 1x12x12"
    figures, left_out = judge(Drawn(pictures(0), None, None))
    assert figures == {}
    assert "no feature network" in left_out["fid"]
    assert "baseline" in left_out["ssim"] == left_out["psnr"]
    figures, left_out = judge(Drawn(pictures(0), pictures(0, size=12)))
    assert left_out["ssim"] == left_out["psnr"] == "the baseline draws (12, 12, 1), this model (8, 8, 1)"


def test_kid_is_left_out_without_features_of_real_images(toy_space: FeatureSpace, tmp_path: Path) -> None:
    with np.load(toy_space.statistics_file) as archive:
        np.savez(tmp_path / "s.npz", **{name: archive[name] for name in ("mean", "covariance", "count")})
    space = FeatureSpace(toy_space.network, tmp_path / "s.npz", "")
    figures, left_out = judge(Drawn(pictures(0), None, space))
    assert set(figures) == {"fid"}
    assert "no features" in left_out["kid"]


def test_one_sample_is_too_few(toy_space: FeatureSpace) -> None:
    for metric in (fid, kid):
        with pytest.raises(LeftOut, match="two samples"):
            metric.measure(Drawn(pictures(0, count=1), None, toy_space))


@pytest.mark.parametrize("content", [b"", b"not an archive", b"PK\x03\x04broken"])
def test_damaged_files_of_the_features_are_refused(content: bytes, toy_space: FeatureSpace, tmp_path: Path) -> None:
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(DpctlError, match="statistics"):
        fid.measure(Drawn(pictures(0), None, FeatureSpace(toy_space.network, tmp_path / "broken", "")))
    with pytest.raises(DpctlError, match="network"):
        fid.measure(Drawn(pictures(0), None, FeatureSpace(tmp_path / "broken", toy_space.statistics_file, "")))


def test_statistics_of_another_network_are_refused(toy_space: FeatureSpace, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", mean=np.zeros(3), covariance=np.eye(3), count=5)
    with pytest.raises(DpctlError, match="not of this feature network"):
        fid.measure(Drawn(pictures(0), None, FeatureSpace(toy_space.network, tmp_path / "s.npz", "")))
