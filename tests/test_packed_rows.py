"""The packed rows that kernels read: their layout, what is folded into them and what overflows."""

from __future__ import annotations

import re

import numpy as np
import pytest

from fastsample import Table
from fastsample.tables import ROW, without_rounding
from support.full_table import COLUMNS, FULL, LEVELS, TIMES
from support.paths import ROOT


def packed(table: Table, name: str, row: int = 0) -> float:
    """What a row holds, the first one where none is named."""
    return float(table.packed[row, ROW.index(name)])


def test_packed_layout_that_kernels_read() -> None:
    """Rows 1, 2 and 3 limit x0, row 0 does not and is folded."""
    table = Table(TIMES, **FULL, **LEVELS)
    p, q, a, b, c1, c2, c3, d, s, g0, g1, limit, quantile, hx, h0, e = (
        np.broadcast_to(np.float64(FULL[name]), 4) for name in COLUMNS
    )
    expected = np.stack(
        [
            *(p, q, a, b, c1, c2, c3, d),
            s * np.exp(g0),
            g1 / np.log(2),
            *(limit, quantile),
            np.array([e[1], e[2], e[3], 1.0]),
            *(hx, h0, np.zeros(4)),
        ],
        axis=1,
    )
    folded = {"p": hx + h0 * p, "q": h0 * q, "a": a + b * p, "d": b * q + d, "hx": np.zeros(4), "h0": np.ones(4)}
    for name, column in folded.items():
        expected[0, ROW.index(name)] = column[0]
    np.testing.assert_array_equal(table.packed, expected.astype(np.float32))
    assert table.packed.dtype == np.float32
    assert table.packed.flags.c_contiguous
    assert table.packed.shape == (4, len(ROW)) == (4, 16)
    assert table.packed_address == table.packed.ctypes.data


def test_a_row_is_the_struct_that_c_reads() -> None:
    header = (ROOT / "csrc" / "common" / "row.h").read_text()
    fields = re.search(r"struct Row \{\s*float ([^;]*);\s*\};", header)
    assert fields is not None
    names = [re.fullmatch(r"(\w+)(?:\[(\d+)\])?", one.strip()) for one in fields[1].split(",")]
    assert tuple(name[1] for name in names if name is not None for _ in range(int(name[2] or 1))) == ROW


def test_the_largest_float32_is_no_overflow() -> None:
    largest = float(np.finfo(np.float32).max)
    assert Table([0], d=largest).packed[0, ROW.index("d")] == largest


def test_what_is_folded_alone_would_overflow_is_no_overflow_beside_a_limit() -> None:
    table = Table([0], p=1e30, q=1e30, a=1.0, b=1e30, h0=1e30, limit=1.0)
    assert np.isfinite(table.packed).all()
    assert packed(table, "a") == 1.0 and packed(table, "p") == packed(table, "h0") == np.float32(1e30)


def test_folding_rounds_once() -> None:
    # a + b*p is 2^-30 in float64; folding rounded columns would give 0.
    table = Table([0], a=-1.0, b=1.0 + 2.0**-30, p=1.0, q=1.0, d=-1.0)
    assert packed(table, "b") == 1.0
    assert packed(table, "a") == packed(table, "d") == 2.0**-30
    entry = Table([0], hx=-1.0, h0=1.0 + 2.0**-30, p=1.0, q=1.0 - 2.0**-30)
    assert packed(entry, "p") == 2.0**-30
    assert packed(entry, "q") == np.float32(1 - 2.0**-60)


@pytest.mark.parametrize("column", [{"limit": 1e39}, {"quantile": 1e-60}], ids=["limit", "quantile"])
def test_a_limit_that_float32_does_not_hold_is_none(column: dict[str, float]) -> None:
    """Kernels ask the packed row whether x0 is limited."""
    table = Table([0], p=2.0, a=0.5, b=1.0, **column)
    assert packed(table, "a") == 2.5


def test_rows_without_entries_of_their_own_fold_to_x0_itself() -> None:
    table = Table([0], p=0.1, q=-0.0)
    assert (packed(table, "p"), packed(table, "q")) == (np.float32(0.1), 0.0)
    assert (packed(table, "hx"), packed(table, "h0")) == (0.0, 1.0)


@pytest.mark.parametrize("sigma", [80.0, 0.6, 0.3, 1e-3])
def test_epsilon_of_a_model_of_epsilon_folds_to_the_output_alone(sigma: float) -> None:
    """x0 = (x - sigma m) / alpha, epsilon = (x - alpha x0) / sigma: 1 m, of x what is left of rounding, which is 0."""
    for alpha in (1.0, 0.8, 0.1 + 0.2, 1 / 3, 1e-4):
        table = Table([0], p=1 / alpha, q=-sigma / alpha, hx=1 / sigma, h0=-alpha / sigma)
        assert packed(table, "p") == 0.0 and packed(table, "q") == 1.0, alpha
        assert table.p[0] == 1 / alpha and table.hx[0] == 1 / sigma, "columns stay as they are given"
        limited = table.replace(limit=1.0)
        assert packed(limited, "p") == np.float32(1 / alpha) and packed(limited, "hx") == np.float32(1 / sigma)


@pytest.mark.parametrize(
    ("one", "other", "total"),
    [
        pytest.param(1.0, 2.0, 3.0, id="sum"),
        pytest.param(0.0, 1e-300, 1e-300, id="nothing-cancels"),
        pytest.param(1.0, -1.0, 0.0, id="exactly"),
        pytest.param(3.0, -3.0 * (1 + 2.0**-51), 0.0, id="but-for-rounding"),
        pytest.param(1e30, -1e30 * (1 - 2.0**-50), 0.0, id="large"),
        pytest.param(1.0, -1 + 2.0**-40, 2.0**-40, id="a-small-rest"),
    ],
)
def test_what_cancels_but_for_rounding_is_0(one: float, other: float, total: float) -> None:
    assert without_rounding(one, other) == total
