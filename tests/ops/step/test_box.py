"""Bounds of each element of x0, which stand in the place of a row's limit, on every backend."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDPM, Schedule, Table, ops
from support.devices import Target
from support.formula import normal
from support.levels import LEVELS, at_level, needs_cpu, on_threads

UNIT = 2.0**-24
SHAPES = [(1, 1), (2, 16, 7), (3, 5, 7), (2, 3, 33, 31), (1, 2, 2048), (2, 1, 2051)]
ROWS: dict[str, dict[str, float]] = {
    "x0-alone": dict(p=1.25, q=-0.75, b=0.9),
    "all-terms": dict(p=1.25, q=-0.75, a=0.2, b=0.9, d=0.3, s=0.5),
    "entry": dict(p=1.25, q=-0.75, a=0.2, b=0.9, hx=0.4, h0=-0.6),
}

OUTPUTS = [*((name, torch.float32) for name in ROWS), ("entry", torch.float16), ("all-terms", torch.bfloat16)]


def box_of(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Other bounds in each place of the last axis, none of them symmetric."""
    low = np.linspace(-1.0, -0.1, shape[-1], dtype=np.float32)
    return low, low + np.float32(0.7)


def expected(x: Tensor, m: Tensor, row: dict[str, float], z: Tensor, low: Any, high: Any) -> tuple[Tensor, Tensor]:
    """(x', the entry) in float64."""
    c = {**dict.fromkeys(("p", "q", "a", "b", "d", "s", "hx"), 0.0), "h0": 1.0, **row}
    x, m, z = x.double(), m.double(), z.double()
    x0 = (c["p"] * x + c["q"] * m).clamp(torch.as_tensor(low).double(), torch.as_tensor(high).double())
    return c["a"] * x + c["b"] * x0 + c["d"] * m + c["s"] * z, c["hx"] * x + c["h0"] * x0


@pytest.mark.parametrize(("name", "dtype"), OUTPUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(any_backend: Target, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, m, z = 2 * normal(shape, 1), normal(shape, 2, dtype), normal(shape, 3)
    low, high = box_of(shape)
    table = Table([1, 0], limit=1.0, box=(low, high), **ROWS[name])
    on = any_backend.device
    entry = torch.full(shape, math.nan, device=on)
    model_input = torch.full(shape, math.nan, dtype=dtype, device=on)
    got = ops.step(
        *(x.to(on), m.to(on), table, 0),
        noise=z.to(on),
        x0_out=entry,
        input_out=model_input,
        backend=any_backend.backend,
    )
    state, kept = expected(x, m, ROWS[name], z, low, high)
    size = 6 * UNIT * (4 * x.abs() + 2 * m.abs() + z.abs()).double()
    assert ((got.cpu().double() - state).abs() <= size).all()
    assert ((entry.cpu().double() - kept).abs() <= size).all()
    assert torch.equal(model_input.cpu(), got.cpu().to(dtype))


def test_rows_without_a_limit_have_none(any_backend: Target) -> None:
    x, m = 2 * normal((3, 4, 7), 1), normal((3, 4, 7), 2)
    columns = dict(p=1.25, q=-0.75, b=[0.9, 0.9, 0.9], limit=[1.0, math.inf, 1.0])
    boxed, free = Table([2, 1, 0], **columns, box=box_of((7,))), Table([2, 1, 0], **{**columns, "limit": math.inf})
    on, rows = any_backend.device, torch.tensor([0, 1, 1])
    got = ops.step(x.to(on), m.to(on), boxed, rows.to(on), backend=any_backend.backend).cpu()
    plain = ops.step(x, m, free, 1, backend="reference")
    low, high = (torch.from_numpy(one) for one in box_of((7,)))
    torch.testing.assert_close(got[1:], plain[1:], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got[0], 0.9 * (1.25 * x[0] - 0.75 * m[0]).clamp(low, high), rtol=1e-6, atol=1e-6)


def test_guided_in_place_and_nan(any_backend: Target) -> None:
    x, m = 2 * normal((2, 3, 7), 1), normal((4, 3, 7), 2)
    m[2, 1, 1] = math.nan
    table, on = Table([0], p=1.25, q=-0.75, b=1.0, limit=1.0, box=box_of((7,))), any_backend.device
    want = ops.step(x, m, table, 0, guidance=[3.0, 1.0], guidance_rescale=0.5, backend="reference")
    state = x.to(on, copy=True)
    ops.step(
        *(state, m.to(on), table, 0), guidance=[3.0, 1.0], guidance_rescale=0.5, out=state, backend=any_backend.backend
    )
    torch.testing.assert_close(state.cpu(), want, rtol=1e-5, atol=1e-5, equal_nan=True)
    assert want[0].isnan().all() and want[1].isfinite().all()


@needs_cpu
def test_same_bits_on_every_level_and_thread_count() -> None:
    x, m = 2 * normal((3, 2, 4099), 1), normal((3, 2, 4099), 2, torch.bfloat16)
    table = Table([1, 0], limit=1.0, box=box_of((4099,)), **ROWS["all-terms"])
    results = set()
    for level in LEVELS:
        for threads in (1, 3):
            with at_level(level), on_threads(threads):
                results.add(ops.step(x, m, table, 0, seed=5, backend="cpu").numpy().tobytes())
    assert len(results) == 1


def test_a_symmetric_box_is_the_limit(backend: str) -> None:
    x, m = 2 * normal((2, 3, 700), 1), normal((2, 3, 700), 2)
    plain, boxed = (Table([0], **ROWS["all-terms"], limit=0.8, **box) for box in ({}, {"box": (-0.8, 0.8)}))
    one, other = (ops.step(x, m, table, 0, seed=1, backend=backend) for table in (plain, boxed))
    assert torch.equal(one, other)


def test_posterior(any_backend: Target) -> None:
    x, m = normal((2, 3, 7), 1), normal((2, 3, 7), 2)
    sampler = DDPM(Schedule.linear(), steps=5, clip=([-0.5] * 7, [0.2] * 7))
    want, _ = ops.posterior(x.double(), m.double(), sampler.table, 2)
    got, _ = ops.posterior(
        x.to(any_backend.device), m.to(any_backend.device), sampler.table, 2, backend=any_backend.backend
    )
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-6, atol=1e-6)


def test_compiled_steps_are_refused() -> None:
    table = Table([0], q=1.0, b=1.0, limit=1.0, box=(-0.5, 0.2))
    with pytest.raises(Exception, match=r"clip=\(low, high\) cannot be compiled"):
        torch.compile(ops.step, backend="eager")(torch.zeros(1, 3), torch.zeros(1, 3), table, 0)


@pytest.mark.parametrize(
    ("box", "message"),
    [
        pytest.param((0.5, -0.5), "low <= high", id="upside-down"),
        pytest.param((-math.inf, 1.0), "finite", id="infinite"),
        pytest.param((math.nan, 1.0), "finite", id="nan"),
        pytest.param(([0.0, 1.0], [1.0, 2.0, 3.0]), "of one shape", id="two-shapes"),
    ],
)
def test_tables_refuse(box: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Table([0], limit=1.0, box=box)
    with pytest.raises(ValueError, match="give one of them"):
        Table([0], limit=1.0, quantile=0.9, box=(-1.0, 1.0))


@pytest.mark.parametrize("shape", [(2, 3), (2, 7, 3), (2,)], ids=str)
def test_a_box_must_fit_the_sample(backend: str, shape: tuple[int, ...]) -> None:
    table, out = Table([0], q=1.0, b=1.0, limit=1.0, box=box_of((7,))), torch.full(shape, math.nan)
    with pytest.raises(ValueError, match=r"clip=\(low, high\) of shape \(7,\) does not broadcast"):
        ops.step(torch.zeros(shape), torch.zeros(shape), table, 0, out=out, backend=backend)
    assert out.isnan().all()
