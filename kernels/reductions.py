"""What a step needs to know of whole samples first; csrc/cpu/reductions.inl in passes of many programs.

What the chunks of a sample find is combined in one order or is integer, so that results do not depend on which program
runs first. Nothing is read back by the host and nothing allocated in a call.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastsample.kernels.arithmetic import fma, guide, tl, triton
from fastsample.kernels.chunks import chunks_of, own_chunk, sum_of
from fastsample.kernels.row import AT_LIMIT, AT_P, AT_Q, AT_QUANTILE, FLOATS, row_of_sample

# Moments: a chunk has four sums, 128 chunks are added up at once.
MOMENTS_BLOCK = 1024
COMBINED = 128

# Magnitudes: 31 bits in digits of 8, 8, 8 and 7. A histogram costs each warp instructions in every bin, so that three
# digits of 11, 10 and 10 bits would take more than twice those of these four.
COUNT_BLOCK = 2048
_BINS = tl.constexpr(256)
DIGITS = 4
# Per sample: a histogram for each digit, then whether there is a NaN, what lies nearest above, and for each digit but
# the last the bits down to it and the number of values below.
_NAN = tl.constexpr(4 * 256)
_NEAREST = tl.constexpr(4 * 256 + 1)
_PICKED = tl.constexpr(4 * 256 + 2)
_SLOTS = tl.constexpr(4 * 256 + 8)

_INFINITY = tl.constexpr(0x7F800000)
_LARGEST = tl.constexpr(0x7FFFFFFF)
_NO_COUNT = tl.constexpr(0x7FFFFFFFFFFFFFFF)


def rescale_scratch(batch: int, size: int, device: torch.device) -> Tensor:
    """What `rescale_factor` puts its partial sums into."""
    return torch.empty(batch, 4, triton.cdiv(size, MOMENTS_BLOCK), dtype=torch.float64, device=device)


def rescale_factor(
    m: Tensor, m_stride: int, batch: int, size: int, guidance: Tensor, phi: float, scratch: Tensor, out: Tensor
) -> None:
    """phi std(m_cond) / std(m) + 1 - phi of every sample into float32 `out` (batch,), 1 where m is constant.

    m is contiguous, first the unconditional samples, m_stride elements from one to the next, of which `size` count.
    Reads both halves of m once.
    """
    chunks = scratch.shape[2]
    moments_kernel[(batch * chunks,)](
        m, m_stride, batch, size, guidance, scratch, BLOCK=MOMENTS_BLOCK, num_warps=4, enable_fp_fusion=False
    )
    factor_kernel[(batch,)](scratch, chunks, size, phi, out, BLOCK=COMBINED, num_warps=1, enable_fp_fusion=False)


def threshold_scratch(batch: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What `threshold` puts |x0| and its counts into."""
    magnitudes = torch.empty(batch, size, dtype=torch.int32, device=device)
    return magnitudes, torch.empty(batch, _SLOTS.value, dtype=torch.int64, device=device)


def threshold(
    rows: Tensor,
    row_of: Tensor | None,
    row: int,
    x: Tensor,
    m: Tensor,
    m_stride: int,
    guidance: Tensor | None,
    factors: Tensor | None,
    scratch: tuple[Tensor, Tensor],
    out: Tensor,
) -> None:
    """clamp(quantile of |x0|, 1, limit) of every sample into float32 `out` (batch,), as torch.quantile interpolates.

    NaN where x0 holds one, where the bound would be infinite and where row_of names no row; the limit itself in a row
    without a quantile. Reads x and m once, writes |x0| and reads it three times.
    """
    magnitudes, counts = scratch
    batch, size = magnitudes.shape
    counts.zero_()
    grid = (batch * triton.cdiv(size, COUNT_BLOCK),)
    where = (rows, len(rows), row_of, row)
    options: dict[str, Any] = {"BLOCK": COUNT_BLOCK, "num_warps": 4, "enable_fp_fusion": False}
    magnitudes_kernel[grid](*where, x, m, m_stride, batch, size, guidance, factors, magnitudes, counts, **options)
    for digit in range(1, DIGITS):
        digits_kernel[grid](*where, size, magnitudes, counts, DIGIT=digit, **options)
    quantile_kernel[(batch,)](*where, size, counts, out, num_warps=4, enable_fp_fusion=False)


@triton.jit(do_not_specialize=["batch"])
def moments_kernel(
    m, m_stride, batch, size, guidance, scratch,  # [2 batch, m_stride]; [batch]; [batch, 4, chunks]
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum and sum of squares of a chunk, of the conditional half and of the guided output."""
    sample, chunk, at, inside = own_chunk(size, BLOCK)
    unconditional, conditional = m + sample * m_stride, m + (batch + sample) * m_stride
    weight = tl.load(guidance + sample)
    c = tl.load(conditional + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    u = tl.load(unconditional + at, mask=inside, other=0.0).to(tl.float32)  # [BLOCK]
    first_c, first_u = tl.load(conditional).to(tl.float32), tl.load(unconditional).to(tl.float32)
    chunks = chunks_of(size, BLOCK)
    to = scratch + sample * 4 * chunks + chunk
    # About the first value: exactly 0 for a constant.
    centred = tl.where(inside, c.to(tl.float64) - first_c.to(tl.float64), 0.0)
    tl.store(to, tl.sum(centred))
    tl.store(to + chunks, tl.sum(centred * centred))
    first = guide(first_u, first_c, weight)
    centred = tl.where(inside, guide(u, c, weight).to(tl.float64) - first.to(tl.float64), 0.0)
    tl.store(to + 2 * chunks, tl.sum(centred))
    tl.store(to + 3 * chunks, tl.sum(centred * centred))


@triton.jit
def _deviations(scratch, chunks, size, BLOCK: tl.constexpr):
    """The sum of squared deviations from the mean."""
    total = sum_of(scratch, chunks, BLOCK)
    left = sum_of(scratch + chunks, chunks, BLOCK) - total * total / tl.cast(size, tl.float64)
    return tl.where(left < 0.0, 0.0, left)


@triton.jit(do_not_specialize=["chunks"])
def factor_kernel(scratch, chunks, size, phi, out, BLOCK: tl.constexpr):
    """The rescale factor of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    own = scratch + sample * 4 * chunks
    of_conditional = _deviations(own, chunks, size, BLOCK)
    of_m = _deviations(own + 2 * chunks, chunks, size, BLOCK)
    share = tl.cast(tl.cast(phi, tl.float32), tl.float64)
    factor = share * tl.sqrt(of_conditional / of_m) + (1.0 - share)
    tl.store(out + sample, tl.where(of_m == 0.0, 1.0, factor).to(tl.float32))


@triton.jit
def _has_quantile(rows, row_count, row_of, row, sample):
    """(the sample's row, whether it asks for a threshold)."""
    index, exists = row_of_sample(row, row_count, row_of, sample)
    own = rows + index * FLOATS
    return own, exists & (tl.load(own + AT_QUANTILE) != 0.0)


@triton.jit
def _rank(row, size):
    """(rank of the quantile, that of the value at or below it), of which float32 holds the first as torch does."""
    last = tl.cast(size, tl.int64) - 1
    rank = tl.load(row + AT_QUANTILE) * last.to(tl.float32)
    return rank, tl.minimum(rank.to(tl.int64), last)


@triton.jit
def _add_counts(to, digits, inside):
    counts = tl.histogram(digits, _BINS, mask=inside)
    tl.atomic_add(to + tl.arange(0, _BINS), counts.to(tl.int64), mask=counts > 0, sem="relaxed")


@triton.jit
def _nearest_above(to, bits, above):
    """The smallest of these bits, kept as a distance from the largest ones: nothing is 0."""
    distance = tl.max(tl.where(above, bits ^ _LARGEST, 0))
    if distance > 0:
        tl.atomic_max(to + _NEAREST, distance.to(tl.int64), sem="relaxed")


@triton.jit(do_not_specialize=["row_count", "row", "batch"])
def magnitudes_kernel(
    rows, row_count, row_of, row,  # [row_count, 16]; [batch] or None
    x, m, m_stride, batch, size,  # [batch, size]; [batch or, guided, 2 batch, m_stride]
    guidance, factors,  # [batch] or None
    magnitudes, counts,  # [batch, size]; [batch, _SLOTS]
    BLOCK: tl.constexpr,
):  # fmt: skip
    """|x0| of a chunk as bits, counted by the first digit."""
    sample, _, at, inside = own_chunk(size, BLOCK)
    own, wanted = _has_quantile(rows, row_count, row_of, row, sample)
    if not wanted:
        return
    p, q = tl.load(own + AT_P), tl.load(own + AT_Q)
    if factors is not None:
        q = tl.where(q != 0.0, q * tl.load(factors + sample), 0.0)
    x_row, m_row = x + sample * size, m + sample * m_stride
    # What has no coefficient is not read: fma leaves a sum as it is where both factors are 0.
    reads_x, reads_m = at < tl.where(p != 0.0, size, 0), at < tl.where(q != 0.0, size, 0)
    if guidance is not None:
        u = tl.load(m_row + at, mask=reads_m, other=0.0).to(tl.float32)  # [BLOCK]
        c = tl.load(m_row + batch * m_stride + at, mask=reads_m, other=0.0).to(tl.float32)  # [BLOCK]
        output = guide(u, c, tl.load(guidance + sample))
    else:
        output = tl.load(m_row + at, mask=reads_m, other=0.0).to(tl.float32)  # [BLOCK]
    state = tl.load(x_row + at, mask=reads_x, other=0.0)  # [BLOCK]
    x0 = fma(output, q, fma(state, p, 0.0))
    bits = x0.to(tl.int32, bitcast=True) & _LARGEST
    tl.store(magnitudes + sample * size + at, bits, mask=inside)
    to = counts + sample * _SLOTS
    _add_counts(to, bits >> 23, inside)
    if tl.max((inside & (bits > _INFINITY)).to(tl.int32)) > 0:
        tl.atomic_max(to + _NAN, 1, sem="relaxed")


@triton.jit
def _pick(counts, lower, DIGIT: tl.constexpr):
    """(bits down to this digit of the value of this rank, values below all that share them, values up to those)"""
    prefix, below = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    if DIGIT > 0:
        prefix = tl.load(counts + _PICKED + 2 * DIGIT - 2)
        below = tl.load(counts + _PICKED + 2 * DIGIT - 1)
    bins = tl.arange(0, _BINS)
    through = below + tl.cumsum(tl.load(counts + DIGIT * _BINS + bins))  # [_BINS]
    passed = through <= lower
    bucket = tl.sum(passed.to(tl.int64))
    prefix = prefix * (128 if DIGIT == 3 else 256) + bucket
    return prefix, tl.max(tl.where(passed, through, below)), tl.min(tl.where(passed, _NO_COUNT, through))


@triton.jit(do_not_specialize=["row_count", "row"])
def digits_kernel(
    rows, row_count, row_of, row, size, magnitudes, counts, DIGIT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The digit before is picked; values that share all digits down to it are counted by this one."""
    sample, chunk, at, inside = own_chunk(size, BLOCK)
    own, wanted = _has_quantile(rows, row_count, row_of, row, sample)
    if not wanted:
        return
    to = counts + sample * _SLOTS
    _, lower = _rank(own, size)
    prefix, below, _ = _pick(to, lower, DIGIT - 1)
    if chunk == 0:
        tl.store(to + _PICKED + 2 * DIGIT - 2, prefix)
        tl.store(to + _PICKED + 2 * DIGIT - 1, below)
    bits = tl.load(magnitudes + sample * size + at, mask=inside, other=0)  # [BLOCK]
    ABOVE: tl.constexpr = 31 - 8 * DIGIT
    SHIFT: tl.constexpr = ABOVE - 8 if DIGIT < 3 else 0
    upper, prefix = bits >> ABOVE, prefix.to(tl.int32)
    shares = inside & (upper == prefix)
    digits = (bits >> SHIFT) & ((1 << (ABOVE - SHIFT)) - 1)
    # Past the first digits few values are left, except where many are equal.
    if tl.sum(shares.to(tl.int32)) * 32 <= BLOCK:
        tl.atomic_add(to + DIGIT * _BINS + digits, tl.full([BLOCK], 1, tl.int64), mask=shares, sem="relaxed")
    else:
        _add_counts(to + DIGIT * _BINS, digits, shares)
    if DIGIT == 3:
        _nearest_above(to, bits, inside & (upper > prefix))


@triton.jit
def _as_float(bits):
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["row_count", "row"])
def quantile_kernel(rows, row_count, row_of, row, size, counts, out):
    """The last digit is picked, and the bound of one sample interpolated."""
    sample = tl.program_id(0).to(tl.int64)
    index, exists = row_of_sample(row, row_count, row_of, sample)
    own = rows + index * FLOATS
    limit, quantile = tl.load(own + AT_LIMIT), tl.load(own + AT_QUANTILE)
    to = counts + sample * _SLOTS
    rank, lower = _rank(own, size)
    low, _, through = _pick(to, lower, 3)
    # The next larger value: another one with the same upper bits, else what lies nearest above those.
    bins = tl.arange(0, _BINS)
    bucket = (low & 127).to(tl.int32)
    later = (tl.load(to + 3 * _BINS + bins) > 0) & (bins > bucket)  # [_BINS]
    behind = tl.min(tl.where(later, bins, 2 * _BINS))
    nearest = tl.minimum(tl.load(to + _NEAREST) ^ _LARGEST, _INFINITY)
    next_up = tl.where(behind < _BINS, low - bucket + behind, nearest)
    weight = rank - lower.to(tl.float32)
    between_two = (weight > 0.0) & (through <= lower + 1) & (lower + 1 < size)
    a, b = _as_float(low), _as_float(tl.where(between_two, next_up, low))
    bound = tl.where(weight < 0.5, fma(weight, b - a, a), fma(weight - 1.0, b - a, b))
    # Comparisons that a NaN fails leave it as it is.
    bound = tl.where(bound < 1.0, 1.0, bound)
    bound = tl.where(bound > limit, limit, bound)
    bound = tl.where((tl.load(to + _NAN) != 0) | (bound == float("inf")), float("nan"), bound)
    bound = tl.where(quantile == 0.0, limit, bound)
    tl.store(out + sample, tl.where(exists, bound, float("nan")))
