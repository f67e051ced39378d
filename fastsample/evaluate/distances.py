"""How far samples lie from a reference: distances of two sets of features, each with a bootstrap interval.

The interval is that of the samples: they are drawn again, with repeats, and the reference stays. So it says what other
noise would have given, for points that are compared under one reference. Repeats make most figures larger; the spread
of the drawn ones is therefore put around the figure itself (value + percentiles - mean).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NEIGHBOURS = 3
_COVERED = (0.05, 0.95)
_ROWS = 1000  # of a matrix of distances at a time


class Figure(NamedTuple):
    """A measured value, and the interval in which nine of ten repetitions with other noise lie."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} ({self.low:.4g} .. {self.high:.4g})"


def resamples(count: int, draws: int, seed: int) -> Tensor:
    """Which of `count` samples each bootstrap draw takes: int64 (draws, count). The same seed gives the same ones."""
    return torch.randint(count, (draws, count), generator=torch.Generator().manual_seed(seed))


def figure(value: float, drawn: Tensor) -> Figure:
    """A value with the interval from 5 to 95 % of its bootstrap draws, which are moved so that it is their mean."""
    moved = drawn.double() - drawn.double().mean() + value
    low, high = moved.quantile(torch.tensor(_COVERED, dtype=torch.float64)).tolist()
    return Figure(value, low, high)


def mean(values: Tensor, drawn: Tensor) -> Figure:
    """The mean of (N,) values, of which `drawn` are the resamples."""
    values = values.double()
    return figure(float(values.mean()), values[drawn].mean(1))


def median(values: Tensor, drawn: Tensor) -> Figure:
    """The median of (N,) values."""
    values = values.double()
    return figure(float(values.quantile(0.5)), values[drawn].quantile(0.5, dim=1))


class Coverage(NamedTuple):
    """Precision and recall."""

    precision: Figure
    recall: Figure


class Real:
    """Features of real images, (M, D) with M > 3, and what is worked out of them once for any number of samples.

    Every distance takes samples (N, D) and is computed in float64. `drawn` are resamples of them.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = features.double()

    def frechet_distance(self, samples: Tensor, drawn: Tensor) -> Figure:
        """|m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)) of both means and covariances (Heusel et al. 2017).

        It is biased: between two sets of one distribution it falls with N, so that only figures of equal N compare.
        """
        samples = samples.double()
        values = [self._frechet(samples[index]) for index in (torch.arange(len(samples)), *drawn)]
        return figure(values[0], torch.tensor(values[1:]))

    def kernel_distance(self, samples: Tensor, drawn: Tensor) -> Figure:
        """The squared maximum mean discrepancy under the kernel (x.y / s + 1)^3 (Binkowski et al. 2018), unbiased.

        They divide by s = D, for features whose mean square is about 1; here s is the real ones' mean |x|^2. With
        samples of the real distribution its mean is 0 for any N, so that figures of few samples compare too; it can be
        negative. No pair of a sample and itself counts, also where a resample holds a sample twice.
        """
        samples, count = samples.double(), len(samples)
        among, across = self._kernel(samples, samples).fill_diagonal_(0), self._kernel_means(samples)
        drawn_weights = (index.bincount(minlength=count) for index in drawn)
        weights = torch.stack([torch.ones(count, dtype=torch.int64), *drawn_weights]).double()
        pairs = count**2 - weights.square().sum(1)
        values = (weights @ among * weights).sum(1) / pairs + self._kernel_mean - 2 * (weights @ across) / count
        return figure(float(values[0]), values[1:])

    def coverage(self, samples: Tensor, seed: int, draws: int) -> Coverage:
        """How many samples look real, and how much of what is real they cover (Kynkaanniemi et al. 2019).

        A set's region is every place that is at most as far from one of its members as that one's 3rd nearest neighbour
        in the set. Precision is the share of samples in the real images' region, recall that of real images in the
        samples'. Regions stay in the bootstrap: of precision the samples are drawn again, of recall the real images.
        """
        realistic = _in_region(samples.double(), self.features, self._radii)
        covered = _in_region(self.features, samples.double(), radii(samples.double()))
        return Coverage(
            mean(realistic, resamples(len(samples), draws, seed)), mean(covered, resamples(len(covered), draws, seed))
        )

    @cached_property
    def _metric(self) -> Any:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(_Given(self.features.shape[1]), reset_real_features=False)
        metric.update(self.features, real=True)
        return metric

    def _frechet(self, samples: Tensor) -> float:
        self._metric.reset()
        self._metric.update(samples, real=False)
        return float(self._metric.compute())

    def _kernel(self, rows: Tensor, others: Tensor) -> Tensor:
        from torchmetrics.image.kid import poly_kernel

        return poly_kernel(rows, others, gamma=1 / self._square)

    def _kernel_means(self, points: Tensor) -> Tensor:
        return torch.cat([self._kernel(rows, self.features).mean(1) for rows in points.split(_ROWS)])

    @cached_property
    def _square(self) -> float:
        # Where all features are 0, any scale tells samples apart.
        return float(self.features.square().sum(1).mean()) or 1.0

    @cached_property
    def _kernel_mean(self) -> float:
        """Over all pairs of two different real images."""
        count = len(self.features)
        own = (self.features.square().sum(1) / self._square + 1).pow(3)
        return float((self._kernel_means(self.features).sum() * count - own.sum()) / (count * (count - 1)))

    @cached_property
    def _radii(self) -> Tensor:
        return radii(self.features)


class _Given(nn.Identity):
    """A network, to torchmetrics, whose input is features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def radii(features: Tensor) -> Tensor:
    """The distance of each of (N, D) to its 3rd nearest neighbour: (N,)."""
    # The nearest of all is a member itself.
    parts = [torch.cdist(rows, features).kthvalue(NEIGHBOURS + 1, dim=1).values for rows in features.split(_ROWS)]
    return torch.cat(parts)


def _in_region(points: Tensor, members: Tensor, radius: Tensor) -> Tensor:
    return torch.cat([(torch.cdist(rows, members) <= radius).any(1) for rows in points.split(_ROWS)])


def nearest(points: Tensor, members: Tensor, *, same: bool = False) -> Tensor:
    """The distance of each of (N, D) points to the nearest of (M, D) members: (N,), in float64.

    Args:
        same: they are one set, and no member is its own neighbour.
    """
    # The product by which cdist works finds the nearest one, but leaves about 1e-7 of a distance that is 0.
    points, members, place = points.double(), members.double(), 2 if same else 1
    found = torch.cat([torch.cdist(rows, members).kthvalue(place, dim=1).indices for rows in points.split(_ROWS)])
    return (points - members[found]).norm(dim=1)
