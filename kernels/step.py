"""The sampling step, what ops/step.py specifies: one pass over memory, csrc/cpu/step.inl's arithmetic in its order.

Values equal the CPU kernels' bit for bit, but for the sign of an x0 that is 0. What a row uses is known when the kernel
is compiled: a coefficient is 0 in all of the rows that a launch visits, in none, or in some, where operands are masked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample.kernels import reductions
from fastsample.kernels.arithmetic import exp2_of, fma, guide, rounded, tl, triton
from fastsample.kernels.blocks import QUADS, blocks_of, on, own_part, sample_size, tile_offsets
from fastsample.kernels.noise import normals
from fastsample.kernels.variants import DTYPES, Variant

NEVER, ALWAYS, SOMETIMES = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def column(row, index: tl.constexpr, USE: tl.constexpr):
    """A number of the packed row at this address; 0 where no row has another."""
    if USE == NEVER:
        return 0.0
    else:
        return tl.load(row + index)


@triton.jit
def add(total, coefficient, operand, USE: tl.constexpr):
    """total + coefficient operand; where the coefficient is 0 the operand does not matter, a NaN included."""
    if USE == NEVER:
        return total
    elif USE == ALWAYS:
        return fma(operand, coefficient, total)
    else:
        return tl.where(coefficient != 0, fma(operand, coefficient, total), total)


@triton.jit
def read(pointer, offset, at, left, coefficient, USE: tl.constexpr):
    """An operand as floats, unread where its coefficient is 0; NaN where there is none."""
    if pointer is None:
        return tl.full(at.shape, float("nan"), tl.float32)
    else:
        if USE == SOMETIMES:
            left = tl.where(coefficient != 0, left, 0)
        return tl.load(pointer + offset + at, mask=at < left, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["row_count", "row", "batch", "size", "parts"])
def step_kernel(
    rows,  # float32 [row_count, 16]: csrc/common/row.h
    row_of,
    row_count: tl.int64,
    row: tl.int64,
    x,
    m,  # [batch or, guided, 2 batch, M_PARTS, size]
    keys,
    z,
    guidance,
    factors,
    bounds,
    h1,
    h2,
    out,
    x0_out,
    input_out,
    batch: tl.int64,
    size: tl.int64,
    parts: tl.int64,
    P: tl.constexpr,
    Q: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    C1: tl.constexpr,
    C2: tl.constexpr,
    D: tl.constexpr,
    S: tl.constexpr,
    G1: tl.constexpr,
    LIMITED: tl.constexpr,
    M_PARTS: tl.constexpr,
    GUIDED: tl.constexpr,
    INPUTS: tl.constexpr,
    QUADS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    size = sample_size(size, ALIGNED)
    sample, first, end = own_part(batch, size, parts, QUADS)
    known = True
    if row_of is not None:
        row = tl.load(row_of + sample)
        row = tl.where(row < 0, row + row_count, row)
        known = (row >= 0) & (row < row_count)
        row = tl.where(known, row, 0)
    k = rows + row * 16
    p, q, b = column(k, 0, P), column(k, 1, Q), column(k, 3, B)
    c1, c2, s, g1 = column(k, 4, C1), column(k, 5, C2), column(k, 7, S), column(k, 8, G1)
    if LIMITED == NEVER:
        a, d = column(k, 12, A), column(k, 13, D)
    else:
        a, d = column(k, 2, A), column(k, 6, D)
        bound = tl.load(k + 9)
        divisor = 1.0
        if LIMITED == SOMETIMES:
            limited = (bound < float("inf")) | (tl.load(k + 10) > 0)
            a = tl.where(limited, a, column(k, 12, A))
            b = tl.where(limited, b, 0.0)
            d = tl.where(limited, d, column(k, 13, D))
        if bounds is not None:
            bound = tl.load(bounds + sample)
            divisor = tl.where(tl.load(k + 10) > 0, bound, 1.0)
    if factors is not None:
        factor = tl.load(factors + sample)
        # What has no coefficient keeps none: a factor may be NaN.
        if Q != NEVER:
            q = tl.where(q != 0.0, q * factor, 0.0)
        if D != NEVER:
            d = tl.where(d != 0.0, d * factor, 0.0)
    if GUIDED:
        weight = tl.load(guidance + sample)
    if S != NEVER and z is None:
        key = tl.load(keys + sample)
    if INPUTS > 0:
        next_e = tl.load(k + 11)

    at = tile_offsets(QUADS)
    for begin in range(first, end, QUADS * 4):
        left = size - begin
        inside = at < left
        offset = sample * size + begin
        own_m = sample * (size * M_PARTS) + begin
        if GUIDED:
            own_m += batch * size * M_PARTS
        of_m = tl.load(m + own_m + at, mask=inside, other=0.0).to(tl.float32)
        if GUIDED:
            unconditional = tl.load(m + (own_m - batch * size * M_PARTS) + at, mask=inside, other=0.0).to(tl.float32)
            of_m = guide(unconditional, of_m, weight)
        of_x = tl.load(x + offset + at, mask=inside, other=0.0)

        zero = tl.zeros([QUADS, 4], tl.float32)
        total = add(zero, d, of_m, D)
        if LIMITED != NEVER or x0_out is not None:
            x0 = add(add(zero, p, of_x, P), q, of_m, Q)
            if LIMITED != NEVER:
                x0 = tl.minimum(x0, bound, propagate_nan=tl.PropagateNan.ALL)
                x0 = tl.maximum(x0, -bound, propagate_nan=tl.PropagateNan.ALL)
                if bounds is not None:
                    x0 = tl.div_rn(x0, divisor)
                total = add(total, b, x0, B)
        total = add(total, a, of_x, A)
        total = add(total, c1, read(h1, offset, at, left, c1, C1), C1)
        total = add(total, c2, read(h2, offset, at, left, c2, C2), C2)
        if S != NEVER:
            noise = normals(begin, key, row, 1, QUADS) if z is None else read(z, offset, at, left, s, S)
            if G1 != NEVER:
                if M_PARTS == 2:
                    noise *= exp2_of(read(m, own_m + size, at, left, g1, G1) * g1)
                else:
                    # Rows read on the device may ask for a variance half that the host could not check.
                    noise *= tl.where(g1 != 0, float("nan"), 1.0)
            total = add(total, s, noise, S)

        # Every operand has been read: outputs may lie in the same memory.
        if row_of is not None:
            total = tl.where(known, total, float("nan"))
        if x0_out is not None:
            if row_of is not None:
                x0 = tl.where(known, x0, float("nan"))
            tl.store(x0_out + offset + at, x0, mask=inside)
        tl.store(out + offset + at, total, mask=inside)
        if INPUTS > 0:
            scaled = rounded(total * next_e, input_out.dtype.element_ty)
            tl.store(input_out + offset + at, scaled, mask=inside)
            if INPUTS == 2:
                tl.store(input_out + (batch * size + offset) + at, scaled, mask=inside)


def constants_of(rows: NDArray[np.float32], *, keeps_x0: bool, noise: bool, rescaled: bool) -> dict[str, int]:
    """The kernel's constants for these rows of a packed table.

    Args:
        rows: those that a launch may visit, (n, 16).
        keeps_x0: whether x0 is written.
        noise: whether there is noise, for rows that add some.
        rescaled: whether m has a factor, which may be 0.
    """

    def use(values: NDArray[Any]) -> int:
        used = values != 0
        return int((ALWAYS if used.all() else SOMETIMES if used.any() else NEVER).value)

    p, q, a, b, c1, c2, d, s, g1, limit, quantile, _, folded_x, folded_m, *_ = rows.T
    limited = (limit < np.inf) | (quantile > 0)
    a, b, d = np.where(limited, a, folded_x), np.where(limited, b, 0), np.where(limited, d, folded_m)
    found = {"A": use(a), "C1": use(c1), "C2": use(c2), "D": use(d), "LIMITED": use(limited)}
    wants_x0 = keeps_x0 or found["LIMITED"] != NEVER.value
    found |= {name: use(values) if wants_x0 else NEVER.value for name, values in (("P", p), ("Q", q), ("B", b))}
    found |= {name: use(values) if noise else NEVER.value for name, values in (("S", s), ("G1", np.where(s, g1, 0)))}
    return found | {name: SOMETIMES.value for name in "QD" if rescaled and found[name] == ALWAYS.value}


class Step:
    """The step with everything fixed that stays the same from row to row; all tensors contiguous and on one device.

    Args:
        rows: Table.packed on the device, float32 (N, 16).
        row_of: int64 (B,), the row of each sample, read at every call; a row outside the table gives NaN. Or None.
        x: float32 (B, ...), the state.
        keys: int64 (B,), of the noise that is drawn; None without.
        guidance: float32 (B,).
        rescale: phi of the guidance rescale.
        h1, h2: the x0 of the last two rows, like x.
        x0_out: like x; may be h1 or h2.
        input_out: like x or with twice its batch; float32, float16 or bfloat16.
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
        x0_out: Tensor | None,
        input_out: Tensor | None,
        thresholds: bool,
        host_rows: NDArray[np.float32] | None = None,
    ) -> None:
        self._rows, self._row_of, self._x, self._keys, self._guidance = rows, row_of, x, keys, guidance
        self._rescale, self._h1, self._h2, self._x0_out, self._input_out = rescale, h1, h2, x0_out, input_out
        batch, self._size = x.shape[0], x.numel() // x.shape[0]
        self._own, self._together = blocks_of(batch, self._size), blocks_of(1, x.numel())
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
            if factors is not None:
                assert guidance is not None
                reductions.rescale_factor(
                    m, m_stride, self._x.shape[0], self._size, guidance, self._rescale, self._rescale_scratch, factors
                )
            if self._bounds is not None:
                reductions.threshold(
                    self._rows,
                    self._row_of,
                    row,
                    self._x,
                    m,
                    m_stride,
                    guided,
                    guidance,
                    factors,
                    self._threshold_scratch,
                    self._bounds,
                )
            x0_out = self._x0_out if keeps_x0 else None
            key = row, x0_out is None, z is None, factors is None
            constants = self._constants.get(key)
            if constants is None:
                constants = self._constants[key] = constants_of(
                    self._host_rows[row : row + 1] if self._row_of is None else self._host_rows,
                    keeps_x0=x0_out is not None,
                    noise=z is not None or self._keys is not None,
                    rescaled=factors is not None,
                )
            draws = constants["S"] and z is None
            alike = not (draws or guided) and self._row_of is None and self._bounds is None and m_stride == self._size
            # Where nothing tells the samples apart they are one long one: fewer partial tiles.
            blocks = self._together if alike else self._own
            step_kernel[blocks.grid](
                self._rows,
                self._row_of,
                len(self._rows),
                row,
                self._x,
                m,
                self._keys if draws else None,
                z if constants["S"] else None,
                guidance,
                factors,
                self._bounds if constants["LIMITED"] else None,
                self._h1,
                self._h2,
                out,
                x0_out,
                self._input_out if writes_input else None,
                blocks.batch,
                blocks.size,
                blocks.parts,
                **constants,
                M_PARTS=m_stride // self._size,
                GUIDED=guided,
                INPUTS=self._inputs if writes_input else 0,
                QUADS=blocks.quads,
                ALIGNED=blocks.aligned,
                num_warps=blocks.num_warps,
                enable_fp_fusion=False,
            )


def _variant(name: str, dtype: str, used: str, present: str = "", **changed: Any) -> Variant:
    """A specialisation: the coefficients that every row uses and the tensors present, other than those of any step."""
    types = dict.fromkeys(("rows", "x", "z", "guidance", "factors", "bounds", "h1", "h2", "out", "x0_out"), "*fp32")
    types |= {"row_of": "*i64", "keys": "*i64", "m": f"*{DTYPES[dtype]}", "input_out": f"*{DTYPES[dtype]}"}
    given = {"rows", "x", "m", "out", *present.split()}
    constants: dict[str, Any] = dict.fromkeys(("P", "Q", "A", "B", "C1", "C2", "D", "S", "G1", "LIMITED"), NEVER.value)
    constants |= dict.fromkeys(used.split(), ALWAYS.value)
    constants |= {"M_PARTS": 1, "GUIDED": False, "INPUTS": 0, "QUADS": QUADS, "ALIGNED": True, **changed}
    signature = {argument: types.get(argument, "i64") for argument in step_kernel.arg_names}
    constants |= {argument: None for argument in types if argument not in given}
    signature |= dict.fromkeys(constants, "constexpr")
    width = 4 if dtype == "float32" else 2
    streams = 4 * len(given & {"x", "z", "h1", "h2", "out", "x0_out"})
    streams += width * (1 + constants["GUIDED"] + bool(constants["G1"]) + constants["INPUTS"])
    return Variant("step", name, dtype, step_kernel, signature, constants, tuple(given), 4 * QUADS, streams)


def variants() -> list[Variant]:
    """What the static checks compile."""
    mixed = dict.fromkeys(("P", "Q", "B", "C1", "S", "LIMITED"), SOMETIMES.value)
    found = []
    for dtype in DTYPES:
        found += [
            _variant("noise-free", dtype, "A D"),
            _variant("clipped", dtype, "P Q A B LIMITED"),
            _variant("noisy", dtype, "A D S", "keys"),
            _variant("noisy, clipped", dtype, "P Q A B S LIMITED", "keys"),
            _variant("noisy, learned variance", dtype, "P Q A B S G1 LIMITED", "keys", M_PARTS=2),
            _variant("guided", dtype, "A D", "guidance", GUIDED=True),
            _variant("two histories", dtype, "P Q A C1 C2 D", "h1 h2 x0_out"),
            _variant("next input twice", dtype, "A D", "input_out", INPUTS=2),
            _variant(
                "guided, rescaled, dynamic threshold", dtype, "P A LIMITED Q B", "guidance factors bounds", GUIDED=True
            ),
            _variant("rows of samples", dtype, "A D", "row_of keys h1 x0_out", **mixed),
        ]
    return [*found, _variant("noisy, odd size", "float32", "A D S", "keys", ALIGNED=False)]
