"""Times several candidates in one process, round by round, so that a drifting machine drifts for all of them alike."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import repeat
from time import perf_counter
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from benchmarks.common.progress import shown_rounds

ROUND_SECONDS = 0.004  # short against the drift of a shared machine, long against the clock


@dataclass(frozen=True)
class Candidate:
    """One way to do the work.

    Attributes:
        provider: the name it is reported under.
        call: what is timed.
        before: runs ahead of every call with the clock stopped; the calls of a round are then timed one by one.
        bytes: memory traffic of a call, every operand counted once a read and once a write; 0 where it means nothing.
    """

    provider: str
    call: Callable[[], object]
    before: Callable[[], object] | None = None
    bytes: int = 0


Clock = Callable[[Candidate, int], float]


@dataclass(frozen=True)
class Timing:
    """What one candidate took.

    Attributes:
        seconds: time of a call in each round, the mean over the calls of that round; shape (rounds,).
        calls: calls in a round.
        bytes: as in Candidate.
    """

    seconds: NDArray[np.float64]
    calls: int
    bytes: int = 0


class Spread(NamedTuple):
    """Three quantiles of the rounds."""

    p20: float
    p50: float
    p80: float

    @property
    def claim(self) -> str:
        """Of a ratio: "slower" or "faster" where it lies above or below 1 as a whole, else "no claim"."""
        return "slower" if self.p20 > 1 else "faster" if self.p80 < 1 else "no claim"


def measure(
    candidates: Sequence[Candidate], rounds: int, round_seconds: float = ROUND_SECONDS, clock: Clock | None = None
) -> dict[str, Timing]:
    """Times all candidates in turn, in every round: A B C, B C A, C A B, ...

    Args:
        candidates: with distinct providers.
        rounds: how often each is timed.
        round_seconds: how long one candidate's turn shall take; a slow one still gets one call.
        clock: what times so many calls of a candidate; default the host's.

    Before, a line on stderr tells how long it will take, where that is long; meanwhile a terminal shows a bar.

    Returns:
        A Timing for each provider, in the order given.
    """
    clock = clock or wall
    with _no_garbage_collection():
        turns = [_turn(candidate, round_seconds, clock) for candidate in candidates]
        calls = [turn.calls for turn in turns]
        seconds = np.empty((len(candidates), rounds))
        for k in shown_rounds(rounds, sum(turn.seconds for turn in turns), [c.provider for c in candidates]):
            for turn in range(len(candidates)):
                # The first candidate of a round finds the caches in another state than the last one.
                i = (k + turn) % len(candidates)
                seconds[i, k] = clock(candidates[i], calls[i]) / calls[i]
    return {c.provider: Timing(seconds[i], calls[i], c.bytes) for i, c in enumerate(candidates)}


def spread(values: NDArray[np.float64]) -> Spread:
    """The 20 %, 50 % and 80 % quantiles."""
    return Spread(*np.quantile(values, (0.2, 0.5, 0.8)).tolist())


def ratio(timing: Timing, baseline: Timing) -> Spread:
    """How many times as long as the baseline, formed within each round: drift between rounds cancels."""
    return spread(timing.seconds / baseline.seconds)


def wall(candidate: Candidate, calls: int) -> float:
    """Seconds of so many calls by the host's clock, which stands still during `before`."""
    call, before = candidate.call, candidate.before
    if before is None:
        start = perf_counter()
        for _ in repeat(None, calls):
            call()
        return perf_counter() - start
    total = 0.0
    for _ in repeat(None, calls):
        before()
        start = perf_counter()
        call()
        total += perf_counter() - start
    return total


class _Turn(NamedTuple):
    """Calls of a candidate in a round, and the seconds that they will take."""

    calls: int
    seconds: float


def _turn(candidate: Candidate, round_seconds: float, clock: Clock) -> _Turn:
    # The first calls compile, page memory in and wake threads; the whole turn counts here, `before` included.
    clock(candidate, 2)
    calls = 1
    while True:
        start = perf_counter()
        clock(candidate, calls)
        elapsed = perf_counter() - start
        if elapsed >= round_seconds / 4:
            wanted = max(1, round(calls * round_seconds / elapsed))
            return _Turn(wanted, wanted * elapsed / calls)
        calls *= 2


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
