"""A check carried out: its error, its bits and its time on each backend."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor

from fastsample.selftest.case import Call, Case, Wanted
from fastsample.selftest.targets import Target

REPEATS = 5


@dataclass(frozen=True)
class Result:
    """A row of the table.

    Attributes:
        error, allowed: in unit roundoffs, of the output that comes nearest to what it is allowed.
        bits: "same" as the first compiled backend's, "differ", or empty where nothing is promised.
        microseconds: median of a call; None where it means nothing.
        failure: an exception's text.
    """

    case: Case
    backend: str
    error: float = 0.0
    allowed: float = 0.0
    bits: str = ""
    microseconds: float | None = None
    failure: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is within what is allowed, and promised bits are there."""
        return not self.failure and self.error <= self.allowed and self.bits != "differ"


def results_of(case: Case, targets: Sequence[Target]) -> Iterator[Result]:
    """The case on each backend that has the op."""
    first: list[Tensor] | None = None
    for target in targets:
        if target.backend not in case.backends or (target.interpreted and not case.small):
            continue
        # A graph holds what a GPU runs, and the interpreter runs on the host.
        if case.on_gpu and (target.device.type == "cpu" or target.interpreted):
            continue
        try:
            call = case.prepare(target.backend, target.device)
            values = [value.detach().cpu().clone() for value in call()]
            microseconds = None if target.interpreted else _microseconds(call, target.device)
        except Exception as problem:  # one op that cannot run must not hide how the others do
            yield Result(case, target.backend, failure=f"{type(problem).__name__}: {problem}")
            continue
        error, allowed = _worst(case.wanted, values, twice=target.backend == "reference")
        bits = ""
        if case.same_bits and target.backend != "reference":
            if first is None:
                first = values
            else:
                bits = "same" if all(map(_same_bits, values, first)) else "differ"
        yield Result(case, target.backend, error, allowed, bits, microseconds)


def _worst(wanted: Sequence[Wanted], values: Sequence[Tensor], twice: bool) -> tuple[float, float]:
    """(error, allowed) of the value whose error is the largest part of the allowed one."""
    # Plain torch rounds each product before it adds it.
    factor = 2 if twice else 1
    pairs = [(want.error(value), factor * want.allowed) for want, value in zip(wanted, values, strict=True)]
    return max(pairs, key=lambda pair: pair[0] / pair[1])


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _microseconds(call: Call, device: torch.device) -> float:
    """The median of a few calls; on a GPU by events, each after a write to more memory than its cache holds."""
    if device.type == "cpu":
        times = []
        for _ in range(REPEATS):
            begun = perf_counter()
            call()
            times.append(perf_counter() - begun)
        return 1e6 * statistics.median(times)
    # While it is written, the host prepares the call: what is timed is the device, not Python.
    flush = torch.empty(2**28, dtype=torch.uint8, device=device)
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(REPEATS)]
    with torch.cuda.device(device):
        for start, end in pairs:
            flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in pairs)
