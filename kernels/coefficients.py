"""Which coefficients a launch uses: known when a kernel is compiled, so that nothing is read or added for the others.

A coefficient is 0 in none of the rows that a launch visits, in all of them, or in some, where operands are masked.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastsample.kernels.arithmetic import fma, tl, triton
from fastsample.tables import ROW

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
        return tl.load(pointer + offset + at, mask=at < left, other=0.0).to(tl.float32)  # at's shape


def constants_of(rows: NDArray[np.float32], *, keeps_x0: bool, noise: bool, rescaled: bool) -> dict[str, int]:
    """The step kernel's constants for these rows of a packed table.

    Args:
        rows: those that a launch may visit, (n, 16).
        keeps_x0: whether the entry is written.
        noise: whether there is noise, for rows that add some.
        rescaled: whether m has a factor, which may be 0.
    """

    def use(values: NDArray[Any]) -> int:
        used = values != 0
        return int((ALWAYS if used.all() else SOMETIMES if used.any() else NEVER).value)

    of = dict(zip(ROW, rows.T, strict=True))
    limited = (of["limit"] < np.inf) | (of["quantile"] > 0)
    values = {
        "P": of["p"],
        "Q": of["q"],
        "A": of["a"],
        "B": np.where(limited, of["b"], 0),
        "C1": of["c1"],
        "C2": of["c2"],
        "C3": of["c3"],
        "D": of["d"],
        "S": of["s"],
        "G1": np.where(of["s"], of["g1"], 0),
        "LIMITED": limited,
        "ENTRY": (of["hx"] != 0) | (of["h0"] != 1),
    }
    of_x0 = () if keeps_x0 or limited.any() else ("P", "Q", "B")
    of_entry = () if keeps_x0 else ("ENTRY",)
    of_noise = () if noise else ("S", "G1")
    unused = {*of_x0, *of_entry, *of_noise}
    uses = {name: NEVER.value if name in unused else use(values[name]) for name in values}
    return uses | {name: SOMETIMES.value for name in "QD" if rescaled and uses[name] == ALWAYS.value}
