"""Random steps for hypothesis: any table, shape, dtype, order of memory and operands; and what they are held to."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from fastsample import Table, ops
from fastsample.ops.noise import STEP
from fastsample.tables import HISTORY
from support.formula import UNIT, Expected, assert_matches, expected, normal
from support.levels import LEVELS, at_level

ROWS = 4
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


class Example(NamedTuple):
    """One step: `columns` make its table, `batch` and `rest` the shape; the rest are ways to call it."""

    columns: dict[str, list[float]]
    row: int | tuple[int, ...]
    batch: int
    rest: tuple[int, ...]
    dtype: torch.dtype
    doubled: bool
    guidance: float | tuple[float, ...] | None
    rescale: float
    transposed: bool
    in_place: bool
    unread_is_nan: bool
    seed: int
    index: int
    level: str


def coefficients(zeros: int) -> st.SearchStrategy[list[float]]:
    # Nothing near the smallest floats, where errors are no longer relative.
    size = st.floats(2**-10, 2, width=32)
    one = st.one_of(st.just(0.0), st.sampled_from([1.0, -1.0]), size, size.map(lambda value: -value))
    return st.lists(one, min_size=ROWS, max_size=ROWS).map(lambda found: [0.0] * zeros + found[zeros:])


@st.composite
def examples(draw: st.DrawFn) -> Example:
    columns = {name: draw(coefficients(0)) for name in ("p", "q", "a", "b", "d")}
    for zeros, name in enumerate(HISTORY, start=1):
        columns[name] = draw(st.just([0.0] * ROWS) | coefficients(zeros))
    columns |= {name: draw(st.just([usual] * ROWS) | coefficients(0)) for name, usual in (("hx", 0.0), ("h0", 1.0))}
    columns["s"] = draw(st.just([0.0] * ROWS) | coefficients(0))
    columns["g0"] = draw(st.just([0.0] * ROWS) | coefficients(0))
    doubled = draw(st.booleans())
    columns["g1"] = draw(st.just([0.0] * ROWS) | coefficients(0)) if doubled else [0.0] * ROWS
    columns["e"] = draw(st.lists(st.sampled_from([1.0, 0.5, -1.5]), min_size=ROWS, max_size=ROWS))
    unlimited, limits = st.just([float("inf")] * ROWS), st.lists(st.floats(0.25, 4), min_size=ROWS, max_size=ROWS)
    columns["limit"] = draw(unlimited | limits)
    if draw(st.integers(0, 3)) == 0:
        columns["quantile"] = [draw(st.sampled_from([0.5, 0.9, 1.0]))] * ROWS
        columns["limit"] = [max(limit, 1.0) for limit in columns["limit"]]
    batch = draw(st.integers(1, 3))
    rest = draw(st.sampled_from([(1,), (7,), (3, 5), (2, 3, 17), (4, 33), (1, 1030), (3, 64, 11)]))
    guidance = draw(
        st.none()
        | st.floats(-3, 8, width=32)
        | st.lists(st.floats(0, 8, width=32), min_size=batch, max_size=batch).map(tuple)
    )
    return Example(
        columns,
        draw(st.integers(0, ROWS - 1) | st.lists(st.integers(0, ROWS - 1), min_size=batch, max_size=batch).map(tuple)),
        batch,
        rest,
        draw(st.sampled_from(DTYPES)),
        doubled,
        guidance,
        draw(st.sampled_from([0.0, 0.5, 1.0])) if guidance is not None else 0.0,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(0, 2**64 - 1)),
        draw(st.integers(0, 2**40)),
        draw(st.sampled_from(LEVELS)),
    )


def check(example: Example) -> None:
    """The step at the example's level against the formula in float64, within what float32 may lose."""
    table, shape = Table(range(ROWS), **example.columns), (example.batch, *example.rest)
    x, *history = (normal(shape, seed) for seed in (1, 2, 3, 6))
    m = normal((example.batch * (1 if example.guidance is None else 2), *shape[1:]), 4)
    if example.doubled:
        m = torch.cat([m, normal(m.shape, 5)], dim=1)
    m = m.to(example.dtype)
    rows = [example.row] * example.batch if isinstance(example.row, int) else list(example.row)
    z = torch.cat([_noise(example, place, row) for place, row in enumerate(rows)])
    given: dict[str, Any] = {"guidance": _plain(example.guidance), "rescale": example.rescale}
    want = expected(x, m.float(), table, rows, z=z, history=history, **given)
    if example.unread_is_nan:
        _spoil(table, rows, history)
    _compare(example, table, (x, m, *history), want)


def _noise(example: Example, place: int, row: int) -> Tensor:
    alone = (1, *example.rest)
    return ops.randn(alone, seed=example.seed, index=example.index + place, step=row, stream=STEP)


def _compare(example: Example, table: Table, operands: tuple[Tensor, ...], want: Expected) -> None:
    x, m, *history = (_transposed(one) if example.transposed else one for one in operands)
    entry, model_input = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    row = example.row if isinstance(example.row, int) else torch.tensor(example.row)
    with at_level(example.level):
        got = ops.step(
            x,
            m,
            table,
            row,
            seed=example.seed,
            index=example.index,
            guidance=_plain(example.guidance),
            guidance_rescale=example.rescale,
            history=history,
            out=x if example.in_place else None,
            x0_out=entry,
            input_out=model_input,
            backend="cpu",
        )
    assert_matches(got, want.state, want.state_error)
    assert_matches(entry, want.entry, want.entry_error)
    # The scale and the product, each rounded, beside what the state has.
    assert_matches(model_input, want.model_input, 1.5 * want.state_error + 2 * UNIT * abs(want.model_input))


def _spoil(table: Table, rows: list[int], history: list[Tensor]) -> None:
    """NaN in a history that the sample's row does not read."""
    for i, row in enumerate(rows):
        for name, earlier in zip(HISTORY, history, strict=True):
            if getattr(table, name)[row] == 0:
                earlier[i] = torch.nan


def _transposed(tensor: Tensor) -> Tensor:
    """The same values in another order of memory."""
    return tensor.transpose(0, -1).contiguous().transpose(0, -1)


def _plain(guidance: float | tuple[float, ...] | None) -> float | list[float] | None:
    return list(guidance) if isinstance(guidance, tuple) else guidance
