"""Steps whose model output and next input are 16-bit floats: the same bits as from the same values in float32."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from fastsample import Table, ops
from support.formula import normal
from support.step_modes import BASE, ENTRY, EPSILON, KINDS

HALVES = [torch.float16, torch.bfloat16]
# One, around one and two vectors of 8 and of 16 lanes, around a block of 2048.
SIZES = [1, 8, 15, 16, 17, 31, 32, 33, 47, 2048, 2049, 4099]
SCALED = {"e": [1.0, 1.0, 1.0, 1.0, 0.7]}
FREE = {**BASE, **SCALED}
# Of the row that is stepped, the one before the last, alone.
H1 = {"c1": [0.0, 0.0, 0.0, 0.4, 0.0]}
H2 = {**H1, "c2": [0.0, 0.0, 0.0, -0.3, 0.0]}
H3 = {**H2, "c3": [0.0, 0.0, 0.0, 0.25, 0.0]}
ROWS: dict[str, dict[str, Any]] = {
    "free": FREE,
    "free-unscaled": BASE,
    "only-m": dict(q=1.0, b=0.9),
    "clamped-reads-x": {**KINDS["clamped"], **SCALED},
    "clamped-reads-m": {**KINDS["clamped-keeps-epsilon"], **SCALED},
    "clamped-reads-both": {**FREE, "limit": 0.8},
    "clamped-x0-only": dict(q=-0.75, b=0.9, limit=0.8, **SCALED),
    "history": {**FREE, **H1},
    "long-history": {**FREE, **H2},
    "history-clamped": {**FREE, **H1, "limit": 0.8},
    "epsilons": {**FREE, **H3, **EPSILON},
    "epsilons-clamped": {**FREE, **H3, **EPSILON, "limit": 0.8},
    "entries-noise": {**FREE, **H3, **ENTRY, "s": 0.5},
    "entries-thresholded": {**FREE, **H3, **ENTRY, "quantile": 0.9},
    "noise": {**FREE, "s": 0.5},
    "thresholded": {**FREE, "quantile": 0.9},
}


def stepped(name: str, m: Tensor, x: Tensor, target: Tensor | None, in_place: bool, **options: Any) -> list[Tensor]:
    """x' and, where the row has a history, its entry; in place both go where what they are made from was."""
    x, table = x.clone(), Table([4, 3, 2, 1, 0], **ROWS[name])
    history = [normal(x.shape, 4 + k) for k in range(table.history)]
    entry = (history[-1] if in_place else torch.full_like(x, math.nan)) if history else None
    out = x if in_place else torch.full_like(x, math.nan)
    noise = normal(x.shape, 9) if "s" in ROWS[name] else None
    ops.step(x, m, table, 3, history=history, x0_out=entry, out=out, input_out=target, noise=noise, **options)
    return [out] if entry is None else [out, entry]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        *((name, size) for name in ROWS for size in SIZES),
        # Beyond the 64 blocks that are taken at once: a row that streams, a limited one, and two that go through L1.
        *((name, 66 * 2048 + 35) for name in ("free", "clamped-reads-x", "clamped-x0-only", "history-clamped")),
    ],
)
@pytest.mark.parametrize("dtype", HALVES)
def test_bits_are_those_of_the_same_values_in_float32(backend: str, dtype: torch.dtype, name: str, size: int) -> None:
    x, scale = normal((1, size), 1), torch.tensor(0.7 if isinstance(ROWS[name].get("e"), list) else 1.0)
    for guided in (False, True):
        m = normal((2 if guided else 1, size), 2, dtype)
        options = dict(guidance=3.5 if guided else None, backend=backend)
        want = stepped(name, m.float(), x, None, in_place=False, **options)
        # No input, one, one for each half; of the other 16-bit dtype, and of float32.
        for other, copies in ((dtype, 0), (dtype, 1), (dtype, 2), (HALVES[dtype == HALVES[0]], 1), (torch.float32, 2)):
            for in_place in (False, True):
                target = torch.full((copies, size), math.nan, dtype=other) if copies else None
                got = stepped(name, m, x, target, in_place, **options)
                assert all(map(torch.equal, got, want)), (guided, other, copies, in_place)
                if target is not None:
                    assert torch.equal(target, (want[0] * scale).to(other).expand(copies, size)), (guided, other)


@pytest.mark.parametrize("dtype", HALVES)
def test_states_round_to_the_models_dtype_to_nearest_even(backend: str, dtype: torch.dtype) -> None:
    """x' is x: random bits, exact midpoints, subnormal ones too, and NaN and infinity between others at every place."""
    bits = torch.randint(-(2**31), 2**31, (200_000,), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    halves = torch.arange(0, 2**15 - 1, dtype=torch.int16).view(dtype).float()
    ties = ((halves[1:] + halves[:-1]) / 2).nan_to_num(0.0, 0.0, 0.0)
    places = normal((40, 40), 3)
    places.fill_diagonal_(math.nan)
    infinite = normal((40, 40), 5).fill_diagonal_(-math.inf)
    x = torch.cat([bits.view(torch.float32), ties, -ties, places.flatten(), infinite.flatten()])[None]
    target = torch.full(x.shape, math.nan, dtype=dtype)
    m = torch.zeros(x.shape, dtype=dtype)
    # Folded to x + m: the row whose loop converts in registers.
    ops.step(x, m, Table([0], p=1.0, q=1.0, b=1.0), 0, input_out=target, backend=backend)
    want = x.to(dtype)
    assert torch.equal(target.isnan(), want.isnan()) and want.isnan().sum() >= 40
    # The sum turns -0 into 0, which compares equal.
    assert torch.equal(target.nan_to_num(1.5), want.nan_to_num(1.5))


@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_of_the_models_output_reaches_the_state_and_the_input(backend: str, dtype: torch.dtype) -> None:
    m = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, -1)
    table = Table([0], p=1.0, q=1.0, b=1.0)
    target = torch.full((2, m.shape[1]), math.nan, dtype=dtype)
    for both, guidance in ((m, None), (torch.cat([torch.zeros_like(m), m]), 1.0)):
        target.fill_(math.nan)
        state = ops.step(torch.zeros(m.shape), both, table, 0, guidance=guidance, input_out=target, backend=backend)
        for got in (state, *target.float().split(1)):
            # Guided, an infinity less another, times 0, is NaN.
            finite = m.isfinite() if guidance else ~m.isnan()
            assert torch.equal(got[finite], m.float()[finite]) and got[m.isnan()].isnan().all()
