"""What a row of a table says, in float64 and element by element, with a bound on what float32 may make of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample import Table

Array = NDArray[np.float64]

UNIT = 2.0**-24  # half an ulp: the relative error of one float32 rounding


@dataclass
class Expected:
    """x', the row's entry and u', with the largest errors that float32 arithmetic may leave in x' and the entry; each
    (B, ...)."""

    state: Array
    entry: Array
    model_input: Array
    state_error: Array
    entry_error: Array


def expected(
    x: Tensor,
    m: Tensor,
    table: Table,
    row: int | Sequence[int],
    *,
    z: Tensor | None = None,
    history: Sequence[Tensor] = (),
    guidance: float | Sequence[float] | None = None,
    rescale: float = 0.0,
) -> Expected:
    """One row (or one per sample) of fastsample.ops.step; `m` and `guidance` as it takes them."""
    batch, rows = len(x), list(table)
    weights = np.broadcast_to(np.float64(np.nan if guidance is None else guidance), (batch,))
    samples = []
    for i in range(batch):
        index = row if isinstance(row, int) else row[i]
        coefficients = dict(rows[index])
        coefficients["next_e"] = 1.0 if index % len(rows) == len(rows) - 1 else rows[index % len(rows) + 1]["e"]
        unconditional = m[i].double().numpy() if len(m) == 2 * batch else None
        samples.append(
            _sample(
                coefficients,
                x[i].double().numpy(),
                m[len(m) - batch + i].double().numpy(),
                unconditional,
                float(weights[i]),
                rescale,
                None if z is None else z[i].double().numpy(),
                [one[i].double().numpy() for one in history],
            )
        )
    return Expected(*(np.stack(part) for part in zip(*samples, strict=True)))


def _sample(
    c: dict[str, float],
    x: Array,
    conditional: Array,
    unconditional: Array | None,
    w: float,
    phi: float,
    z: Array | None,
    history: Sequence[Array],
) -> tuple[Array, Array, Array, Array, Array]:
    v = np.zeros_like(x)
    if conditional.shape != x.shape:
        conditional, v = np.split(conditional, 2)
    m, m_error = conditional, np.zeros_like(x)
    if unconditional is not None:
        unconditional = unconditional[: len(x)] if x.ndim else unconditional
        m = unconditional + w * (conditional - unconditional)
        # w - 1, the difference, the product and the sum, each rounded.
        m_error = 4 * UNIT * (abs(conditional) + abs(w - 1) * (abs(conditional) + abs(unconditional)))
        if phi:
            m, m_error = _rescaled(m, m_error, conditional, phi)

    x0, x0_error = _sum_of_two(c["p"] * x, c["q"] * m, abs(c["q"]) * m_error)
    limited = math.isfinite(c["limit"]) or c["quantile"] > 0
    if c["quantile"] > 0:
        r = min(max(float(np.quantile(abs(x0), c["quantile"])), 1.0), c["limit"])
        # A quantile moves no more than the value that moves most; its rank is rounded twice; it is interpolated.
        around = np.quantile(abs(x0), [max(c["quantile"] - 2 * UNIT, 0.0), min(c["quantile"] + 2 * UNIT, 1.0)])
        r_error = x0_error.max() + np.ptp(around) + 4 * UNIT * abs(x0).max()
        x0 = np.clip(x0, -r, r) / r
        x0_error = (np.maximum(x0_error, r_error) + abs(x0) * r_error) / r + UNIT * abs(x0)
    elif limited:
        x0 = np.clip(x0, -c["limit"], c["limit"])
        x0_error = x0_error + UNIT * c["limit"]

    others = [c[name] * earlier for name, earlier in zip(("c1", "c2", "c3"), history, strict=False)]
    noise_error = np.zeros_like(x)
    if c["s"]:
        assert z is not None
        factor = np.exp(c["g0"] + c["g1"] * v)
        others.append(c["s"] * factor * z)
        if c["g1"]:
            # g1, g1 / ln 2 and its product with v are rounded; 2^x is right to 1.5 ulp, 3 units; the product with z.
            noise_error = abs(others[-1]) * UNIT * (3 * abs(c["g1"] * v) + 3 + 1)
    if limited:
        terms = [c["a"] * x, c["b"] * x0, c["d"] * m, *others]
        carried = abs(c["b"]) * x0_error + abs(c["d"]) * m_error
    else:
        of_m = c["b"] * c["q"] + c["d"]
        terms = [(c["a"] + c["b"] * c["p"]) * x, of_m * m, *others]
        carried = abs(of_m) * m_error
    # Each term's coefficient and product, and the six sums of seven terms.
    state_error = carried + noise_error + 8 * UNIT * sum(abs(term) for term in terms)
    state = sum(terms)
    if limited:
        entry, entry_error = _sum_of_two(c["hx"] * x, c["h0"] * x0, abs(c["h0"]) * x0_error)
        if (c["hx"], c["h0"]) == (0.0, 1.0):
            entry_error = x0_error  # x0 as it is
    else:
        of_m = c["h0"] * c["q"]
        entry, entry_error = _sum_of_two((c["hx"] + c["h0"] * c["p"]) * x, of_m * m, abs(of_m) * m_error)
    return state, entry, c["next_e"] * state, state_error, entry_error


def _sum_of_two(one: Array, other: Array, carried: Array) -> tuple[Array, Array]:
    """(the sum of two products, its error): of both coefficients, both products and the sum, and what they carry."""
    return one + other, carried + 3 * UNIT * (abs(one) + abs(other))


def _rescaled(m: Array, m_error: Array, conditional: Array, phi: float) -> tuple[Array, Array]:
    deviation = m.std()
    factor = phi * conditional.std() / deviation + 1 - phi if deviation > 0 else 1.0
    # The deviation moves by no more than the root mean square of what its values move by; two quotients and a sum.
    moved = math.sqrt((m_error**2).mean()) / deviation if deviation > 0 else 0.0
    factor_error = abs(factor) * (moved + 6 * UNIT)
    return factor * m, abs(factor) * m_error + abs(m) * factor_error + UNIT * abs(factor * m)


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed)).to(dtype)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Equal as floats, NaN to NaN."""
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def assert_matches(got: Tensor, want: Array, error: Array) -> None:
    difference = np.abs(got.double().numpy() - want)
    excess = difference / np.maximum(error, 1e-300)
    assert not np.isnan(difference).any(), "a value was not written"
    assert (difference <= error).all(), (
        f"{excess.max():.2f} times the bound at {np.unravel_index(excess.argmax(), want.shape)}"
    )
