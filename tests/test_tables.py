"""Tables as values: their columns, what kernels read, equality, copies and what is refused."""

import copy
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fastsample import DDIM, Schedule, Table
from fastsample.tables import ROW
from support.full_table import COLUMNS, DEFAULTS, FULL, LEVELS, TIMES


@pytest.fixture
def table() -> Table:
    return Table(TIMES, **FULL, **LEVELS)


# Construction


def test_columns_left_out_take_their_defaults() -> None:
    table = Table([3, 1])
    for name, default in DEFAULTS.items():
        column = getattr(table, name)
        assert column.tolist() == [default, default] and column.dtype == np.float64, name
    assert table.alpha is None and table.sigma is None and table.init_noise_sigma == 1.0


def test_numbers_are_broadcast_and_arrays_kept(table: Table) -> None:
    for name, given in FULL.items():
        assert getattr(table, name).tolist() == (given if isinstance(given, list) else [given] * 4), name
    assert table.alpha is not None and table.alpha.tolist() == LEVELS["alpha"] and table.alpha.dtype == np.float64
    assert table.sigma is not None and table.sigma.tolist() == LEVELS["sigma"]
    assert table.init_noise_sigma == 14.6


@pytest.mark.parametrize(
    ("t", "dtype", "kept"),
    [
        pytest.param([9, 0], np.int64, [9, 0], id="list"),
        pytest.param(np.array([9, 0], dtype=np.int32), np.int64, [9, 0], id="int32"),
        pytest.param([0.5, 0.25], np.float32, [0.5, 0.25], id="floats"),
        pytest.param(np.array([0.1]), np.float32, [np.float32(0.1)], id="float64"),
    ],
)
def test_times_are_int64_or_float32(t: Any, dtype: type, kept: list[float]) -> None:
    table = Table(t)
    assert table.t.dtype == dtype
    assert table.t.tolist() == kept


@pytest.mark.parametrize(
    ("t", "columns", "message"),
    [
        pytest.param([], {}, r"t must be a non-empty 1-D array, got shape \(0,\)", id="no-rows"),
        pytest.param(5, {}, r"non-empty 1-D array, got shape \(\)", id="scalar-t"),
        pytest.param([[1, 2]], {}, r"non-empty 1-D array, got shape \(1, 2\)", id="2-d-t"),
        pytest.param([1.0, math.nan], {}, "t .*nan", id="nan-t"),
        pytest.param([1.0, math.inf], {}, "t .*inf", id="infinite-t"),
        pytest.param([1, 0], {"c4": 1.0}, f"no column c4; its columns are {', '.join(COLUMNS)}", id="unknown"),
        pytest.param([1, 0], {"z": 1, "A": 1}, "no column A, z;", id="two-unknown"),
        pytest.param([1, 0], {"a": [1.0, 2.0, 3.0]}, r"column a must have shape \(2,\), got \(3,\)", id="too-long"),
        pytest.param([1, 0], {"a": [[1.0, 2.0]]}, r"column a must have shape \(2,\), got \(1, 2\)", id="2-d"),
        *[
            pytest.param(
                [7, 3], {name: [DEFAULTS[name], bad]}, rf"column {name} is {bad} in row 1 \(t = 3\)", id=f"{bad}-{name}"
            )
            for name in COLUMNS
            if name != "limit"
            for bad in (math.nan, -math.inf)
        ],
        pytest.param([1, 0], {"limit": [1.0, 0.0]}, "limit must be positive, got 0.0", id="zero-limit"),
        pytest.param([1, 0], {"limit": -1.0}, "limit must be positive, got -1.0", id="negative-limit"),
        pytest.param([1, 0], {"limit": [math.nan, 1.0]}, "limit must be positive, got nan", id="nan-limit"),
        pytest.param(
            [1, 0], {"quantile": [0.5, 1.001]}, r"column quantile must lie in \[0, 1\]", id="quantile-above-1"
        ),
        pytest.param(
            [1, 0], {"quantile": [-0.1, 0.5]}, r"column quantile must lie in \[0, 1\]", id="negative-quantile"
        ),
        pytest.param([1, 0], {"e": [1.0, 0.0]}, "column e must not be 0", id="zero-e"),
        pytest.param([1, 0], {"c1": 1.0}, "column c1 must be 0 in the first 1", id="history-in-the-first-row"),
        pytest.param(
            [2, 1, 0], {"c2": [0.0, 1.0, 1.0]}, "column c2 must be 0 in the first 2", id="h2-in-the-second-row"
        ),
        pytest.param(
            *([3, 2, 1, 0], {"c3": [0.0, 0.0, 1.0, 1.0]}),
            r"column c3 must be 0 in the first 3 row\(s\), where there is no such entry",
            id="h3-in-the-third-row",
        ),
        pytest.param([1, 0], {"p": 1e39}, "overflows float32", id="overflow"),
        pytest.param([1, 0], {"e": [1.0, 1e39]}, "overflows float32", id="e-overflows"),
        pytest.param([1, 0], {"p": 1e30, "b": 1e30}, "overflows float32", id="folded-x-overflows"),
        pytest.param([1, 0], {"q": -1e30, "b": 1e30}, "overflows float32", id="folded-m-overflows"),
        pytest.param([1, 0], {"p": 1e30, "h0": 1e30}, "overflows float32", id="folded-x-of-the-entry-overflows"),
        pytest.param([1, 0], {"q": -1e30, "h0": 1e30}, "overflows float32", id="folded-m-of-the-entry-overflows"),
        pytest.param([1, 0], {"p": 1.0, "limit": 1.0, "hx": 1e39}, "overflows float32", id="hx-overflows"),
        pytest.param([1, 0], {"s": 1.0, "g0": 90.0}, "overflows float32", id="folded-s-overflows"),
        # Beyond float64 too: a clean error, no RuntimeWarning on the way.
        pytest.param([1, 0], {"p": 1e200, "b": 1e200}, "overflows float32", id="folded-overflows-float64"),
        pytest.param([1, 0], {"s": 1.0, "g0": 800.0}, "overflows float32", id="folded-s-overflows-float64"),
        pytest.param([1, 0], {"s": 0.0, "g0": 800.0}, "overflows float32", id="no-noise-times-infinity"),
        pytest.param([1, 0], {"alpha": [1.0, 1.0, 1.0]}, "sigma must be 3 finite numbers", id="alpha-alone"),
        pytest.param([1, 0], {"sigma": [1.0, 1.0, 1.0]}, "alpha must be 3 finite numbers", id="sigma-alone"),
        pytest.param([1, 0], {"alpha": [1.0] * 2, "sigma": [1.0] * 3}, r"alpha .* got shape \(2,\)", id="levels-short"),
        pytest.param(
            [1, 0], {"alpha": [1.0] * 3, "sigma": [1.0, 1.0, math.nan]}, "sigma must be 3 finite", id="nan-level"
        ),
        *[
            pytest.param(
                [1, 0], {"init_noise_sigma": bad}, "init_noise_sigma must be positive and finite", id=f"scale-{bad}"
            )
            for bad in (0.0, -1.0, math.inf, math.nan)
        ],
    ],
)
@pytest.mark.filterwarnings("error")
def test_construction_refused(t: Any, columns: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table(t, **columns)


# What a table tells


def test_what_is_derived_is_made_once() -> None:
    made: list[Table] = []
    table = Table([0], p=1.0)
    for key in ("one", ("another", 2), "one"):
        assert table.derived(key, lambda own: made.append(own) or len(made)) == (1 if key == "one" else 2)
    assert len(made) == 2 and all(one is table for one in made)
    assert pickle.loads(pickle.dumps(table)).derived("one", lambda own: "new") == "new"


def test_what_rows_do(table: Table) -> None:
    assert table.stochastic == (True, True, False, True)
    assert table.learned == (False, True, True, True)
    assert table.reads == (0, 1, 2, 3)
    assert table.history == 3
    assert table.keeps_entry == (True, True, False, False), "c1 is 0 in the last row"
    assert not table.remembers_x0
    assert table.thresholded and table.scaled
    assert table.times == (9, 5, 2, 0) and {type(t) for t in table.times} == {int}
    assert table.levels == ((0.4, 0.6), (0.6, 0.4), (0.8, 0.2), (1.0, 0.0)), "those that rows lead to"
    assert {type(value) for level in table.levels for value in level} == {float}


def test_what_plain_rows_do() -> None:
    plain = Table([0.5, 0.25, 0.125], a=1.0)
    assert plain.stochastic == plain.learned == plain.keeps_entry == (False, False, False)
    assert plain.reads == (0, 0, 0) and plain.history == 0 and plain.remembers_x0
    assert not plain.thresholded and not plain.scaled
    assert plain.times == (0.5, 0.25, 0.125)
    assert np.isnan(plain.levels).all() and np.shape(plain.levels) == (3, 2)


@pytest.mark.parametrize(
    ("columns", "remembers"),
    [
        pytest.param({}, True, id="left-out"),
        pytest.param({"hx": 0.0, "h0": [1.0, 1.0]}, True, id="as-left-out"),
        pytest.param({"hx": [0.0, 0.5]}, False, id="x-once"),
        pytest.param({"h0": [1.0, 0.5]}, False, id="half-of-x0-once"),
        pytest.param({"h0": 0.0}, False, id="nothing"),
    ],
)
def test_entries_are_x0_itself_where_no_row_has_others(columns: dict[str, Any], remembers: bool) -> None:
    assert Table([1, 0], p=2.0, **columns).remembers_x0 is remembers


@pytest.mark.parametrize(
    ("c1", "c2", "c3", "keeps", "reads"),
    [
        pytest.param([0], [0], [0], [0], [0], id="one-row"),
        pytest.param([0, 1], [0, 0], [0, 0], [1, 0], [0, 1], id="two-rows"),
        pytest.param([0, 0, 1, 0], [0] * 4, [0] * 4, [0, 1, 0, 0], [0, 0, 1, 0], id="h1-once"),
        pytest.param([0] * 4, [0, 0, 1, 0], [0] * 4, [1, 0, 0, 0], [0, 0, 2, 0], id="h2-alone"),
        pytest.param([0] * 4, [0] * 4, [0, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 3], id="h3-alone"),
        pytest.param([0, 1, 1, 1], [0, 0, 1, 1], [0] * 4, [1, 1, 1, 0], [0, 1, 2, 2], id="third-order"),
        pytest.param([0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [1] * 4 + [0], [0, 1, 2, 3, 3], id="fourth"),
        pytest.param([0, 0, 0, -1], [0, 0, 0, -1], [0] * 4, [0, 1, 1, 0], [0, 0, 0, 2], id="at-the-end"),
        pytest.param([0] * 6, [0] * 6, [0, 0, 0, 0, -1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 3, 0], id="h3-once"),
    ],
)
def test_an_entry_is_kept_where_a_later_row_reads_it(
    c1: list[float], c2: list[float], c3: list[float], keeps: list[int], reads: list[int]
) -> None:
    table = Table(np.arange(len(c1)), c1=c1, c2=c2, c3=c3)
    assert table.keeps_entry == tuple(map(bool, keeps))
    assert table.reads == tuple(reads) and table.history == max(reads)


def test_immutable(table: Table) -> None:
    for name in ("t", "alpha", "sigma", *COLUMNS, "packed"):
        with pytest.raises(ValueError, match="read-only"):
            getattr(table, name)[0] = 1
    for name in ("t", "alpha", "sigma", "init_noise_sigma", *COLUMNS, "packed", "history"):
        with pytest.raises(AttributeError, match=re.escape(f"cannot set {name!r}; use .replace({name}=...)")):
            setattr(table, name, 1)


def test_the_callers_arrays_are_copied_and_stay_writable() -> None:
    t, a, alpha, sigma = np.array([5, 3]), np.array([1.0, 2.0]), np.array([1.0, 2.0, 3.0]), np.array([3.0, 2.0, 1.0])
    table = Table(t, a=a, alpha=alpha, sigma=sigma)
    t[0] = a[0] = alpha[0] = sigma[0] = 7
    assert table == Table([5, 3], a=[1.0, 2.0], alpha=[1.0, 2.0, 3.0], sigma=[3.0, 2.0, 1.0])


def test_replace_leaves_the_original(table: Table) -> None:
    sigma = [5.0, 4.0, 3.0, 2.0, 1.0]
    changed = table.replace(b=0.0, limit=math.inf, t=[8, 4, 2, 1], init_noise_sigma=2.0, sigma=sigma)
    want = {**FULL, **LEVELS, "b": 0.0, "limit": math.inf, "init_noise_sigma": 2.0, "sigma": sigma}
    assert changed == Table([8, 4, 2, 1], **want)
    assert changed.packed[0, ROW.index("a")] == np.float32(0.1), "folded again"
    assert table == Table(TIMES, **FULL, **LEVELS)
    assert table.replace() == table
    assert table.replace(alpha=None, sigma=None) == Table(TIMES, **FULL, init_noise_sigma=14.6)


def test_replace_checks_as_construction_does(table: Table) -> None:
    with pytest.raises(ValueError, match="column a is nan in row 0"):
        table.replace(a=math.nan)
    with pytest.raises(ValueError, match=r"column p must have shape \(2,\)"):
        table.replace(t=[1, 0])


def test_iteration_yields_rows_as_dicts_of_plain_numbers(table: Table) -> None:
    rows = list(table)
    assert len(rows) == 4
    assert list(rows[0]) == ["t", *COLUMNS]
    assert rows[1] == {"t": 5, **{name: given[1] if isinstance(given, list) else given for name, given in FULL.items()}}
    assert type(rows[1]["t"]) is int
    assert {type(rows[1][name]) for name in COLUMNS} == {float}
    assert type(next(iter(Table([0.5])))["t"]) is float


# What a table looks like


def test_repr_is_a_table_of_the_columns_in_use() -> None:
    sampler = DDIM(Schedule.linear(), steps=4, timesteps="leading", eta=1.0, clip=1.0)
    assert repr(sampler.table) == (
        "Table of 4 rows: x0 = p x + q m, clamped to limit; x' = a x + b x0 + s z\n"
        "  k    t           p           q           a           b           s       limit\n"
        "  0  750      17.407     -17.379     0.19057     0.26797     0.94128           1\n"
        "  1  500      3.5853      -3.443     0.20045     0.66619     0.66447           1\n"
        "  2  250      1.3849    -0.95803  0.00015089     0.99984   0.0099995           1\n"
        "  3    0      1.0001   -0.010001           0           1           0           1"
    )
    assert repr(Table([0.5, 12.25], d=2.0)) == (
        "Table of 2 rows: x0 = 0; x' = d m\n  k      t           d\n  0    0.5           2\n  1  12.25           2"
    )


@pytest.mark.parametrize(
    ("columns", "formula"),
    [
        pytest.param({}, "x0 = 0; x' = 0", id="nothing"),
        pytest.param({"q": 1.0, "b": 1.0}, "x0 = q m; x' = b x0", id="x0-prediction"),
        pytest.param({"c1": [0, 0, 0, 1.0], "c2": [0, 0, 0, 1.0]}, "x0 = 0; x' = c1 h1 + c2 h2", id="history"),
        pytest.param({"c3": [0, 0, 0, 1.0]}, "x0 = 0; x' = c3 h3", id="third-history"),
        pytest.param({"p": 1.0, "hx": 0.5}, "x0 = p x; h = hx x + x0; x' = 0", id="entry-of-x-and-x0"),
        pytest.param({"p": 1.0, "hx": 0.5, "h0": 0.0}, "x0 = p x; h = hx x + h0 x0; x' = 0", id="entry-of-x"),
        pytest.param({"s": 1.0, "g0": 1.0, "g1": 1.0}, "x0 = 0; x' = s exp(g0 + g1 v) z", id="learned"),
        pytest.param({"s": 1.0, "g1": 1.0}, "x0 = 0; x' = s exp(g1 v) z", id="learned-log-variance"),
        pytest.param({"a": 1.0, "s": 1.0, "g0": 1.0}, "x0 = 0; x' = a x + s exp(g0) z", id="constant-factor"),
        pytest.param({"a": 1.0, "e": 0.5}, "x0 = 0; x' = a x; the model is given e x", id="scaled-input"),
        pytest.param({"p": 1.0, "limit": 1.0}, "x0 = p x, clamped to limit; x' = 0", id="clamped"),
        pytest.param({"p": 1.0, "quantile": 0.9}, "x0 = p x, thresholded; x' = 0", id="thresholded"),
        pytest.param(
            {"p": 1.0, "quantile": 0.9, "limit": 2.0}, "x0 = p x, thresholded; x' = 0", id="thresholded-to-a-limit"
        ),
        pytest.param(
            {"p": 1.0, "limit": 1.0, "h0": 0.5}, "x0 = p x, clamped to limit; h = h0 x0; x' = 0", id="entry-of-x0"
        ),
        pytest.param(
            FULL,
            "x0 = p x + q m, thresholded; h = hx x + h0 x0; "
            "x' = a x + b x0 + c1 h1 + c2 h2 + c3 h3 + d m + s exp(g0 + g1 v) z; the model is given e x",
            id="everything",
        ),
    ],
)
def test_repr_shows_the_terms_in_use(columns: dict[str, Any], formula: str) -> None:
    shown, header, *rows = repr(Table(TIMES, **columns)).split("\n")
    assert shown == f"Table of 4 rows: {formula}"
    assert header.split() == ["k", "t", *(name for name in COLUMNS if name in columns)]
    assert len(rows) == 4 and {len(row) for row in rows} == {len(header)}


def test_repr_of_a_long_table_leaves_rows_out() -> None:
    lines = repr(Table(np.arange(200), a=1.0)).split("\n")
    assert [line.split()[0] for line in lines[2:]] == [*map(str, range(10)), "...", *map(str, range(190, 200))]
    assert len(repr(Table(np.arange(60))).split("\n")) == 62


# Equality and copies

COPIES: dict[str, Callable[[Table], Table]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda table: pickle.loads(pickle.dumps(table)),
}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("t", [TIMES, [0.9, 0.5, 0.2, 0.1]], ids=["int64", "float32"])
@pytest.mark.parametrize("levels", [LEVELS, {}], ids=["levels", "no-levels"])
def test_copies_are_equal_and_stand_alone(
    duplicate: Callable[[Table], Table], t: list[float], levels: dict[str, Any]
) -> None:
    original = Table(t, **FULL, **levels)
    copied = duplicate(original)
    assert copied == original
    assert hash(copied) == hash(original)
    np.testing.assert_array_equal(copied.packed, original.packed)
    assert copied.packed_address == copied.packed.ctypes.data, "an address does not travel"
    for name in ("stochastic", "learned", "keeps_entry", "reads", "history", "remembers_x0", "times"):
        assert getattr(copied, name) == getattr(original, name), name
    with pytest.raises(ValueError, match="read-only"):
        copied.packed[0, 0] = 1.0


def test_equality_is_by_value(table: Table) -> None:
    assert table == Table(TIMES, **FULL, **LEVELS)
    assert table != Table([9, 5, 2, 1], **FULL, **LEVELS)
    for name in COLUMNS:
        assert table != table.replace(**{name: getattr(table, name) * 0.5}), name
    for name, value in (("alpha", table.sigma), ("sigma", table.alpha), ("init_noise_sigma", 1.0)):
        assert table != table.replace(**{name: value}), name
    assert table != table.replace(alpha=None, sigma=None)
    assert table != "table"
    assert table != Table([9])
    assert len({table, Table(TIMES, **FULL, **LEVELS), table.replace(a=0.0)}) == 2


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(Table([1], q=0.0), Table([1], q=-0.0), id="sign-of-zero"),
        pytest.param(Table([0.0], q=1.0), Table([-0.0], q=1.0), id="sign-of-time-zero"),
        pytest.param(Table([1.0], q=0.5), Table([1], q=0.5), id="float-and-integer-time"),
    ],
)
def test_equal_tables_hash_alike(one: Table, other: Table) -> None:
    assert one != other or hash(one) == hash(other)
