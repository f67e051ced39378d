"""How long workers idle while a set of samples is made in chunks: a simulation on measured times."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

SLOW_SHARE, SLOW_BY = 1 / 16, 3.0  # one worker in sixteen takes three times as long


def idle_share(samples: int, chunk: int, workers: int, seconds: NDArray[np.float64], seed: int, static: bool) -> float:
    """The share of all workers' time, until the last one is done, in which they do nothing.

    Args:
        samples: of the set.
        chunk: samples of a chunk.
        workers: how many there are; SLOW_SHARE of them, at least one, are slower by SLOW_BY.
        seconds: measured times of one sample, which are drawn with repeats.
        static: whether every worker has its share beforehand, or gets a chunk whenever it is free.
    """
    generator = np.random.default_rng(seed)
    sizes = [min(chunk, samples - start) for start in range(0, samples, chunk)]
    slow = np.ones(workers)
    slow[generator.permutation(workers)[: max(1, round(workers * SLOW_SHARE))]] = SLOW_BY
    costs = [float(generator.choice(seconds)) * size for size in sizes]
    busy = _beforehand(costs, slow) if static else _handed_out(costs, slow)
    return float(1 - sum(busy) / (max(busy) * workers))


def _handed_out(costs: Sequence[float], slow: NDArray[np.float64]) -> list[float]:
    """When each worker is done, where the first to be free gets the next chunk."""
    free = [(0.0, worker) for worker in range(len(slow))]
    for cost in costs:
        at, worker = heapq.heappop(free)
        heapq.heappush(free, (at + cost * slow[worker], worker))
    return [at for at, _ in free]


def _beforehand(costs: Sequence[float], slow: NDArray[np.float64]) -> list[float]:
    """When each worker is done with every n-th chunk."""
    return [sum(costs[worker :: len(slow)]) * slow[worker] for worker in range(len(slow))]
