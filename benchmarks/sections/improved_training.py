"""The siblings' trainings: their bound by step, how far it jumps, and the importance sampler's weights."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.sections.improved_siblings import Sibling
from fastsample.evaluate import Figure
from fastsample.evaluate.distances import figure
from fastsample.storage.pickles import load_pickle

CURVES = ("hybrid", "vlb", "vlb-importance")
BOUND, SPREAD, PROBABILITY = "bound", "spread", "probability"
_DRAWS, _BLOCK, _EVERY = 1000, 50, 10


@dataclass(frozen=True)
class TrainingRow:
    """A number of a training.

    Attributes:
        model, digest: as in BitsRow.
        what: "bound", T L_t in bits per dimension, the mean of a batch and of 50 steps; "spread", of the loss from one
            step to the next; "probability", of a timestep, as a multiple of the uniform one.
        x: the step, the number of steps, or the timestep.
        value, low, high: the interval, from 5 to 95 %, is the spread's.
    """

    model: str
    digest: str
    what: str
    x: int
    value: float
    low: float
    high: float


def measured(sibling: Sibling) -> Iterator[TrainingRow]:
    """All rows of a training."""
    name, digest = sibling.name, sibling.digest
    # With the hybrid loss the files hold lambda T L_t, lambda = 0.001.
    scale = 1000.0 if name == "hybrid" else 1.0
    for row in _read(sibling, "loss.csv"):
        yield TrainingRow(name, digest, BOUND, int(row["step"]), scale * float(row["vb"]), np.nan, np.nan)
    history = load_pickle(sibling.folder / "checkpoint.pt", torch.device("cpu"))["history"]
    bound = history[:, 2].double().numpy()
    last = bound[-(len(bound) // 3) :]
    yield TrainingRow(name, digest, SPREAD, len(bound), *spread(last))
    if (sibling.folder / "timesteps.csv").is_file():
        probabilities = np.array([float(row["probability"]) for row in _read(sibling, "timesteps.csv")])
        for t in range(0, len(probabilities), _EVERY):
            mean = float(probabilities[t : t + _EVERY].mean()) * len(probabilities)
            yield TrainingRow(name, digest, PROBABILITY, t, mean, np.nan, np.nan)


def spread(losses: NDArray[np.float64]) -> Figure:
    """By how much the logarithm of a loss jumps: its standard deviation, without what it falls in the long run.

    It is that of the differences of neighbours, by sqrt(2), as if neighbours were independent. The interval is a
    bootstrap's over blocks of 50 steps, less in a short run.
    """
    jumps = np.diff(np.log(losses)) / np.sqrt(2)
    size = min(_BLOCK, -(-len(jumps) // 10))
    blocks = np.lib.stride_tricks.sliding_window_view(jumps, size)
    chosen = np.random.default_rng(0).integers(len(blocks), size=(_DRAWS, -(-len(jumps) // size)))
    drawn = [blocks[index].std() for index in chosen]
    return figure(float(jumps.std()), torch.tensor(drawn))


def _read(sibling: Sibling, file: str) -> Iterator[dict[str, str]]:
    with (sibling.folder / file).open(newline="") as lines:
        yield from csv.DictReader(lines)
