"""Distances of sets of features against closed forms in float64, and their bootstrap."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastsample.evaluate.distances import Real, figure, mean, median, nearest, radii, resamples

N, D, DRAWS = 4000, 8, 60


def normals(count: int, seed: int, dimensions: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, dimensions, generator=generator, dtype=torch.float64)


def of_moments(points: Tensor, centre: Tensor, covariance: Tensor) -> Tensor:
    """The points moved so that their sample mean and covariance are exactly these."""
    whitened = torch.linalg.solve_triangular(
        torch.linalg.cholesky(points.T.cov()), (points - points.mean(0)).T, upper=False
    )
    return (torch.linalg.cholesky(covariance) @ whitened).T + centre


def test_frechet_distance_is_that_of_gaussians_of_these_moments() -> None:
    """With commuting covariances it is |m - m'|^2 + sum (sqrt(a) - sqrt(b))^2 over their eigenvalues."""
    basis, _ = torch.linalg.qr(normals(D, 1))
    a, b = torch.linspace(0.5, 4, D, dtype=torch.float64), torch.linspace(3, 1, D, dtype=torch.float64)
    centre = torch.linspace(-1, 2, D, dtype=torch.float64)
    first = of_moments(normals(300, 2), torch.zeros(D), basis @ a.diag() @ basis.T)
    second = of_moments(normals(200, 3), centre, basis @ b.diag() @ basis.T)
    expected = float(centre.square().sum() + (a.sqrt() - b.sqrt()).square().sum())
    found = Real(first).frechet_distance(second, resamples(200, DRAWS, 0))
    # Square roots of eigenvalues whose rounding is about 1e-15 of the largest.
    assert found.value == pytest.approx(expected, rel=1e-9)
    assert found.low < found.value < found.high


def test_kernel_distance_is_the_sum_over_pairs_of_different_points() -> None:
    real, samples = normals(30, 4), normals(20, 5) + 0.5
    scale = float(real.square().sum(1).mean())

    def over_pairs(x: Tensor, y: Tensor, same: bool) -> float:
        values = [
            (float(a @ b) / scale + 1) ** 3 for i, a in enumerate(x) for j, b in enumerate(y) if not same or i != j
        ]
        return math.fsum(values) / len(values)

    expected = over_pairs(real, real, True) + over_pairs(samples, samples, True) - 2 * over_pairs(real, samples, False)
    found = Real(real).kernel_distance(samples, resamples(20, DRAWS, 0))
    assert found.value == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    """Unbiased at any count: its mean over 200 pairs of sets lies within 4 standard errors of 0."""
    values = []
    for seed in range(200):
        points = normals(60, 100 + seed, 3)
        values.append(Real(points[:40]).kernel_distance(points[40:], resamples(20, 2, 0)).value)
    every = torch.tensor(values)
    assert abs(float(every.mean())) < 4 * float(every.std()) / len(values) ** 0.5
    assert (every < 0).any()  # a biased one, a mean of squares, never is


def test_the_interval_covers_what_other_samples_give() -> None:
    """Nine of ten: of 100 other sets 80 to 99 lie in the interval of a first set of the usual size.

    100 trials at 0.9 have a standard deviation of 3, and the interval's own ends are off by about as much.
    """
    real = Real(normals(N, 7))
    low, high = 0.0, 0.0
    for seed in range(4):
        found = real.frechet_distance(normals(400, 20 + seed) + 0.5, resamples(400, DRAWS, seed))
        low, high = low + (found.low - found.value) / 4, high + (found.high - found.value) / 4
    others = torch.tensor(
        [real.frechet_distance(normals(400, 200 + seed) + 0.5, resamples(400, 2, 0)).value for seed in range(100)]
    )
    centre = float(others.mean())
    covered = float(((others > centre + low) & (others < centre + high)).double().mean())
    assert 0.8 <= covered <= 0.99


def test_precision_and_recall_tell_quality_from_variety() -> None:
    left, right = normals(200, 9, 2), normals(200, 10, 2) + 50
    real = Real(torch.cat([left, right]))
    one_kind = real.coverage(normals(200, 11, 2), 0, DRAWS)
    assert one_kind.precision.value > 0.8 and 0.4 < one_kind.recall.value < 0.5
    nonsense = real.coverage(normals(200, 12, 2) + 1000, 0, DRAWS)
    assert nonsense.precision.value == nonsense.recall.value == 0
    itself = real.coverage(real.features, 0, DRAWS)
    assert itself.precision == itself.recall == (1, 1, 1)


def test_radii_and_nearest_on_a_line() -> None:
    line = torch.tensor([[0.0], [1.0], [3.0], [7.0], [8.0]])
    assert radii(line.double()).tolist() == [7, 6, 4, 6, 7]
    assert nearest(line, line).tolist() == [0, 0, 0, 0, 0]
    assert nearest(line, line, same=True).tolist() == [1, 1, 2, 1, 1]
    assert nearest(torch.tensor([[5.5]]), line).tolist() == [1.5]


def test_resamples_are_those_of_the_seed() -> None:
    assert torch.equal(resamples(50, 3, 1), resamples(50, 3, 1))
    assert not torch.equal(resamples(50, 3, 1), resamples(50, 3, 2))


def test_figures() -> None:
    values = torch.arange(101.0)
    drawn = torch.arange(101)[None].expand(4, -1)
    assert mean(values, drawn) == median(values, drawn) == (50, 50, 50)
    moved = figure(3.0, torch.tensor([10.0, 20.0, 30.0]))
    assert moved == (3.0, pytest.approx(3 - 9), pytest.approx(3 + 9))
