"""kernels/reductions.py: thresholds and rescale factors are those of torch.quantile and of the CPU kernels."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastsample import Table, ops
from support.ahead import ENVIRONMENT, Ahead
from support.devices import DEVICE
from support.formula import UNIT, normal, same_values
from support.quantiles import VALUES_AT_THE_ENDS

pytest.importorskip("triton")
from fastsample.kernels import reductions
from fastsample.kernels.arithmetic import tl, triton

INF, NAN = math.inf, math.nan


def bounds(
    m: Tensor,
    table: Table,
    row: int | Sequence[int] = 0,
    *,
    x: Tensor | None = None,
    guidance: Tensor | None = None,
    factors: Tensor | None = None,
    calls: int = 1,
) -> Tensor:
    """What `threshold` writes for m of shape (batch, size), twice that batch under guidance."""
    batch, size = len(m) if guidance is None else len(m) // 2, m.shape[1]
    scratch = reductions.threshold_scratch(batch, size, DEVICE)
    out = torch.empty(batch, device=DEVICE)
    on = [one if one is None else one.to(DEVICE) for one in (guidance, factors)]
    rows_of = None if isinstance(row, int) else torch.tensor(row, device=DEVICE)
    rows = torch.from_numpy(table.packed.copy()).to(DEVICE)
    state = torch.zeros(batch, size) if x is None else x
    for _ in range(calls):
        reductions.threshold(
            rows,
            rows_of,
            row if isinstance(row, int) else 0,
            state.to(DEVICE),
            m.to(DEVICE),
            size,
            *on,
            scratch,
            out,
        )
    return out.cpu()


def of_x0(quantile: float, limit: float = INF) -> Table:
    """The model says x0 itself."""
    return Table([0], q=1.0, b=1.0, quantile=quantile, limit=limit)


def quantiles(x0: Tensor, quantile: float, limit: float = INF) -> Tensor:
    found = torch.stack([torch.quantile(one.float().abs(), quantile) for one in x0])
    r = found.clamp(1.0, limit)
    return r.masked_fill(r.isinf(), NAN)


@pytest.mark.parametrize("quantile", [0.25, 0.995, 1.0])
@pytest.mark.parametrize("size", [1, 2, 2047, 2049, 5001])
def test_thresholds_are_those_of_torch_quantile(size: int, quantile: float) -> None:
    # The first sample exceeds 1, the second never.
    x0 = normal((2, size), size) * torch.tensor([3.0, 0.01])[:, None]
    assert torch.equal(bounds(x0, of_x0(quantile)), quantiles(x0, quantile))


@pytest.mark.parametrize("limit", [1.0, 1.5, 9.0])
def test_a_threshold_is_at_most_the_limit(limit: float) -> None:
    x0 = normal((3, 100), 1) * torch.tensor([3.0, 0.6, 0.01])[:, None]
    assert torch.equal(bounds(x0, of_x0(0.9, limit)), quantiles(x0, 0.9, limit))


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.999])
@pytest.mark.parametrize("size", [8, 2099])
def test_ties(size: int, quantile: float) -> None:
    """In the last sample all values pass all digits: there the counts of a chunk are not few."""
    rungs = torch.tensor([0.0, -0.0, 1.0, -2.0, 2.0, 2.0, -3.0, 3.0])
    index = torch.randint(8, (1, size), generator=torch.Generator().manual_seed(size))
    x0 = torch.cat([rungs[index], torch.full((1, size), -2.5)])
    assert torch.equal(bounds(x0, of_x0(quantile)), quantiles(x0, quantile))


@pytest.mark.parametrize("order", ["ascending", "descending", "last-is-largest"])
def test_neighbouring_floats_are_told_apart(order: str) -> None:
    """Ranks in one bucket of every digit but the last, and in the first and last bucket of each."""
    bits = torch.arange(0x40400000 - 300, 0x40400000 + 301, dtype=torch.int32)
    ends = torch.tensor([0, 1, 0x7F, 0x80, 0x7FFF, 0x8000, 0x7FFFFF, 0x800000, 0x7F7FFFFF], dtype=torch.int32)
    x0 = torch.cat([bits, ends]).view(torch.float32)
    x0 = {"ascending": x0, "descending": x0.flip(0), "last-is-largest": x0.roll(-1)}[order][None]
    for quantile in (0.5, 0.99, 0.99999):
        assert torch.equal(bounds(x0, of_x0(quantile)), quantiles(x0, quantile)), quantile


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of infinities
@pytest.mark.parametrize("upper", [0x40400001, 0x404000FF, 0x4040FFFF, 0x407FFFFF, 0x41000000, 0x7F7FFFFF, 0x7F800000])
def test_the_value_above_may_share_any_number_of_digits(upper: int) -> None:
    x0 = torch.tensor([[0x40400000, upper, 0, upper]], dtype=torch.int32).view(torch.float32)
    assert same_values(bounds(x0, of_x0(0.4)), quantiles(x0, 0.4)), "between both"


@pytest.mark.parametrize("values", VALUES_AT_THE_ENDS)
@pytest.mark.parametrize("quantile", [0.5, 1.0])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of infinities
def test_values_at_the_ends(values: list[float], quantile: float) -> None:
    x0 = torch.tensor([values, [1.0, 2.0, 3.0, 4.0]])
    got = bounds(x0, of_x0(quantile, 5.0))
    assert same_values(got, quantiles(x0, quantile, 5.0))
    assert got[1].isfinite(), "only the sample that holds them suffers"
    assert same_values(bounds(x0[:1], of_x0(quantile)), quantiles(x0[:1], quantile))


@pytest.mark.parametrize("limit", [INF, 5.0], ids=["free", "max-5"])
@pytest.mark.parametrize("quantile", [0.90625, 0.96875], ids=["weight-a-quarter", "weight-three-quarters"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of infinities
def test_a_step_whose_quantile_is_next_to_an_infinity(quantile: float, limit: float) -> None:
    x0 = torch.tensor([[0.5, 1.0, 2.0, -3.0, INF, 4.0, 5.0, 6.0, 7.0]])
    table, x = of_x0(quantile, limit), torch.zeros_like(x0)
    assert same_values(bounds(x0, table), quantiles(x0, quantile, limit))
    got = ops.step(x.to(DEVICE), x0.to(DEVICE), table, 0, backend="triton").cpu()
    assert same_values(got, ops.step(x, x0, table, 0, backend="reference"))
    assert got.isnan().all() == (quantile > 0.9375 or limit == INF)


def test_a_row_of_its_own_for_every_sample() -> None:
    """A row without a quantile has its limit, one that does not exist NaN; others stay what they are alone."""
    table = Table([0] * 4, q=1.0, b=1.0, quantile=[0.5, 0.0, 0.9, 0.0], limit=[INF, 2.0, 3.5, INF])
    x0 = normal((8, 2100), 3) * 4
    rows = [0, 1, 2, 3, -2, -4, 4, -5]
    got = bounds(x0, table, rows)
    assert got[[6, 7]].isnan().all()
    want = [quantiles(x0[:1], 0.5)[0], 2.0, quantiles(x0[2:3], 0.9, 3.5)[0], INF, quantiles(x0[4:5], 0.9, 3.5)[0]]
    assert got[:6].tolist() == [*map(float, want), float(quantiles(x0[5:6], 0.5)[0])]
    assert torch.equal(got[2:3], bounds(x0[2:3], table, 2))


def test_scratch_can_be_used_again() -> None:
    x0 = normal((2, 700), 4) * 3
    assert torch.equal(bounds(x0, of_x0(0.9), calls=3), quantiles(x0, 0.9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
def test_x0_is_limited_as_by_the_cpu_kernel(guided: bool, dtype: torch.dtype) -> None:
    """The step's x0 / r with r from here has the bits that the CPU kernel's step has with its own."""
    size, weights = 2300, torch.tensor([2.5, 0.0, 1.0])
    x = normal((3, size), 1)
    m = (2 * normal((6 if guided else 3, size), 2)).to(dtype)
    table = Table([0], p=1.25, q=-0.75, b=1.0, quantile=0.9)
    got = bounds(m, table, x=x, guidance=weights if guided else None)
    plain = table.replace(quantile=0.0, limit=3e38)
    options = {"guidance": weights, "backend": "cpu"} if guided else {"backend": "cpu"}
    x0 = ops.step(x, m, plain, 0, **options)  # type: ignore[arg-type]
    r = got[:, None]
    assert torch.equal(ops.step(x, m, table, 0, **options), x0.clamp(-r, r) / r)  # type: ignore[arg-type]
    assert torch.equal(got, quantiles(x0, 0.9))


def test_factors_scale_the_model_output() -> None:
    x, m, factors = normal((2, 500), 1), normal((2, 500), 2), torch.tensor([0.5, 4.0])
    table = Table([0], p=1.0, q=1.0, b=1.0, quantile=0.5)
    assert torch.equal(bounds(m, table, x=x, factors=factors), quantiles(x + m * factors[:, None], 0.5))


@pytest.mark.parametrize("column", ["p", "q"])
def test_what_has_no_coefficient_is_not_read(column: str) -> None:
    x, m = normal((2, 300), 1) * 2, normal((2, 300), 2) * 2
    table = Table([0], **{"p": 1.0, "q": 1.0, column: 0.0}, b=1.0, quantile=0.8)
    (x if column == "p" else m)[:, 7] = NAN
    assert torch.equal(bounds(m, table, x=x), quantiles(m if column == "p" else x, 0.8))


# Guidance rescale


def factors_of(m: Tensor, guidance: Tensor, phi: float, size: int | None = None) -> Tensor:
    batch, size = len(m) // 2, size or m.shape[1]
    out = torch.empty(batch, device=DEVICE)
    scratch = reductions.rescale_scratch(batch, size, DEVICE)
    reductions.rescale_factor(m.to(DEVICE), m.shape[1], batch, size, guidance.to(DEVICE), phi, scratch, out)
    return out.cpu()


def factors_by_formula(m: Tensor, guidance: Tensor, phi: float) -> Tensor:
    u, c = m.double().chunk(2)
    guided = c + (guidance.double()[:, None] - 1) * (c - u)
    return phi * c.std(dim=1, correction=0) / guided.std(dim=1, correction=0) + 1 - phi


WEIGHTS = torch.tensor([7.5, 0.0, 1.0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("size", "phi"), [(2, 0.7), (7, 1.0), (1024, 0.1), (1025, 0.7), (5000, 0.7)])
def test_rescale_is_that_of_the_cpu_kernel(size: int, phi: float, dtype: torch.dtype) -> None:
    """A guided output of 1 comes out of the step as the factor. Sums in another order differ by 1e-15, no float."""
    m = torch.cat([normal((3, size), 1) + 0.5, 2 * normal((3, size), 2) - 0.25]).to(dtype)
    m[:, -1] = 1.0
    got = factors_of(m, WEIGHTS, phi)
    options = {"guidance": WEIGHTS, "guidance_rescale": phi, "backend": "cpu"}
    step = ops.step(torch.zeros(3, size), m, Table([0], q=1.0, b=1.0), 0, **options)  # type: ignore[arg-type]
    assert torch.equal(got, step[:, -1])
    # Four roundings of u + w (c - u), whose terms reach w (|u| + |c|), against deviations near those.
    assert torch.allclose(got.double(), factors_by_formula(m, WEIGHTS, phi), rtol=64 * UNIT)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of 0 / 0
@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e30], ids=str)
@pytest.mark.parametrize("size", [1, 3, 1500])
def test_constant_outputs_are_left_alone(value: float, size: int) -> None:
    m = torch.cat([torch.full((3, size), 0.5 * value), torch.full((3, size), value)])
    assert torch.equal(factors_of(m, WEIGHTS, 0.7), torch.ones(3))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # NumPy, of infinities
@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("half", [0, 1], ids=["unconditional", "conditional"])
def test_only_the_sample_with_a_nan_is_lost(bad: float, half: int) -> None:
    m = torch.cat([normal((3, 50), 1), normal((3, 50), 2)])
    want = factors_of(m, WEIGHTS, 0.7)
    m[3 * half, 3] = bad
    got = factors_of(m, WEIGHTS, 0.7)
    assert got[0].isnan() and torch.equal(got[1:], want[1:])


def test_large_offsets_do_not_hide_small_deviations() -> None:
    """The values are whole 64ths: the guided output is exact, the factor one rounding."""
    m = 1000 + (normal((2, 3000), 1) * 64).round() / 64
    weight = torch.tensor([3.0])
    assert torch.allclose(factors_of(m, weight, 1.0).double(), factors_by_formula(m, weight, 1.0), rtol=2 * UNIT)


def test_the_variance_half_is_not_read() -> None:
    m = torch.cat([normal((2, 300), 1), normal((2, 300), 2)])
    padded = torch.cat([m, torch.full_like(m, NAN)], dim=1)
    assert torch.equal(factors_of(padded, WEIGHTS[:2], 0.7, 300), factors_of(m, WEIGHTS[:2], 0.7))


def test_factors_do_not_depend_on_the_batch() -> None:
    m = torch.cat([normal((3, 2500), 1), normal((3, 2500), 2)])
    together = factors_of(m, WEIGHTS, 0.7)
    for i in range(3):
        assert torch.equal(together[i : i + 1], factors_of(m[i::3].contiguous(), WEIGHTS[i : i + 1], 0.7))


# What the interpreter cannot show


COMPILE = """
import dataclasses
from triton.backends.compiler import GPUTarget
from fastsample.kernels.variants import likelihood, reductions

for variant in [*reductions.variants(), *likelihood.variants()]:
    if variant.dtype != "float32":
        continue
    one = {name: 1 for name in ("size", "m_stride") if name in variant.signature}
    constants = {**variant.constants, **one}
    signature = {name: "constexpr" if name in constants else kind for name, kind in variant.signature.items()}
    aligned = tuple(name for name in variant.aligned if name not in one)
    changed = dataclasses.replace(variant, signature=signature, constants=constants, aligned=aligned)
    changed.compile(GPUTarget("cuda", 90, 32))
"""


@Ahead
def compiled() -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)


@pytest.mark.ahead(compiled)
def test_kernels_compile_for_samples_of_one_element() -> None:
    """There Triton makes a constant of the size, which the interpreter does not."""
    done = compiled.result()
    assert done.returncode == 0, done.stderr


@triton.jit
def pick_kernel(counts, lower, out):
    bucket, below, through = reductions._pick(counts, tl.load(lower), 0)
    tl.store(out, bucket)
    tl.store(out + 1, below)
    tl.store(out + 2, through)


def test_counts_may_exceed_32_bits() -> None:
    counts = torch.zeros(reductions._SLOTS.value, dtype=torch.int64, device=DEVICE)
    counts[:3] = torch.tensor([5, 3 * 2**30, 7])
    out = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    pick_kernel[(1,)](counts, torch.tensor(10, device=DEVICE), out)
    assert out.tolist() == [1, 5, 5 + 3 * 2**30]
