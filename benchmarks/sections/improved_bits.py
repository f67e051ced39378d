"""Bits per dimension of held-out digits under the sibling models, and the bound's terms by timestep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import fastsample
from benchmarks.sections.improved_siblings import Sibling
from benchmarks.sections.quality_rows import HELD_OUT
from fastsample.evaluate import Figure
from fastsample.evaluate.distances import mean, resamples
from fastsample.train import load_data

DRAWS = 1000
_BINS = 60
_SHORT, _BATCH, _SMALL_BATCH = 100, 100, 32  # what is remembered of a batch stays below 250 MB


@dataclass(frozen=True)
class BitsCase:
    """The bound of the first `count` held-out digits, on a process of so many steps, for some variances."""

    model: str
    variances: tuple[str, ...]
    steps: int
    count: int

    def image_calls(self) -> int:
        """One model call serves all variances."""
        return self.steps * self.count


@dataclass(frozen=True)
class BitsRow:
    """One variance of a case.

    Attributes:
        model, digest: the sibling, and the first letters of its weights' SHA-256.
        variance, steps, count, seed: of the process, and how many digits.
        bits, low, high: their mean, and its interval from 5 to 95 % over digits.
        each: the bits of every digit, for differences of two rows digit by digit.
        terms: where the process has all T steps, the bound's term at t: means over the timesteps of `bins`.
    """

    model: str
    digest: str
    variance: str
    steps: int
    count: int
    seed: int
    bits: float
    low: float
    high: float
    each: str
    terms: str


def measured(case: BitsCase, sibling: Sibling, seed: int) -> Iterator[BitsRow]:
    """The rows of a case."""
    model, data = sibling.load(), load_data(HELD_OUT)
    assert data.labels is not None
    batch = _BATCH if case.steps <= _SHORT else _SMALL_BATCH
    if len(case.variances) == 1:
        batch = _BATCH
    found: dict[str, list[fastsample.BitsPerDimension]] = {variance: [] for variance in case.variances}
    for start in range(0, case.count, batch):
        index = torch.arange(start, min(start + batch, case.count))
        remembered = _Remembered(model, keep=len(case.variances) > 1)
        for variance in case.variances:
            remembered.rewind()
            bound = fastsample.nll(
                remembered,
                data.scaled(index),
                steps=case.steps,
                schedule=model.schedule,
                variance=variance,
                prediction=model.config.prediction,
                seed=seed,
                index=start,
                model_kwargs={"y": data.labels[index]},
            )
            found[variance].append(bound)
    for variance, parts in found.items():
        each = torch.cat([bound.total_bpd for bound in parts])
        whole = case.steps == model.schedule.T
        terms = torch.cat([bound.vb for bound in parts]).mean(0).flip(0).tolist()
        yield BitsRow(
            sibling.name,
            sibling.digest,
            variance,
            case.steps,
            case.count,
            seed,
            *mean(each, resamples(len(each), DRAWS, seed)),
            _joined(each.tolist()),
            _joined(binned(terms)) if whole else "",
        )


class _Remembered:
    """A model whose answers are kept: the bound of another variance asks the same again, in the same order."""

    def __init__(self, model: fastsample.zoo.UNet, *, keep: bool) -> None:
        self._model, self._keep = model, keep
        self._outputs: list[Tensor] = []
        self._next = 0

    def rewind(self) -> None:
        self._next = 0

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        if not self._keep:
            return self._output(x, t, y)
        if self._next == len(self._outputs):
            self._outputs.append(self._output(x, t, y))
        self._next += 1
        return self._outputs[self._next - 1]

    def _output(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        output: Tensor = self._model(x, t, y)
        return output


def bins(T: int) -> NDArray[np.int64]:
    """Where each bin of timesteps begins, and T: single ones at first, wider and wider ones later."""
    return np.concatenate([[0], np.unique(np.geomspace(1, T, _BINS).round().astype(np.int64))])


def binned(terms: Sequence[float]) -> list[float]:
    """Means over the bins of a term for each t."""
    edges = bins(len(terms))
    return [float(np.mean(terms[low:high])) for low, high in pairwise(edges)]


def difference(left: NDArray[np.float64], right: NDArray[np.float64]) -> Figure:
    """left - right on average, digit by digit: both were measured on the same digits with the same noise."""
    values = torch.from_numpy(left - right)
    return mean(values, resamples(len(values), DRAWS, 0))


def numbers(text: str) -> NDArray[np.float64]:
    """A cell of many numbers."""
    return np.array(text.split(), dtype=np.float64)


def _joined(values: Sequence[float]) -> str:
    return " ".join(f"{value:.5g}" for value in values)
