"""The likelihood's terms, what fastsample/ops/likelihood specifies: one pass over x_start, x and m.

Moves 4 bytes an element for each, 2 for a 16-bit m, and m's again where its variance half is read. A program sums a
chunk of one sample in float64; chunks are cut by the size of a sample alone and added up in order, so that a sample's
result does not depend on the batch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsample.kernels.arithmetic import exp2_of, fma, tl, triton
from fastsample.kernels.blocks import on
from fastsample.kernels.chunks import chunks_of, own_chunk, sum_of
from fastsample.kernels.noise import minus_two_log
from fastsample.kernels.row import FLOATS, row_of_sample

BLOCK = 1024
COMBINED = 128

# Of a row of coefficients, which is as long as a table's.
_P, _Q, _LIMIT, _A, _B = (tl.constexpr(i) for i in range(5))
_WEIGHT, _CONSTANT, _SLOPE, _DATA = (tl.constexpr(i) for i in range(5, 9))

_MINUS_LOG2_E = tl.constexpr(-1 / math.log(2))
_SCALE = tl.constexpr(2 * math.sqrt(2 / math.pi))
_CUBIC = tl.constexpr(0.044715)
_LOG_FLOOR = tl.constexpr(math.log(1e-12))
_EDGE = tl.constexpr(0.999)
_HALF_BIN = tl.constexpr(1 / 255)
_PER_BIT = tl.constexpr(1 / math.log(2))


def likelihood(
    coefficients: Tensor, row_of: Tensor | None, row: int, x_start: Tensor, x: Tensor, m: Tensor, out: Tensor
) -> None:
    """Every sample's term in bits per dimension into float32 `out` (batch,); NaN where row_of names no row.

    coefficients are ops.likelihood's, float32 (rows, 16); x_start, x and m are contiguous, m of x's size or twice that.
    """
    batch, size = len(x), x.numel() // len(x)
    chunks = triton.cdiv(size, BLOCK)
    partial = torch.empty(batch, chunks, dtype=torch.float64, device=x.device)
    with on(x):
        terms_kernel[(batch * chunks,)](
            coefficients, len(coefficients), row_of, row, x_start, x, m, m.numel() // batch, size, partial,
            BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
        bits_kernel[(batch,)](partial, chunks, size, out, BLOCK=COMBINED, num_warps=1, enable_fp_fusion=False)


@triton.jit
def _excess_near_0(t):
    """t + e^-t - 1 for |t| <= 1/4, relative error below 2^-23: what is left of it after cancellation."""
    poly = fma(t, -1.0 / 5040, 1.0 / 720)
    poly = fma(poly, t, -1.0 / 120)
    poly = fma(poly, t, 1.0 / 24)
    poly = fma(poly, t, -1.0 / 6)
    return fma(poly, t, 0.5) * t * t


@triton.jit
def _log(x):
    return minus_two_log(x) * -0.5


@triton.jit
def _log_sigmoid(t):
    smaller = tl.minimum(t, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return smaller - _log(1.0 + exp2_of(tl.abs(t) * _MINUS_LOG2_E))


@triton.jit
def _divergence(error, gap, weight):
    shrink = exp2_of(gap * _MINUS_LOG2_E)
    excess = tl.where(tl.abs(gap) <= 0.25, _excess_near_0(gap), gap - 1.0 + shrink)
    return fma(weight * error * error, shrink, excess) * 0.5


@triton.jit
def _on_logistic_scale(t):
    return fma(t * t * _CUBIC, t, t) * _SCALE


@triton.jit
def _surprise(x_start, mean, log_variance):
    inverse = exp2_of(log_variance * (0.5 * _MINUS_LOG2_E))
    low, high = inverse * (x_start - mean - _HALF_BIN), inverse * (x_start - mean + _HALF_BIN)
    lower, upper = _on_logistic_scale(low), _on_logistic_scale(high)
    squares = fma(high, high, fma(high, low, low * low))
    width = inverse * (2 * _SCALE * _HALF_BIN) * fma(squares, _CUBIC, 1.0)
    below_upper, above_lower = _log_sigmoid(upper), _log_sigmoid(-lower)
    share = tl.where(width <= 0.25, width - _excess_near_0(width), 1.0 - exp2_of(width * _MINUS_LOG2_E))
    inside = below_upper + above_lower + _log(share)
    mass = tl.where(x_start < -_EDGE, below_upper, tl.where(x_start > _EDGE, above_lower, inside))
    return -tl.maximum(mass, _LOG_FLOOR, propagate_nan=tl.PropagateNan.ALL)


@triton.jit(do_not_specialize=["row_count", "row"])
def terms_kernel(
    coefficients, row_count, row_of, row,  # [row_count, 16]; [batch] or None
    x_start, x, m, m_stride, size,  # [batch, size] twice, [batch, m_stride]
    partial,  # [batch, chunks]
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of a chunk's terms, in nats."""
    sample, chunk, at, inside = own_chunk(size, BLOCK)
    index, exists = row_of_sample(row, row_count, row_of, sample)
    own = coefficients + index * FLOATS
    p, q, a, slope = tl.load(own + _P), tl.load(own + _Q), tl.load(own + _A), tl.load(own + _SLOPE)
    # What has no coefficient is not read.
    reads_x, reads_m = at < tl.where((p != 0.0) | (a != 0.0), size, 0), at < tl.where(q != 0.0, size, 0)
    reads_v = at < tl.where(slope != 0.0, size, 0)
    data = tl.load(x_start + sample * size + at, mask=inside, other=0.0)  # [BLOCK]
    state = tl.load(x + sample * size + at, mask=reads_x, other=0.0)  # [BLOCK]
    output = tl.load(m + sample * m_stride + at, mask=reads_m, other=0.0).to(tl.float32)  # [BLOCK]
    v = tl.load(m + sample * m_stride + size + at, mask=reads_v, other=0.0).to(tl.float32)  # [BLOCK]
    limit = tl.load(own + _LIMIT)
    x0 = fma(output, q, tl.where(p != 0.0, fma(state, p, 0.0), 0.0))
    x0 = tl.maximum(x0, -limit, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.minimum(x0, limit, propagate_nan=tl.PropagateNan.ALL)
    gap = fma(v, slope, tl.load(own + _CONSTANT))
    if tl.load(own + _DATA) != 0.0:
        term = _surprise(data, fma(state, a, tl.load(own + _B) * x0), gap)
    else:
        term = _divergence(data - x0, gap, tl.load(own + _WEIGHT))
    total = tl.sum(tl.where(inside, term, 0.0).to(tl.float64))
    tl.store(partial + sample * chunks_of(size, BLOCK) + chunk, tl.where(exists, total, float("nan")))


@triton.jit(do_not_specialize=["chunks"])
def bits_kernel(partial, chunks, size, out, BLOCK: tl.constexpr):
    """The mean of one sample's terms, in bits."""
    sample = tl.program_id(0).to(tl.int64)
    total = sum_of(partial + sample * chunks, chunks, BLOCK)
    tl.store(out + sample, (total / tl.cast(size, tl.float64) * _PER_BIT).to(tl.float32))
