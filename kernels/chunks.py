"""How reductions divide their work: a program takes one chunk of one sample.

Chunks are cut by the size of a sample alone, and what they find is added up in one order: results depend neither on the
batch nor on which program runs first.
"""

from __future__ import annotations

from fastsample.kernels.arithmetic import tl, triton


@triton.jit
def chunks_of(size, BLOCK: tl.constexpr):
    """How many chunks a sample has."""
    # A size of 1 is a constant of the kernel, which has no dtype; one near 2^31 is rounded up beyond that.
    return tl.cdiv(tl.cast(size, tl.int64), BLOCK)


@triton.jit
def own_chunk(size, BLOCK: tl.constexpr):
    """(sample, chunk, its elements, which of them exist) of this program; the last two are [BLOCK]."""
    chunks = chunks_of(size, BLOCK).to(tl.int32)
    sample, chunk = tl.program_id(0) // chunks, (tl.program_id(0) % chunks).to(tl.int64)
    at = chunk * BLOCK + tl.arange(0, BLOCK)
    return sample.to(tl.int64), chunk, at, at < size


@triton.jit
def sum_of(partial, chunks, BLOCK: tl.constexpr):
    """The sum of a sample's float64 results, BLOCK at a time."""
    total = tl.zeros([BLOCK], tl.float64)
    for first in range(0, chunks, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(partial + at, mask=at < chunks, other=0.0)  # [BLOCK]
    return tl.sum(total)
