"""The loop over hand-made tables: history, learned variance, scaled inputs, fractional times and corrected x0."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import Sampler, Table, ops
from support.formula import UNIT

SHAPE = (2, 3, 6, 5)
X = ops.randn(SHAPE, seed=5)
N = 6
TIMES = [900, 700, 500, 300, 100, 0]
BASE = dict(p=1.1, q=-0.6, a=0.3, b=0.5, d=0.1)
H1 = np.array([0.0, 0.3, -0.2, 0.25, 0.1, -0.3])
H2 = np.array([0.0, 0.0, 0.2, -0.1, 0.0, 0.15])
H3 = np.array([0.0, 0.0, 0.0, 0.1, -0.2, 0.15])
# Entries: of m alone where x0 is not limited, as epsilon is; and what is nothing in particular.
HX = np.array([0.5, 0.6, 0.7, 0.8, 0.6, 0.5])
EPSILON = dict(hx=HX, h0=-HX / BASE["p"])
OTHERS = dict(hx=[0.5, 0.0, -0.3, 0.4, 0.0, 0.2], h0=[0.5, 1.0, 0.0, -0.8, 0.25, 1.0])

TABLES: dict[str, dict[str, Any]] = {
    "h1": dict(**BASE, c1=H1),
    "h1-and-h2": dict(**BASE, c1=H1, c2=H2),
    "h2-alone": dict(**BASE, c2=H2),
    "now-and-then": dict(**BASE, c1=[0, 0, 0.4, 0, 0, 0.3], c2=[0, 0, 0, 0, -0.3, 0]),
    "clamped": dict(**BASE, c1=H1, c2=H2, limit=0.6),
    "thresholded": dict(**BASE, c1=H1, c2=H2, quantile=0.9, limit=2.0),
    "thresholded-at-times": dict(
        **BASE, c1=H1, quantile=[0, 0.9, 0, 0.5, 0, 0], limit=[math.inf, 1.5, 0.7, 9.0, 1.0, 2.0]
    ),
    "scaled-input": dict(**BASE, c1=H1, e=[0.5, 2.0, 1.0, 0.25, 1.5, 3.0]),
    "noise": dict(**BASE, c1=H1, s=[0.4, 0.0, 0.3, 0.2, 0.1, 0.0]),
    "learned": dict(**BASE, c1=H1, c2=H2, s=0.3, g0=-0.2, g1=[0.5, 0.7, 0.0, -0.4, 0.3, 0.2], e=0.7),
    "three": dict(**BASE, c1=H1, c2=H2, c3=H3),
    "h3-alone": dict(**BASE, c3=H3, limit=0.6),
    "epsilon": dict(**BASE, c1=H1, c2=H2, c3=H3, **EPSILON),
    "epsilon-clamped": dict(**BASE, c1=H1, c2=H2, c3=H3, limit=0.6, **EPSILON),
    "entries-thresholded": dict(**BASE, c1=H1, c2=H2, c3=H3, quantile=0.9, limit=2.0, **OTHERS),
    "entries-at-times": dict(
        **BASE, c1=[0, 0, 0.4, 0, 0, 0.3], c3=[0, 0, 0, 0, -0.3, 0], limit=[math.inf, 0.8, math.inf, 0.7, 0.5, 0.9],
        s=[0.4, 0.0, 0.3, 0.2, 0.1, 0.0], e=[0.5, 2.0, 1.0, 0.25, 1.5, 3.0], **OTHERS,
    ),
    "entries-nobody-reads": dict(**BASE, limit=0.6, **OTHERS),
}  # fmt: skip


class Made(Sampler):
    def __init__(self, table: Table, correct_x0: Any = None) -> None:
        self.table, self.correct_x0 = table, correct_x0


def model(x: Tensor, t: Tensor, c: Tensor | float = 0.0) -> Tensor:
    m = 0.5 * torch.tanh(x) + c
    return torch.cat([m, 0.5 * torch.sin(3 * x)], dim=1)


def halve(x0: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x0 + 0.1


def by_hand(
    table: Table, guidance: float = 1.0, correct: Callable[[Tensor, Tensor], Tensor] | None = None, seed: int = 3
) -> list[tuple[Tensor, Tensor]]:
    """The table's docstring in float64, one row after the other: the x and the x0 of each."""
    x, steps = X.double(), []
    history = [torch.zeros_like(x)] * 3
    for k, row in enumerate(table):
        m, v = model(row["e"] * x, torch.tensor(0), 0.3 if guidance != 1 else 0.0).chunk(2, dim=1)
        if guidance != 1:
            unconditional, _ = model(row["e"] * x, torch.tensor(0), 0.0).chunk(2, dim=1)
            m = unconditional + guidance * (m - unconditional)
        x0 = row["p"] * x + row["q"] * m
        if correct is not None:
            x0 = correct(x0, torch.tensor(0))
        if row["quantile"] > 0:
            r = torch.quantile(x0.abs().flatten(1), row["quantile"], dim=1).clamp(1, row["limit"]).reshape(-1, 1, 1, 1)
            x0 = torch.minimum(torch.maximum(x0, -r), r) / r
        else:
            x0 = x0.clamp(-row["limit"], row["limit"])
        z = ops.randn(SHAPE, seed=seed, step=k, stream=1).double()
        noise = row["s"] * torch.exp(row["g0"] + row["g1"] * v) * z
        recalled = sum(row[c] * h for c, h in zip(("c1", "c2", "c3"), history, strict=True))
        entry = row["hx"] * x + row["h0"] * x0
        x = row["a"] * x + row["b"] * x0 + recalled + row["d"] * m + noise
        history = [entry, *history[:2]]
        steps.append((x, x0))
    return steps


# Six rows of at most 24 roundings of terms below 4; the coefficients of a row are below 1 in all, so errors do not grow
# but where thresholding moves with the largest error of a sample: less than twice.
TOLERANCE = N * 24 * UNIT * 4 * 2


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("guidance", [1.0, 2.0], ids=["plain", "guided"])
@pytest.mark.parametrize("correct", [None, halve], ids=["as-it-is", "corrected"])
def test_the_loop_is_the_tables_formula(backend: str, name: str, guidance: float, correct: Any) -> None:
    table = Table(TIMES, **TABLES[name])
    options: dict[str, Any] = dict(seed=3, backend=backend)
    if guidance != 1:
        cond, uncond = torch.full((2, 1, 1, 1), 0.3), torch.zeros(2, 1, 1, 1)
        options |= dict(guidance=guidance, cond={"c": cond}, uncond={"c": uncond})
    sampler = Made(table, correct)
    got, want = sampler(model, X, **options), by_hand(table, guidance, correct)
    assert (got - want[-1][0]).abs().max() <= TOLERANCE
    called = sampler(model, X, callback=lambda step: None, **options)
    states = [(step.x.clone(), step.x0.clone()) for step in sampler.iterate(model, X, **options)]
    assert torch.equal(called, got) and torch.equal(states[-1][0], got), "looking changes nothing"
    assert_close_to(states, want)
    assert got.untyped_storage().nbytes() == 4 * got.numel()


def assert_close_to(states: Sequence[tuple[Tensor, Tensor]], want: Sequence[tuple[Tensor, Tensor]]) -> None:
    """The x and x0 of every row: what callers are shown is x0, whatever the rows remember."""
    for k, (shown, right) in enumerate(zip(states, want, strict=True)):
        for name, one, other in zip(("x", "x0"), shown, right, strict=True):
            assert (one - other).abs().max() <= TOLERANCE, f"{name} of row {k}"


@pytest.mark.parametrize("name", TABLES)
def test_gradients_take_the_same_path(name: str) -> None:
    table = Table(TIMES, **TABLES[name])
    x = X.clone().requires_grad_()
    for correct in (None, halve):
        states: list[tuple[Tensor, Tensor]] = []
        got = Made(table, correct)(model, x, seed=3, callback=lambda step, to=states: to.append((step.x, step.x0)))
        assert got.requires_grad and all(x0.requires_grad for _, x0 in states)
        assert_close_to(states, by_hand(table, 1.0, correct))
    double = X.double()[:1, :, :2, :2].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: Made(table)(model, x, seed=3, model_dtype=torch.float64), (double,), eps=1e-6, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", TABLES)
def test_other_model_dtypes(backend: str, dtype: torch.dtype, name: str) -> None:
    table, seen = Table(TIMES, **TABLES[name]), []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        assert x.dtype == dtype
        seen.append(x.clone())
        return model(x, t)

    sampler = Made(table)
    got = sampler(spy, X, seed=3, model_dtype=dtype, backend=backend)
    alone, seen = seen, []
    states = [step.x.clone() for step in sampler.iterate(spy, X, seed=3, model_dtype=dtype, backend=backend)]
    assert torch.equal(states[-1], got) and got.dtype == torch.float32
    assert all(torch.equal(one, other) for one, other in zip(alone, seen, strict=True)), "the same inputs either way"
    for state, e, one in zip([X, *states], table.e, alone, strict=False):
        assert torch.equal(one, (state * torch.tensor(e, dtype=torch.float32)).to(dtype)), (
            "scaled in float32, rounded once"
        )


def test_float64_states(backend: str) -> None:
    for name, columns in TABLES.items():
        table = Table(TIMES, **columns)
        got = Made(table)(model, X.double(), seed=3, model_dtype=torch.float64)
        assert got.dtype == torch.float64
        assert (got - by_hand(table)[-1][0]).abs().max() <= TOLERANCE * 2.0**-29, name
        if backend == "cpu":
            with pytest.raises(ValueError, match="cpu"):
                Made(table)(model, X.double(), backend=backend)


def test_x_T_is_scaled(backend: str) -> None:
    table = Table([1], a=1.0, init_noise_sigma=14.6)
    got = Made(table)(model, SHAPE, seed=3, backend=backend)
    assert torch.equal(got, ops.randn(SHAPE, seed=3, backend=backend) * 14.6)
    assert torch.equal(Made(table)(model, X, backend=backend), X), "x is x_T as it is"


@pytest.mark.parametrize("t", [[900, 5], [0.75, 0.1]], ids=["integers", "fractions"])
def test_times_reach_the_model_in_the_tables_dtype(backend: str, t: list[float]) -> None:
    table, seen = Table(t, a=1.0, q=0.1, b=1.0), []

    def spy(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t.clone())
        return x

    Made(table)(spy, X, backend=backend)
    Made(table)(spy, X, guidance=2.0, uncond={}, guidance_interval=(0.5, 2000), backend=backend)
    want = [
        torch.full((2,), t[0]),
        torch.full((2,), t[1]),
        torch.full((4,), t[0]),
        torch.full((4 if t[1] > 0.5 else 2,), t[1]),
    ]
    assert all(torch.equal(one, other) for one, other in zip(seen, want, strict=True))
    assert {one.dtype for one in seen} == {torch.int64 if isinstance(t[0], int) else torch.float32}


def test_a_variance_half_that_is_missing_is_named(backend: str) -> None:
    table = Table(TIMES, **TABLES["learned"])
    with pytest.raises(ValueError, match="the table reads a learned variance: model_output must have 6 channels"):
        Made(table)(lambda x, t: x, X, backend=backend)
    with pytest.raises(ValueError, match="must have 6 channels"):
        Made(table)(lambda x, t: x, X.clone().requires_grad_())


def test_runs_at_once_do_not_disturb_each_other() -> None:
    """Two generators over one sampler take turns: each has buffers of its own."""
    sampler = Made(Table(TIMES, **TABLES["learned"]))
    want = [sampler(model, X, seed=seed) for seed in (3, 4)]
    runs = [sampler.iterate(model, X, seed=seed) for seed in (3, 4)]
    for pair in zip(*runs, strict=True):
        last = [step.x for step in pair]
    assert torch.equal(last[0], want[0]) and torch.equal(last[1], want[1]) and not torch.equal(*want)
