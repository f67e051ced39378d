"""The peak that a share refers to: multiplications and additions in registers alone, timed beside the candidates."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from time import perf_counter

import torch

from fastsample.ops.backend import cpu_module
from fastsample.ops.lora.choice import DTYPES

_cpu = cpu_module()

PEAK = "FMA peak"


def peak(dtype: torch.dtype) -> tuple[Callable[[], int], int] | None:
    """A call of some 2 ms with the instructions of a dtype's kernel, and its FLOPs; None where the CPU cannot.

    float16 is multiplied and added in float32, after a conversion that this does not count.
    """
    code, threads, iterations = DTYPES[dtype], torch.get_num_threads(), 1000
    try:
        _cpu.fma_peak(iterations, code, threads)
    except ValueError as error:
        print(f"shares of the peak are left out: {error}")
        return None
    # The least of a few: what waits for a core on a busy machine says nothing about how long the work is.
    while (seconds := min(_seconds(partial(_cpu.fma_peak, iterations, code, threads)) for _ in range(5))) < 1e-3:
        iterations *= 2
    run = partial(_cpu.fma_peak, max(1, round(iterations * 2e-3 / seconds)), code, threads)
    return run, run()


def _seconds(call: Callable[[], object]) -> float:
    start = perf_counter()
    call()
    return perf_counter() - start
