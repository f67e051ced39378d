"""The sampling step, what fastsample/ops/step specifies: one pass over memory.

The arithmetic is that of csrc/cpu/step.inl, in its order. Values equal the CPU kernels' bit for bit, but for the sign
of an x0 that is 0. The kernel is compiled anew for each set of coefficients in use (coefficients.py) and of tensors
that are there.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample.kernels import reductions
from fastsample.kernels.arithmetic import bounded_exponent, exp2_of, fma, guide, rounded, tl, triton
from fastsample.kernels.blocks import QUADS, blocks_of, on, own_part, sample_size, tile_offsets
from fastsample.kernels.coefficients import NEVER, SOMETIMES, add, column, constants_of, read
from fastsample.kernels.noise import normals
from fastsample.kernels.row import (
    AT_A,
    AT_B,
    AT_C1,
    AT_C2,
    AT_C3,
    AT_D,
    AT_G1,
    AT_H0,
    AT_HX,
    AT_LIMIT,
    AT_NEXT_E,
    AT_P,
    AT_Q,
    AT_QUANTILE,
    AT_S,
    FLOATS,
    row_of_sample,
)

SUMMED_QUADS = QUADS // 2  # of a tile whose noise is summed too: twice as many would be spilled


@triton.jit
def sum_coefficients(own, b, A: tl.constexpr, D: tl.constexpr, LIMITED: tl.constexpr):
    """(a, b, d) of the row at `own`; where it does not limit x0, b is 0, since b x0 is in the other two."""
    a, d = column(own, AT_A, A), column(own, AT_D, D)
    if LIMITED == SOMETIMES:
        limited = (tl.load(own + AT_LIMIT) < float("inf")) | (tl.load(own + AT_QUANTILE) > 0)
        b = tl.where(limited, b, 0.0)
    return a, b, d


@triton.jit
def entry(own, state, x0, ENTRY: tl.constexpr):
    """What later rows read of this one: x0 where no row has another."""
    if ENTRY == NEVER:
        return x0
    else:
        hx, h0 = tl.load(own + AT_HX), tl.load(own + AT_H0)
        of_x0 = tl.where(h0 != 0, x0 * h0, 0.0)
        return tl.where(hx != 0, fma(state, hx, of_x0), of_x0)


@triton.jit
def limits(own, bounds, sample, LIMITED: tl.constexpr):
    """(what |x0| is clamped to, what x0 is divided by then)."""
    bound, divisor = float("inf"), 1.0
    if LIMITED != NEVER:
        bound = tl.load(own + AT_LIMIT)
        if bounds is not None:
            bound = tl.load(bounds + sample)
            divisor = tl.where(tl.load(own + AT_QUANTILE) > 0, bound, 1.0)
    return bound, divisor


@triton.jit
def rescaled(coefficient, factor, USE: tl.constexpr):
    """coefficient * factor; what has no coefficient keeps none, since a factor may be NaN."""
    if USE == NEVER:
        return coefficient
    else:
        return tl.where(coefficient != 0.0, coefficient * factor, 0.0)


@triton.jit
def clamped(x0, bound, divisor, low, high, begin, at, inside, THRESHOLDED: tl.constexpr):
    """x0 in [-bound, bound], or between each element's low and high, then divided."""
    if low is not None:
        boxed = bound < float("inf")
        highest = tl.where(boxed, tl.load(high + begin + at, mask=inside, other=0.0), bound)  # [QUADS, 4]
        lowest = tl.where(boxed, tl.load(low + begin + at, mask=inside, other=0.0), -bound)  # [QUADS, 4]
    else:
        highest, lowest = bound, -bound
    x0 = tl.minimum(x0, highest, propagate_nan=tl.PropagateNan.ALL)
    x0 = tl.maximum(x0, lowest, propagate_nan=tl.PropagateNan.ALL)
    if THRESHOLDED:
        return tl.div_rn(x0, divisor)
    else:
        return x0


@triton.jit
def model_output(m, offset, unconditional, weight, at, inside, GUIDED: tl.constexpr):
    """m as floats, [QUADS, 4]; guided, with an unconditional half that lies `unconditional` elements before it."""
    output = tl.load(m + offset + at, mask=inside, other=0.0).to(tl.float32)  # [QUADS, 4]
    if GUIDED:
        other = tl.load(m + (offset - unconditional) + at, mask=inside, other=0.0).to(tl.float32)  # [QUADS, 4]
        return guide(other, output, weight)
    else:
        return output


@triton.jit
def with_variance(noise, m, offset, at, left, g1, G1: tl.constexpr, M_PARTS: tl.constexpr):
    """noise * 2^(g1 v), where v is m's variance half."""
    if G1 == NEVER:
        return noise
    elif M_PARTS == 2:
        return noise * exp2_of(read(m, offset, at, left, g1, G1) * g1)
    else:
        # Rows read on the device may ask for a variance half that the host could not check.
        return noise * tl.where(g1 != 0, float("nan"), 1.0)


@triton.jit
def exponents(m, offset, at, left, g1, G1: tl.constexpr, M_PARTS: tl.constexpr):
    """The powers of 2 that `with_variance` scales noise by."""
    if G1 == NEVER:
        return tl.zeros(at.shape, tl.float32)
    elif M_PARTS == 2:
        return bounded_exponent(read(m, offset, at, left, g1, G1) * g1)
    else:
        return tl.zeros(at.shape, tl.float32) + tl.where(g1 != 0, float("nan"), 0.0)


@triton.jit
def sum_of_part(values, inside):
    """The float64 sum of a tile's elements that are there."""
    return tl.sum(tl.where(inside, values, 0.0).to(tl.float64))


@triton.jit
def store_input(input_out, offset, twice, at, value, inside, INPUTS: tl.constexpr):
    """The next model input, once or, `twice` elements behind, once more."""
    value = rounded(value, input_out.dtype.element_ty)
    tl.store(input_out + offset + at, value, mask=inside)
    if INPUTS == 2:
        tl.store(input_out + (twice + offset) + at, value, mask=inside)


@triton.jit(do_not_specialize=["row_count", "row", "batch", "size", "parts"])
def step_kernel(
    rows, row_of, row_count: tl.int64, row: tl.int64,  # float32 [row_count, 16]; int64 [batch] or None
    x, m,  # float32 [batch, size]; [batch, M_PARTS, size], guided [2 batch, M_PARTS, size]
    keys, z,  # int64 [batch], of noise that is drawn; float32 [batch, size], noise that is given
    guidance, factors, bounds,  # float32 [batch] each, or None
    h1, h2, h3, out, x0_out,  # float32 [batch, size]
    input_out,  # [batch, size] INPUTS times
    low, high,  # float32 [size] each, or None
    log_prob_sums,  # float64 [batch, programs of a sample, 2], or None
    batch: tl.int64, size: tl.int64, parts: tl.int64,
    P: tl.constexpr, Q: tl.constexpr, A: tl.constexpr, B: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr,
    C3: tl.constexpr, D: tl.constexpr, S: tl.constexpr, G1: tl.constexpr, LIMITED: tl.constexpr, ENTRY: tl.constexpr,
    M_PARTS: tl.constexpr, INPUTS: tl.constexpr, QUADS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """x', and where they are asked for the row's entry and the next model input."""
    size = sample_size(size, ALIGNED)
    sample, first, end = own_part(batch, size, parts, QUADS)
    if row_of is not None:
        row, known = row_of_sample(row, row_count, row_of, sample)
    own = rows + row * FLOATS
    p, q, b = column(own, AT_P, P), column(own, AT_Q, Q), column(own, AT_B, B)
    c1, c2, c3 = column(own, AT_C1, C1), column(own, AT_C2, C2), column(own, AT_C3, C3)
    s, g1 = column(own, AT_S, S), column(own, AT_G1, G1)
    a, b, d = sum_coefficients(own, b, A, D, LIMITED)
    bound, divisor = limits(own, bounds, sample, LIMITED)
    if factors is not None:
        factor = tl.load(factors + sample)
        q, d = rescaled(q, factor, Q), rescaled(d, factor, D)
    GUIDED: tl.constexpr = guidance is not None
    weight = tl.load(guidance + sample) if GUIDED else 1.0
    next_e = tl.load(own + AT_NEXT_E) if INPUTS > 0 else 1.0
    if S != NEVER and z is None:
        key = tl.load(keys + sample)

    squares, powers = tl.cast(0.0, tl.float64), tl.cast(0.0, tl.float64)
    at = tile_offsets(QUADS)
    for begin in range(first, end, QUADS * 4):
        left = size - begin
        inside = at < left
        offset = sample * size + begin
        half = batch * size * M_PARTS
        of_sample = sample * (size * M_PARTS) + begin + (half if GUIDED else 0)
        output = model_output(m, of_sample, half, weight, at, inside, GUIDED)
        state = tl.load(x + offset + at, mask=inside, other=0.0)  # [QUADS, 4]

        zero = tl.zeros([QUADS, 4], tl.float32)
        total = add(zero, d, output, D)
        if LIMITED != NEVER or x0_out is not None:
            x0 = add(add(zero, p, state, P), q, output, Q)
            if LIMITED != NEVER:
                x0 = clamped(x0, bound, divisor, low, high, begin, at, inside, bounds is not None)
                total = add(total, b, x0, B)
        total = add(total, a, state, A)
        total = add(total, c1, read(h1, offset, at, left, c1, C1), C1)
        total = add(total, c2, read(h2, offset, at, left, c2, C2), C2)
        total = add(total, c3, read(h3, offset, at, left, c3, C3), C3)
        if S != NEVER:
            noise = normals(begin, key, row, 1, QUADS) if z is None else read(z, offset, at, left, s, S)
            if log_prob_sums is not None:
                squares += sum_of_part(noise * noise, inside)
                powers += sum_of_part(exponents(m, of_sample + size, at, left, g1, G1, M_PARTS), inside)
            total = add(total, s, with_variance(noise, m, of_sample + size, at, left, g1, G1, M_PARTS), S)

        # Every operand has been read: outputs may lie in the same memory.
        if row_of is not None:
            total = tl.where(known, total, float("nan"))
        if x0_out is not None:
            kept = entry(own, state, x0, ENTRY)
            if row_of is not None:
                kept = tl.where(known, kept, float("nan"))
            tl.store(x0_out + offset + at, kept, mask=inside)
        tl.store(out + offset + at, total, mask=inside)
        if INPUTS > 0:
            store_input(input_out, offset, batch * size, at, total * next_e, inside, INPUTS)
    if log_prob_sums is not None and first < end:
        own_sums = log_prob_sums + (sample * tl.num_programs(0) + tl.program_id(0)) * 2
        tl.store(own_sums, squares)
        tl.store(own_sums + 1, powers)


def log_prob_parts(batch: int, size: int) -> int:
    """How many parts of a sample the kernel leaves sums of."""
    return blocks_of(batch, size, SUMMED_QUADS).grid[0]


class Step:
    """The step with everything fixed that stays the same from row to row; all tensors contiguous and on one device.

    Args:
        rows: Table.packed on the device, float32 (N, 16).
        row_of: int64 (B,), the row of each sample, read at every call; a row outside the table gives NaN. Or None.
        x: float32 (B, ...), the state.
        keys: int64 (B,), of the noise that is drawn; None without.
        guidance: float32 (B,).
        rescale: phi of the guidance rescale.
        h1, h2, h3: the entries of the last three rows, like x.
        x0_out: of this row's entry, like x; may be one of these.
        input_out: like x or with twice its batch; float32, float16 or bfloat16.
        low, high: float32, like a sample, what x0 is clamped to in rows that limit it; or None.
        log_prob_sums: float64 (B, log_prob_parts, 2), receives for each part the sums of z^2 and of g1 v / ln 2.
        thresholds: whether a row has a quantile.
        host_rows: `rows` on the host; read from the device where not given.
    """

    def __init__(
        self,
        *,
        rows: Tensor,
        row_of: Tensor | None,
        x: Tensor,
        keys: Tensor | None,
        guidance: Tensor | None,
        rescale: float,
        h1: Tensor | None,
        h2: Tensor | None,
        h3: Tensor | None,
        x0_out: Tensor | None,
        input_out: Tensor | None,
        low: Tensor | None,
        high: Tensor | None,
        log_prob_sums: Tensor | None,
        thresholds: bool,
        host_rows: NDArray[np.float32] | None = None,
    ) -> None:
        self._rows, self._row_of, self._x, self._keys, self._guidance = rows, row_of, x, keys, guidance
        self._rescale, self._history, self._x0_out, self._input_out = rescale, (h1, h2, h3), x0_out, input_out
        self._box, self._log_prob_sums = (low, high), log_prob_sums
        batch, self._size = x.shape[0], x.numel() // x.shape[0]
        largest = QUADS if log_prob_sums is None else SUMMED_QUADS
        self._own, self._together = blocks_of(batch, self._size, largest), blocks_of(1, x.numel())
        self._inputs = 0 if input_out is None else len(input_out) // batch
        self._host_rows = rows.cpu().numpy() if host_rows is None else host_rows
        self._constants: dict[tuple[int, bool, bool, bool], dict[str, int]] = {}

        def per_sample() -> Tensor:
            return torch.empty(batch, dtype=torch.float32, device=x.device)

        self._factors = self._bounds = None
        if rescale != 0:
            self._factors = per_sample()
            self._rescale_scratch = reductions.rescale_scratch(batch, self._size, x.device)
        if thresholds:
            self._bounds = per_sample()
            self._threshold_scratch = reductions.threshold_scratch(batch, self._size, x.device)

    def __call__(
        self,
        row: int,
        m: Tensor,
        m_stride: int,
        guided: bool,
        z: Tensor | None,
        out: Tensor,
        keeps_x0: bool,
        writes_input: bool,
    ) -> None:
        """One step into `out`, which may be x.

        m holds m_stride elements a sample, which is the size of one or, with the variance half, twice that; where
        `guided` the unconditional samples come first. z is given noise. x0_out and input_out can be left as they are.
        """
        with on(self._x):
            guidance = self._guidance if guided else None
            factors = self._factors if guided else None
            self._reduce(row, m, m_stride, guidance, factors)
            x0_out = self._x0_out if keeps_x0 else None
            constants = self._constants_of(row, x0_out is not None, z is not None, factors is not None)
            draws = constants["S"] and z is None
            alike = not (draws or guided) and self._row_of is None and self._bounds is None and m_stride == self._size
            alike = alike and self._log_prob_sums is None and self._box[0] is None
            # Where nothing tells the samples apart they are one long one: fewer partial tiles.
            blocks = self._together if alike else self._own
            step_kernel[blocks.grid](
                *(self._rows, self._row_of, len(self._rows), row),
                *(self._x, m),
                *(self._keys if draws else None, z if constants["S"] else None),
                *(guidance, factors, self._bounds if constants["LIMITED"] else None),
                *(*self._history, out, x0_out),
                self._input_out if writes_input else None,
                *(*self._box, self._log_prob_sums),
                *(blocks.batch, blocks.size, blocks.parts),
                **constants,
                M_PARTS=m_stride // self._size,
                INPUTS=self._inputs if writes_input else 0,
                QUADS=blocks.quads,
                ALIGNED=blocks.aligned,
                num_warps=blocks.num_warps,
                enable_fp_fusion=False,
            )

    def _reduce(self, row: int, m: Tensor, m_stride: int, guidance: Tensor | None, factors: Tensor | None) -> None:
        """The guidance rescale's factors and the dynamic threshold's bounds of every sample, where they are wanted."""
        if factors is not None:
            assert guidance is not None
            shape = m_stride, len(self._x), self._size
            reductions.rescale_factor(m, *shape, guidance, self._rescale, self._rescale_scratch, factors)
        if self._bounds is not None:
            reductions.threshold(
                self._rows,
                self._row_of,
                row,
                self._x,
                m,
                m_stride,
                guidance,
                factors,
                self._threshold_scratch,
                self._bounds,
            )

    def _constants_of(self, row: int, keeps_x0: bool, given: bool, rescaled: bool) -> dict[str, int]:
        key = row, keeps_x0, given, rescaled
        if key not in self._constants:
            self._constants[key] = constants_of(
                self._host_rows[row : row + 1] if self._row_of is None else self._host_rows,
                keeps_x0=keeps_x0,
                noise=given or self._keys is not None,
                rescaled=rescaled,
            )
        return self._constants[key]
