"""Where a run starts: Frechet distance over the first timestep, the spacing from there and the number of model calls.

Every point has the same noise, the same balanced labels and the same number of samples, so that points of one model can
be compared far below the distance's own noise. Samples are kept as features, and a run that is interrupted goes on where
it was:

    python -m benchmarks.starts                                  the bundled model
    python -m benchmarks.starts --model linear=linear.safetensors --calls 4,8
"""

from __future__ import annotations

import csv
import hashlib
import sys
import time
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsample
from fastsample import DDIM, DDPM, DPMSolver, Euler, Heun, Sampler, Schedule
from fastsample.caller import warn
from fastsample.samplers.solver import Solver
from fastsample.storage.writing import replace_text

Features = Callable[[Tensor], Tensor]

CALLS = (1, 2, 3, 4, 5, 6, 8, 10, 20, 50)
RATIOS = (1.5, 3.0, 6.0, 12.0, 24.0, 48.0, 96.0, 1e9)  # sigma / alpha at the starts that are tried
BATCH, RESAMPLES = 100, 100
BEFORE = {"ddim": "leading", "dpm_solver": "linspace", "euler": "linspace", "heun": "linspace", "ddpm": "respaced"}
SAMPLERS: dict[str, Callable[..., Sampler]] = {
    "ddim": DDIM,
    "dpm_solver": DPMSolver,
    "euler": Euler,
    "heun": Heun,
    "ddpm": DDPM,
}


@dataclass(frozen=True)
class Point:
    """One run: which sampler, from which timestep, how it goes on from there.

    Attributes:
        spacing: "trailing" round((1 - k / N) (t + 1)) - 1 and "linspace", evenly from t to 0, where t is `start`; else
            a name that the sampler knows.
        start: the first timestep; empty where the name decides.
        calls: rows of the sampler; for heun its steps, of two calls each but the last.
        clip: empty for none.
    """

    model: str
    sampler: str
    spacing: str
    start: int | str
    calls: int
    clip: float | str

    def made(self, schedule: Schedule) -> Sampler:
        """The sampler."""
        options: dict[str, Any] = {"clip": self.clip or None}
        if self.sampler == "ddpm":
            options["variance"] = "learned_range"
        if self.start == "":
            return SAMPLERS[self.sampler](schedule, steps=self.calls, timesteps=self.spacing, **options)
        return SAMPLERS[self.sampler](schedule, timesteps=grid(self.spacing, int(self.start), self.calls), **options)


@dataclass(frozen=True)
class Row(Point):
    """What a point gave.

    Attributes:
        first: the timestep that it started from, with `ratio` its sigma / alpha.
        samples: how many there are.
        distance: the Frechet distance to all real digits, with an interval of 95 % from resampled samples.
        more, more_low, more_high: the distance less that of the default that was before, resampled together.
        right: the share of samples whose label the classifier reads.
    """

    first: float
    ratio: float
    samples: int
    distance: float
    low: float
    high: float
    more: float
    more_low: float
    more_high: float
    right: float


def grid(spacing: str, start: int, calls: int) -> list[int]:
    """The timesteps of a spacing from a start."""
    if spacing == "trailing":
        return [round((1 - k / calls) * (start + 1)) - 1 for k in range(calls)]
    return [round(t) for t in np.linspace(start, 0, calls).tolist()] if calls > 1 else [start]


def starts_of(schedule: Schedule, calls: int) -> list[int]:
    """The noisiest timesteps with at most each of RATIOS, where so many calls fit below them."""
    abar = schedule.alphas_cumprod
    ratio = np.sqrt((1 - abar) / np.maximum(abar, 1e-300))
    found = {int(np.flatnonzero(ratio <= most)[-1]) for most in RATIOS}
    return sorted((start for start in found if start >= calls), reverse=True)


def points_of(name: str, schedule: Schedule, samplers: Sequence[str], calls: Sequence[int]) -> Iterator[Point]:
    """Every point of a model, those of few calls first."""
    for count in calls:
        for sampler in samplers:
            if not (sampler == "dpm_solver" and count == schedule.T):
                yield Point(name, sampler, BEFORE[sampler], "", count, 1.0)
            yield Point(name, sampler, "auto", "", count, 1.0)
            if sampler == "ddim":
                yield Point(name, sampler, "auto", "", count, "")
            for start in starts_of(schedule, count):
                yield Point(name, sampler, "trailing", start, count, 1.0)
                if count in (4, 10) and sampler == "ddim":
                    yield Point(name, sampler, "linspace", start, count, 1.0)
                    yield Point(name, sampler, "trailing", start, count, "")


class Judge:
    """Samples the points of one model, and measures them against real digits."""

    def __init__(self, model: Any, features: Features, read: Features, real: NDArray[Any], kept: Path, count: int):
        self.model, self.features, self.read, self.kept, self.count = model, features, read, kept, count
        self.real = moments(real)
        chosen = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
        self.resampled = [np.bincount(one, minlength=count) / count for one in chosen]
        self._spread: dict[Point, NDArray[Any]] = {}

    def features_of(self, point: Point) -> NDArray[Any]:
        """Of the point's samples, shape (count, 65): the features and whether the label is read."""
        name = "-".join(str(value) for value in asdict(point).values())
        path = self.kept / f"{name}-{self.count}.npy"
        if not path.is_file():
            found = self._sample(point)
            path.parent.mkdir(parents=True, exist_ok=True)
            np.save(path.with_suffix(".part.npy"), found)
            path.with_suffix(".part.npy").replace(path)
        kept: NDArray[Any] = np.load(path).astype(np.float64)
        return kept

    @torch.no_grad()
    def _sample(self, point: Point) -> NDArray[Any]:
        sampler, found = point.made(self.model.schedule), []
        for start in range(0, self.count, BATCH):
            y = torch.arange(start, min(start + BATCH, self.count)) % 10
            shape = (len(y), 1, 28, 28)
            x = fastsample.ops.randn(shape, seed=5, index=start)
            images = sampler(self.model, x, seed=6, index=start, model_kwargs={"y": y}).clamp(-1, 1)
            found.append(torch.cat([self.features(images), (self.read(images) == y)[:, None].float()], 1))
        return torch.cat(found).numpy().astype(np.float32)

    def distances(self, point: Point) -> NDArray[Any]:
        """The point's distance, then those of its resamples."""
        if point not in self._spread:
            found = self.features_of(point)[:, :-1]
            weights = [np.full(self.count, 1 / self.count), *self.resampled]
            self._spread[point] = np.array([distance(moments(found, w), self.real) for w in weights])
        return self._spread[point]

    def row(self, point: Point) -> Row:
        """The point with its measures."""
        table = point.made(self.model.schedule).table
        assert table.alpha is not None and table.sigma is not None
        own = self.distances(point)
        before = Point(point.model, point.sampler, BEFORE[point.sampler], "", point.calls, 1.0)
        more = own - self.distances(before)
        return Row(
            **asdict(point),
            first=round(float(table.times[0]), 2),
            ratio=float(f"{float(table.sigma[0] / table.alpha[0]):.4g}"),
            samples=self.count,
            distance=round(float(own[0]), 2),
            low=round(float(np.quantile(own[1:] - own[1:].mean() + own[0], 0.025)), 2),
            high=round(float(np.quantile(own[1:] - own[1:].mean() + own[0], 0.975)), 2),
            more=round(float(more[0]), 2),
            more_low=round(float(np.quantile(more[1:] - more[1:].mean() + more[0], 0.025)), 2),
            more_high=round(float(np.quantile(more[1:] - more[1:].mean() + more[0], 0.975)), 2),
            right=round(float(self.features_of(point)[:, -1].mean()), 4),
        )


def moments(found: NDArray[Any], weights: NDArray[Any] | None = None) -> tuple[NDArray[Any], NDArray[Any]]:
    """Mean and covariance of weighted rows."""
    w = np.full(len(found), 1 / len(found)) if weights is None else weights
    mean = w @ found
    return mean, (found - mean).T @ ((found - mean) * w[:, None])


def distance(one: tuple[NDArray[Any], NDArray[Any]], other: tuple[NDArray[Any], NDArray[Any]]) -> float:
    """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)) (Heusel et al. 2017)."""
    values, vectors = np.linalg.eigh(one[1])
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ other[1] @ root), 0)).sum()
    return float(((one[0] - other[0]) ** 2).sum() + np.trace(one[1]) + np.trace(other[1]) - 2 * shared)
