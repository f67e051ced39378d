"""The CUDA kernels of guidance rescale, dynamic thresholding and the posterior, run on the CPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDPM, Schedule, Table, ops
from fastsample.ops.posterior import posterior
from support.cuda_on_cpu import calls
from support.cuda_on_cpu.build import ORDERS, CudaOnCpu
from support.cuda_on_cpu.calls import Memory
from support.formula import normal
from support.step_modes import DTYPES

pytest_plugins = ["support.cuda_on_cpu.fixtures"]
pytestmark = pytest.mark.usefixtures("scalar")

NAN, INF = math.nan, math.inf
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES)
# Within a chunk of 8192, at its ends, and several, with 8 elements to a thread and without.
SIZES = [1, 2, 7, 8, 9, 1000, 4100, 8191, 8192, 8193, 20_003, 24_584]


def both(
    on_cpu: CudaOnCpu, memory: Memory, table: Table, row: int | Tensor, call: dict[str, Any], shift: int = 0
) -> tuple[Tensor, Tensor]:
    """x' by the CUDA kernels, from an m that lies `shift` elements behind an aligned address, and by the CPU's."""
    want = ops.step(table=table, row=row, backend="cpu", **call)
    placed = {**call, "model_output": memory.input(call["model_output"], shift)}
    got = calls.step(on_cpu.module, table=table, row=row, out=memory.output(call["x"].shape), **placed)
    return got, want


# Guidance rescale

FACTOR = Table([0], d=1.0)


def rescaled(
    on_cpu: CudaOnCpu, memory: Memory, m: Tensor, weights: Sequence[float], phi: float, shift: int = 0
) -> tuple[Tensor, Tensor]:
    x = torch.zeros(len(m) // 2, *m.shape[1:])
    call = dict(x=x, model_output=m, guidance=list(weights), guidance_rescale=phi)
    return both(on_cpu, memory, FACTOR, 0, call, shift)


@EACH_DTYPE
@pytest.mark.parametrize("size", SIZES)
def test_rescale_factors(on_cpu: CudaOnCpu, memory: Memory, size: int, dtype: torch.dtype) -> None:
    """Float64 sums in another order than the CPU's: the factor, rounded to float32, may be the next float, no more."""
    m = normal((6, size), 3)
    m[3:, 0] = m[:3, 0] = 1.0  # so that x' = factor there
    m = (m + torch.tensor([0.0, 1e3, -30.0, 0.0, 1e3, -30.0])[:, None] * (m != 1)).to(dtype)
    for phi in (0.75, 1.0):
        for shift in (0, 1):
            got, want = rescaled(on_cpu, memory, m, [7.5, 1.0, -2.0], phi, shift)
            assert torch.equal(got.isnan(), want.isnan())
            assert (got[:, 0].view(torch.int32) - want[:, 0].view(torch.int32)).abs().max() <= 1
            conditional, combined = m[3:].double(), guided(m, [7.5, 1.0, -2.0])
            exact = factor(combined, conditional, phi)
            assert ((got[:, 0].double() / exact - 1).abs() < 2.0**-24 + 1e-9).all()


def guided(m: Tensor, weights: Sequence[float]) -> Tensor:
    """After guidance, rounded where the kernels round."""
    half = len(m) // 2
    w, unconditional, conditional = torch.tensor(weights)[:, None].double(), m[:half].float(), m[half:].float()
    return (conditional.double() + (w - 1) * (conditional - unconditional).double()).float().double()


def factor(combined: Tensor, conditional: Tensor, phi: float) -> Tensor:
    of_m, of_conditional = combined.var(dim=1, correction=0), conditional.var(dim=1, correction=0)
    return torch.where(of_m == 0, 1.0, phi * (of_conditional / torch.where(of_m == 0, 1.0, of_m)).sqrt() + 1 - phi)


def test_rescale_factors_of_more_chunks_than_threads(on_cpu: CudaOnCpu, memory: Memory) -> None:
    m = normal((2, 257 * 8192 + 8), 3)
    m[:, 0] = 1.0
    got, want = rescaled(on_cpu, memory, m, [3.0], 0.7)
    assert abs(got[0, 0].view(torch.int32).item() - want[0, 0].view(torch.int32).item()) <= 1


@pytest.mark.parametrize("size", [1, 8, 9000])
def test_rescale_factors_of_constants_and_nan(on_cpu: CudaOnCpu, memory: Memory, size: int) -> None:
    # Multiples of 2^-10: guidance is exact.
    constant, other = torch.full((1, size), 0.125), (normal((1, size), 1) * 1024).round() / 1024
    broken = normal((1, size), 2)
    broken[0, -1] = NAN
    infinite = normal((1, size), 2)
    infinite[0, -1] = INF
    cases = {
        "both": (constant, constant, 3.0, 1.0),
        "m alone": (constant, other, 0.0, 1.0),  # weight 0 is the unconditional half
        "the conditional half alone": (other, constant, 3.0, None),
        "NaN": (other, broken, 3.0, None),
        "NaN in the unconditional half": (broken, other, 3.0, None),
        "infinite": (other, infinite, 3.0, None),
    }
    for name, (unconditional, conditional, weight, exact) in cases.items():
        got, want = rescaled(on_cpu, memory, torch.cat([unconditional, conditional]), [weight], 0.7)
        assert torch.equal(got.isnan(), want.isnan()) and (name[0] != "N" or got.isnan().all()), name
        if exact is not None:
            assert calls.same_bits(got, want), name
            assert calls.same_bits(got, unconditional if name == "m alone" else conditional), name
        else:
            assert torch.allclose(got, want, rtol=2.0**-22, atol=0, equal_nan=True), name


# Dynamic thresholding


def distributions(size: int) -> dict[str, Tensor]:
    """What a quantile may be taken of, several samples each."""
    generator = np.random.default_rng(size)
    ties = generator.choice([0.5, -1.5, 3.0, -3.0], (2, size))
    wide = np.exp(generator.uniform(-100, 80, (2, size))) * generator.choice([-1, 1], (2, size))
    near = 2 + 2.0**-22 * generator.integers(0, 4, (2, size))  # all digits but the last agree
    one_nan = generator.normal(0, 3, (2, size))
    one_nan[1, size // 2] = NAN
    infinite = np.where(generator.random((2, size)) < 0.3, INF, generator.normal(0, 3, (2, size)))
    arrays = dict(normal=generator.normal(0, 3, (2, size)), ties=ties, wide=wide, near=near, nan=one_nan, inf=infinite)
    arrays |= dict(zero=np.zeros((2, size)), same=np.full((2, size), -2.5))
    return {name: torch.from_numpy(array.astype(np.float32)) for name, array in arrays.items()}


@pytest.mark.parametrize("size", SIZES)
def test_thresholds(on_cpu: CudaOnCpu, memory: Memory, size: int) -> None:
    """Counts are integers and the quantile is interpolated alike: the CPU's bits."""
    quantiles, limits = (1e-6, 0.5, 0.9, 0.995, 1.0), (INF, INF, INF, 2.25, INF)
    table = Table(range(5), q=1.0, b=1.0, quantile=quantiles, limit=limits)
    samples = torch.cat(list(distributions(size).values()))
    for quantile in range(5):
        # The same samples at other quantiles: each is at a row of its own.
        rows = (torch.arange(len(samples)) + quantile) % 5
        call = dict(x=torch.zeros_like(samples), model_output=samples)
        got, want = both(on_cpu, memory, table, rows, call, quantile % 2)
        assert all(calls.same_bits(mine, theirs) for mine, theirs in zip(got, want, strict=True)), rows.tolist()


def test_thresholds_next_to_an_infinity(on_cpu: CudaOnCpu, memory: Memory) -> None:
    """Below half of the way to it, from there on and at it, with a limit and without."""
    quantiles = [0.90625, 0.96875, 1.0] * 2
    table = Table(range(6), q=1.0, b=1.0, quantile=quantiles, limit=[INF] * 3 + [5.0] * 3)
    m = torch.tensor([[0.5, 1.0, 2.0, -3.0, INF, 4.0, 5.0, 6.0, 7.0]]).repeat(6, 1)
    got, want = both(on_cpu, memory, table, torch.arange(6), dict(x=torch.zeros(6, 9), model_output=m))
    assert calls.same_bits(got, want)
    assert got.isnan().all(dim=1).tolist() == [True, True, True, False, True, True]


@EACH_DTYPE
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_thresholds_of_all_that_makes_x0(on_cpu: CudaOnCpu, memory: Memory, guided: bool, dtype: torch.dtype) -> None:
    """Rows of their own: two quantiles, a row without, and one that ignores x, which then may be NaN."""
    table = Table(
        [3, 2, 1, 0],
        p=[1.5, 0.5, 1.0, 0.0],
        q=[-0.5, 2.0, 1.0, 3.0],
        b=1.0,
        quantile=[0.9, 0.3, 0.0, 0.5],
        limit=[INF, INF, 1.5, 2.0],
    )
    rows = torch.tensor([0, 3, 1, 2, -1])
    for size in (5, 9000, 9008):
        x = normal((5, size), 1)
        x[1] = NAN
        call: dict[str, Any] = dict(x=x, model_output=normal((10 if guided else 5, size), 2, dtype))
        if guided:
            call["guidance"] = [7.5, 1.0, 2.0, 0.0, 3.0]
        got, want = both(on_cpu, memory, table, rows, call)
        assert calls.same_bits(got, want), size
        assert got[1].isfinite().all()


@pytest.mark.parametrize("order", ORDERS)
def test_any_order_of_threads_and_blocks_will_do(on_cpu: CudaOnCpu, memory: Memory, order: str) -> None:
    m = normal((6, 20_003), 5)
    table = Table([0], p=0.3, q=1.0, b=1.0, d=0.2, quantile=0.9)
    call = dict(x=normal((3, 20_003), 6), model_output=m, guidance=[7.5, 1.0, 3.0])
    with on_cpu.order(order):
        got, want = both(on_cpu, memory, table, 0, call)
        assert calls.same_bits(got, want)
        call["guidance_rescale"] = 0.7
        results = both(on_cpu, memory, table, 0, call)[0]
    assert calls.same_bits(results, both(on_cpu, memory, table, 0, call)[0]), "sums are taken in one order"


# The posterior


def log_variance_of(table: Table, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
    """2 (g0 + log s) and 2 g1 of each row, as ops.posterior has them."""
    s = table.s[list(rows)]
    constant = 2 * (table.g0[list(rows)] + np.log(s, out=np.zeros_like(s), where=s != 0))
    return torch.from_numpy(constant).float(), torch.from_numpy(2 * table.g1[list(rows)]).float()


# Unclipped on purpose.
@pytest.mark.filterwarnings("ignore:the row at t = 19 multiplies")
@EACH_DTYPE
@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
@pytest.mark.parametrize("size", [2, 5, 8, 1032, 1029])
def test_posterior(
    on_cpu: CudaOnCpu, memory: Memory, size: int, variance: Any, clip: float | None, dtype: torch.dtype
) -> None:
    """The mean has the CPU's bits; the log variance is one rounding of constant + slope v, of float32 numbers."""
    table = DDPM(Schedule.cosine(20), variance=variance, clip=clip).table
    noise_free = table.replace(s=0.0, g0=0.0, g1=0.0)
    x = normal((4, 1, size), 1)
    m = normal((4, 2 if variance == "learned_range" else 1, size), 2, dtype)
    for shift in (0, 1):
        for given in (7, torch.tensor([0, 19, -2, 5])):
            rows = [given] * 4 if isinstance(given, int) else given.tolist()
            want, _ = posterior(x, m, table, given, backend="cpu")
            constant, slope = log_variance_of(table, rows)
            mean, log_variance = memory.output(x.shape, shift=shift), memory.output(x.shape)
            place = memory.input(m, shift)
            calls.posterior(on_cpu.module, x, place, noise_free, given, constant, slope, mean, log_variance)
            assert calls.same_bits(mean, want)
            v = m[:, 1:].double() if m.shape[1] == 2 else torch.zeros(4, 1, size).double()
            exact = (constant.double()[:, None, None] + slope.double()[:, None, None] * v).float()
            assert torch.equal(log_variance, exact)
            mean.fill_(NAN)
            calls.posterior(on_cpu.module, x, place, noise_free, given, constant, slope, mean, None)
            assert calls.same_bits(mean, want), "the log variance is not asked for"
