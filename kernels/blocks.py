"""How the element-wise kernels divide their work: a program goes through consecutive tiles of one sample.

A tile is [QUADS, 4]: the last axis makes Triton give four neighbours to one thread, a 128-bit access in float32 and 64
bits in 16-bit dtypes, whole 32-byte sectors in both. (Eight neighbours would make the latter 128 bits and every float32
store one of half sectors.) They are also the four normals of one Philox call.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsample.kernels.arithmetic import INTERPRETED, tl, triton

_GRID_LIMIT = 65535  # of the axes 1 and 2

# Two quads a thread hide the latency of arithmetic and fit 64 registers with every operand there is, four do not.
QUADS = 256

_ALREADY = nullcontext()


def on(tensor: Tensor) -> AbstractContextManager[object]:
    """Makes the tensor's GPU the current one: Triton launches there, wherever the tensors lie."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return _ALREADY
    return torch.cuda.device(tensor.device)


@dataclass(frozen=True)
class Blocks:
    """What a launch over `batch` samples of `size` elements is told."""

    batch: int
    size: int
    grid: tuple[int, int, int]
    parts: int
    quads: int
    aligned: bool
    num_warps: int


def blocks_of(batch: int, size: int, largest: int = QUADS) -> Blocks:
    """The division of `batch` samples of `size` elements, in tiles of at most `largest` quads.

    Small tensors have one quad a thread, as many threads as there can be. Of large ones a program takes up to eight
    tiles, which share what is done once a program, as long as there are programs for about two full loads of the
    largest GPUs. Autotuning has nothing to find: the kernels do nothing but pass over memory.
    """
    # The interpreter takes about a millisecond a program, whatever its size.
    most = 16384 if INTERPRETED else largest if batch * size >= 1 << 20 else min(largest, QUADS // 2)
    quads = max(32, min(most, triton.next_power_of_2(triton.cdiv(size, 4))))
    parts = max(1, min(8, batch * size // (4096 * 4 * quads)))
    grid = triton.cdiv(size, 4 * quads * parts), min(batch, _GRID_LIMIT), triton.cdiv(batch, _GRID_LIMIT)
    return Blocks(batch, size, grid, parts, quads, size % 4 == 0, min(4, quads // 32))


@triton.jit
def sample_size(size, ALIGNED: tl.constexpr):
    """`size`, in a form that shows the compiler where it is divisible by 4."""
    if ALIGNED:
        return size // 4 * 4
    else:
        return size


@triton.jit
def own_part(batch, size, parts, QUADS: tl.constexpr):
    """This program's sample, and the first element and the end of its part of it."""
    sample = tl.program_id(1) + tl.program_id(2).to(tl.int64) * tl.num_programs(1)
    elements = parts * (QUADS * 4)
    first = tl.program_id(0).to(tl.int64) * elements
    # Programs beyond the batch, which a rounded grid has, take nothing of the last sample.
    end = tl.where(sample < batch, tl.minimum(first + elements, size), 0)
    return tl.minimum(sample, batch - 1), first, end


@triton.jit
def tile_offsets(QUADS: tl.constexpr):
    """Where a tile's elements lie from its first one."""
    return tl.arange(0, QUADS)[:, None] * 4 + tl.arange(0, 4)[None, :]
