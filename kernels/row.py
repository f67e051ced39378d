"""A packed row of a table in a kernel's terms: where its numbers lie, and which row a sample has."""

from __future__ import annotations

from fastsample.kernels.arithmetic import tl, triton
from fastsample.tables import ROW

FLOATS = tl.constexpr(len(ROW))
"""From one row to the next."""

AT_P = tl.constexpr(ROW.index("p"))
AT_Q = tl.constexpr(ROW.index("q"))
AT_A = tl.constexpr(ROW.index("a"))
AT_B = tl.constexpr(ROW.index("b"))
AT_C1 = tl.constexpr(ROW.index("c1"))
AT_C2 = tl.constexpr(ROW.index("c2"))
AT_C3 = tl.constexpr(ROW.index("c3"))
AT_D = tl.constexpr(ROW.index("d"))
AT_S = tl.constexpr(ROW.index("s"))
AT_G1 = tl.constexpr(ROW.index("g1"))
AT_LIMIT = tl.constexpr(ROW.index("limit"))
AT_QUANTILE = tl.constexpr(ROW.index("quantile"))
AT_NEXT_E = tl.constexpr(ROW.index("next_e"))
AT_HX = tl.constexpr(ROW.index("hx"))
AT_H0 = tl.constexpr(ROW.index("h0"))


@triton.jit
def row_of_sample(row, row_count, row_of, sample):
    """(index of the sample's row, whether there is such a row): `row` of all samples where row_of is None.

    The index is 0 where there is none. Rows in row_of count from the end where they are negative.
    """
    index = tl.cast(row, tl.int64)
    if row_of is not None:
        index = tl.load(row_of + sample)
        index = tl.where(index < 0, index + row_count, index)
    exists = (index >= 0) & (index < row_count)
    return tl.where(exists, index, 0), exists
