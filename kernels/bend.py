"""Guidance by other methods than the plain one, what fastsample/ops/bend specifies.

Both halves are read once for their sums and once to be combined; with momentum what moves is too. Sums are float64 and
added up in one order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsample.kernels.arithmetic import fma, tl, triton
from fastsample.kernels.blocks import on
from fastsample.kernels.chunks import chunks_of, own_chunk, sum_of

BLOCK = 1024
COMBINED = 128  # chunks that are added up at once

# Sums over a sample, in this order: of c, u and d, of their squares, of their products.
_C, _U, _D, _CC, _UU, _DD, _CU, _CD, _UD = (tl.constexpr(i) for i in range(9))
_SUMS = tl.constexpr(9)
_TINY = tl.constexpr(1e-8)  # beside a squared norm, as the methods' authors have it
_ROUNDING = tl.constexpr(1e-12)  # of a sum of doubles: a variance below that is of a constant
_METHODS = {"plain": 0, "cfg_zero_star": 1, "apg": 2}


def bend(
    output: Tensor, m_stride: int, size: int, weights: Tensor, settings: Any, moved: Tensor | None, out: Tensor
) -> None:
    """m of every sample into float32 `out`, (batch, m_stride).

    Args:
        output: contiguous, first the unconditional samples, m_stride elements from one to the next.
        size: elements of a sample; what lies behind them is the variance half.
        weights: float32 (batch,).
        settings: see fastsample.ops.bend.Settings.
        moved: float32 (batch, size), updated; None without momentum.
    """
    batch = len(out)
    chunks = triton.cdiv(size, BLOCK)
    sums = torch.empty(batch, _SUMS.value, chunks, dtype=torch.float64, device=out.device)
    shares = torch.empty(batch, 3, dtype=torch.float32, device=out.device)
    options: dict[str, Any] = {"enable_fp_fusion": False}
    with on(out):
        sums_kernel[(batch * chunks,)](
            *(output, m_stride, batch, size, moved, settings.momentum, sums), BLOCK=BLOCK, num_warps=4, **options
        )
        shares_kernel[(batch,)](
            *(sums, chunks, size, weights, settings.rescale, settings.eta, settings.norm_threshold, shares),
            METHOD=_METHODS[settings.method],
            MOVES=moved is not None,
            RESCALES=settings.rescale != 0,
            BLOCK=COMBINED,
            num_warps=1,
            **options,
        )
        combine_kernel[(batch * chunks,)](
            *(output, m_stride, batch, size, moved, shares, out),
            VARIANCE=m_stride > size,
            BLOCK=BLOCK,
            num_warps=4,
            **options,
        )


@triton.jit
def _halves(output, m_stride, batch, sample, at, inside):
    """(c, u) of a chunk, as floats."""
    unconditional, conditional = output + sample * m_stride, output + (batch + sample) * m_stride
    c = tl.load(conditional + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    u = tl.load(unconditional + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    return c, u


@triton.jit(do_not_specialize=["batch"])
def sums_kernel(
    output, m_stride, batch, size,  # [2 batch, m_stride]
    moved, momentum, sums,  # [batch, size] or None; [batch, 9, chunks]
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The sums of a chunk; what moves is brought up to date."""
    sample, chunk, at, inside = own_chunk(size, BLOCK)
    chunks = chunks_of(size, BLOCK)
    to = sums + sample * _SUMS * chunks + chunk
    c, u = _halves(output, m_stride, batch, sample, at, inside)
    wide_c, wide_u = c.to(tl.float64), u.to(tl.float64)
    tl.store(to + _C * chunks, tl.sum(wide_c))
    tl.store(to + _U * chunks, tl.sum(wide_u))
    tl.store(to + _CC * chunks, tl.sum(wide_c * wide_c))
    tl.store(to + _UU * chunks, tl.sum(wide_u * wide_u))
    tl.store(to + _CU * chunks, tl.sum(wide_c * wide_u))
    if moved is not None:
        before = tl.load(moved + sample * size + at, mask=inside, other=0.0)  # [BLOCK]
        d = fma(before, tl.cast(momentum, tl.float32), c - u)
        tl.store(moved + sample * size + at, d, mask=inside)
        wide_d = d.to(tl.float64)
        tl.store(to + _D * chunks, tl.sum(wide_d))
        tl.store(to + _DD * chunks, tl.sum(wide_d * wide_d))
        tl.store(to + _CD * chunks, tl.sum(wide_c * wide_d))
        tl.store(to + _UD * chunks, tl.sum(wide_u * wide_d))


@triton.jit
def _at_least(value, least):
    """The larger one; NaN stays NaN."""
    return tl.where(value < least, least, value)


@triton.jit
def _variance(square, total, size, largest):
    left = square - total * total / size
    return tl.where(left <= largest * _ROUNDING, 0.0, left)


@triton.jit(do_not_specialize=["chunks", "phi", "eta", "norm_threshold"])
def shares_kernel(
    sums, chunks, size, weights, phi, eta, norm_threshold,  # [batch, 9, chunks]; [batch]
    shares,  # [batch, 3]
    METHOD: tl.constexpr, MOVES: tl.constexpr, RESCALES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What m has of c, u and d in one sample."""
    sample = tl.program_id(0).to(tl.int64)
    own, n = sums + sample * _SUMS * chunks, tl.cast(size, tl.float64)
    c, u = sum_of(own + _C * chunks, chunks, BLOCK), sum_of(own + _U * chunks, chunks, BLOCK)
    cc, uu = sum_of(own + _CC * chunks, chunks, BLOCK), sum_of(own + _UU * chunks, chunks, BLOCK)
    cu = sum_of(own + _CU * chunks, chunks, BLOCK)
    if MOVES:
        d, dd = sum_of(own + _D * chunks, chunks, BLOCK), sum_of(own + _DD * chunks, chunks, BLOCK)
        cd, ud = sum_of(own + _CD * chunks, chunks, BLOCK), sum_of(own + _UD * chunks, chunks, BLOCK)
    else:
        d, dd, cd, ud = c - u, _at_least(cc - 2 * cu + uu, 0.0), cc - cu, cu - uu
    weight = tl.load(weights + sample)
    w = weight.to(tl.float64)
    of_c, of_u, of_d = w, 1.0 - w, tl.cast(0.0, tl.float64)
    if METHOD == 1:
        of_u *= cu / (uu + _TINY)
    if METHOD == 2:
        length, r = tl.sqrt(dd), tl.cast(norm_threshold, tl.float64)
        kept = tl.where((r > 0.0) & ((length > r) | (length != length)), r / tl.where(length == 0.0, 1.0, length), 1.0)
        back = w * (1.0 - tl.cast(eta, tl.float64)) * kept * cd / _at_least(cc, _TINY * _TINY)
        if MOVES:
            of_c, of_u, of_d = -back, of_u * 0.0 + 1.0, w * kept
        else:
            of_c, of_u = w * kept - back, 1.0 - w * kept
    if RESCALES:
        squares = of_c * of_c * cc + of_u * of_u * uu + of_d * of_d * dd
        square = squares + 2.0 * (of_c * of_u * cu + of_c * of_d * cd + of_u * of_d * ud)
        of_m = _variance(square, of_c * c + of_u * u + of_d * d, n, squares)
        share = tl.cast(phi, tl.float64)
        factor = share * tl.sqrt(_variance(cc, c, n, cc) / tl.where(of_m == 0.0, 1.0, of_m)) + (1.0 - share)
        factor = tl.where(of_m == 0.0, 1.0, factor)
        of_c, of_u, of_d = of_c * factor, of_u * factor, of_d * factor
    to, alone = shares + sample * 3, weight == 1.0
    tl.store(to, tl.where(alone, 1.0, of_c).to(tl.float32))
    tl.store(to + 1, tl.where(alone, 0.0, of_u).to(tl.float32))
    tl.store(to + 2, tl.where(alone, 0.0, of_d).to(tl.float32))


@triton.jit(do_not_specialize=["batch"])
def combine_kernel(
    output, m_stride, batch, size, moved, shares,  # [2 batch, m_stride]; [batch, size] or None; [batch, 3]
    out,  # [batch, m_stride]
    VARIANCE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """m of a chunk, and its part of the conditional variance half."""
    sample, _, at, inside = own_chunk(size, BLOCK)
    own = shares + sample * 3
    of_c, of_u, of_d = tl.load(own), tl.load(own + 1), tl.load(own + 2)
    c, u = _halves(output, m_stride, batch, sample, at, inside)
    # What has no share does not count: it may be NaN.
    m = c * of_c
    m = tl.where(of_u != 0.0, fma(u, of_u, m), m)
    if moved is not None:
        d = tl.load(moved + sample * size + at, mask=inside, other=0.0)  # [BLOCK]
        m = tl.where(of_d != 0.0, fma(d, of_d, m), m)
    to = out + sample * m_stride + at
    tl.store(to, m, mask=inside)
    if VARIANCE:
        v = tl.load(output + (batch + sample) * m_stride + size + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
        tl.store(to + size, v, mask=inside)
