"""What memory alone takes: the same bytes with next to no arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from fastsample.ops.backend import cpu_module

_cpu = cpu_module()


def triad(y: Tensor, inputs: Sequence[Tensor]) -> Callable[[], object]:
    """y = y/2 + the inputs' mean/2, in place: bounded however often it is applied. Moves len(inputs) + 2 streams.

    On the CPU alone: on a GPU torch has no kernel that reads so many streams at once.
    """
    n, threads, factor = y.numel(), torch.get_num_threads(), 0.5 / len(inputs)
    # The closure keeps the tensors alive, which their addresses alone would not.
    return lambda: _cpu.triad(y.data_ptr(), [tensor.data_ptr() for tensor in inputs], 0.5, factor, n, threads)


def copy(y: Tensor, x: Tensor) -> Callable[[], object]:
    """y = x, as far as y goes."""
    n, threads = y.numel(), torch.get_num_threads()
    if not y.is_cpu:
        return partial(y.view(-1).copy_, x.view(-1)[:n])
    return lambda: _cpu.copy(y.data_ptr(), x.data_ptr(), n, threads)
