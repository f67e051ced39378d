"""Repetitions while there is time for them."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class Budget:
    """So many seconds from now on.

    Attributes:
        clock: by which work is timed, which need not be the clock that the budget ends by.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.perf_counter) -> None:
        self._end, self.clock = time.perf_counter() + seconds, clock

    def left(self) -> float:
        """Seconds; negative where there are none."""
        return self._end - time.perf_counter()

    def part(self, share: float) -> Budget:
        """A share of what is left."""
        return Budget(share * self.left(), self.clock)


def repeated(run: Callable[[], T], most: int, budget: Budget) -> list[T]:
    """The results of `most` runs, or of as many as fit into the budget, if each takes as long as the one before.

    One is made in any case.
    """
    results: list[T] = []
    while len(results) < most:
        before = budget.left()
        results.append(run())
        after = budget.left()
        if after < before - after:
            break
    return results
