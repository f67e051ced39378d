"""Dynamic thresholding and guidance rescale: per sample, exact, and safe at the ends."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastsample import Table, ops
from fastsample.ops.step.reductions import rescale_factor, threshold
from support.formula import UNIT, normal, same_values
from support.quantiles import VALUES_AT_THE_ENDS

INF, NAN = math.inf, math.nan


def thresholded(x0: Tensor, quantile: float, limit: float, backend: str, **options: object) -> Tensor:
    """x0 as a row limits it; the model says x0 itself, so nothing is rounded before."""
    table = Table([0], q=1.0, b=1.0, quantile=quantile, limit=limit)
    return ops.step(torch.zeros(x0.shape), x0, table, 0, backend=backend, **options)  # type: ignore[arg-type]


def wanted(x0: Tensor, quantile: float, *limits: float) -> Tensor:
    """The same from torch.quantile in float32, one sample at a time; for several limits one after the other."""
    samples = []
    for one in x0.float():
        found = torch.quantile(one.abs().flatten(), quantile)
        r = torch.stack([found.clamp(1.0, limit) for limit in limits]).reshape(-1, *(1,) * one.ndim)
        r = r.masked_fill(r.isinf(), NAN)
        samples.append(torch.minimum(torch.maximum(one, -r), r) / r)
    return torch.cat([torch.stack(part) for part in zip(*samples, strict=True)])


# Around the width of a vector, a block of 2048 and a rank that float32 no longer holds exactly with its weight.
SIZES = [1, 2, 3, 4, 7, 16, 17, 101, 1000, 2047, 2048, 2049, 20_001]


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_thresholds_are_those_of_torch_quantile(backend: str, quantile: float) -> None:
    limits = (INF, 1.5, 1.0)
    for size in SIZES:
        # The first sample exceeds 1, the second hardly, the third never.
        x0 = normal((3, size), size) * torch.tensor([3.0, 0.6, 0.01])[:, None]
        got = torch.cat([thresholded(x0, quantile, limit, backend) for limit in limits])
        assert torch.equal(got, wanted(x0, quantile, *limits)), size


@pytest.mark.parametrize("quantile", [0.25, 0.5, 0.75, 0.9, 0.999])
def test_ties(backend: str, quantile: float) -> None:
    rungs = torch.tensor([0.0, -0.0, 1.0, -2.0, 2.0, 2.0, -3.0, 3.0])
    for size in (2, 8, 33, 4099):
        index = torch.randint(8, (2, size), generator=torch.Generator().manual_seed(size))
        x0 = rungs[index]
        assert torch.equal(thresholded(x0, quantile, INF, backend), wanted(x0, quantile, INF)), size
    constant = torch.full((1, 77), -2.5)
    assert torch.equal(thresholded(constant, quantile, INF, backend), torch.full((1, 77), -1.0))


@pytest.mark.parametrize("order", ["ascending", "descending", "last-is-largest"])
def test_neighbouring_floats_are_told_apart(backend: str, order: str) -> None:
    """Ranks in one bucket of every digit but the last, and in the first and last bucket of each."""
    bits = torch.arange(0x40400000 - 1023, 0x40400000 + 1025, dtype=torch.int32)
    ends = torch.tensor([0, 1, 0x3FF, 0x400, 0xFFFFF, 0x100000, 0x7F7FFFFF], dtype=torch.int32)
    x0 = torch.cat([bits, ends]).view(torch.float32)
    x0 = {"ascending": x0, "descending": x0.flip(0), "last-is-largest": x0.roll(-1)}[order][None]
    for quantile in (0.1, 0.5, 0.7, 0.99999):
        assert torch.equal(thresholded(x0, quantile, INF, backend), wanted(x0, quantile, INF)), quantile


@pytest.mark.parametrize("values", VALUES_AT_THE_ENDS)
@pytest.mark.parametrize("limit", [INF, 5.0], ids=["free", "max-5"])
@pytest.mark.parametrize("quantile", [0.5, 0.9, 1.0])
def test_values_at_the_ends(backend: str, values: list[float], limit: float, quantile: float) -> None:
    x0 = torch.tensor([values, [1.0, 2.0, 3.0, 4.0]])
    got = thresholded(x0, quantile, limit, backend)
    assert same_values(got, wanted(x0, quantile, limit))
    assert got[1].isfinite().all(), "only the sample that holds them suffers"


@pytest.mark.parametrize(
    ("quantile", "free", "max_5"),
    [
        pytest.param(0.875, 7.0, 5.0, id="finite"),
        pytest.param(0.90625, NAN, 5.0, id="weight-a-quarter"),
        pytest.param(0.96875, NAN, NAN, id="weight-three-quarters"),
        pytest.param(1.0, NAN, NAN, id="infinity-itself"),
    ],
)
def test_a_quantile_next_to_an_infinity(backend: str, quantile: float, free: float, max_5: float) -> None:
    """Between 7 and infinity torch.quantile gives infinity up to half of the way, which a limit cuts, and then NaN."""
    x0 = torch.tensor([[0.5, 1.0, 2.0, -3.0, sign * INF, 4.0, 5.0, 6.0, 7.0] for sign in (1, -1)])
    for limit, r in ((INF, free), (5.0, max_5)):
        got = thresholded(x0, quantile, limit, backend)
        assert same_values(got, torch.minimum(torch.maximum(x0, torch.tensor(-r)), torch.tensor(r)) / r), limit
        assert same_values(got, wanted(x0, quantile, limit)), limit


def test_samples_do_not_share_a_threshold(backend: str) -> None:
    x0 = normal((5, 3, 700), 1) * torch.tensor([1.0, 10.0, 0.1, 100.0, 3.0])[:, None, None]
    together = thresholded(x0, 0.9, INF, backend)
    for i in range(5):
        assert torch.equal(together[i : i + 1], thresholded(x0[i : i + 1], 0.9, INF, backend)), i


def test_a_state_may_be_one_number_per_sample(backend: str) -> None:
    x0 = torch.tensor([0.5, -4.0, 3.0])
    assert torch.equal(thresholded(x0, 0.9, INF, backend), torch.tensor([0.5, -1.0, 1.0]))
    assert torch.equal(thresholded(x0, 0.9, 2.0, backend), torch.tensor([0.5, -1.0, 1.0]))
    m = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    table = Table([0], q=1.0, b=1.0)
    got = ops.step(x0, m, table, 0, guidance=2.0, guidance_rescale=0.5, backend=backend)
    assert got.tolist() == [7.0, 8.0, 9.0], "a single number does not deviate"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_x0(backend: str, dtype: torch.dtype) -> None:
    x0 = (3 * normal((2, 3001), 5)).to(dtype)
    assert torch.equal(thresholded(x0, 0.9, INF, backend), wanted(x0, 0.9, INF))


def test_threshold_has_the_shape_that_broadcasts() -> None:
    assert threshold(normal((3, 2, 4, 5), 0), 0.9, INF).shape == (3, 1, 1, 1)
    assert rescale_factor(normal((3, 2, 4), 0), normal((3, 2, 4), 1), 0.5).shape == (3, 1, 1)


# Guidance rescale


def rescaled_by_diffusers(guided: Tensor, conditional: Tensor, phi: float) -> Tensor:
    """rescale_noise_cfg of diffusers' pipelines, written again in float64: unbiased deviations over all axes but 0."""
    guided, conditional = guided.double(), conditional.double()
    axes = tuple(range(1, guided.ndim))
    rescaled = guided * (conditional.std(dim=axes, keepdim=True) / guided.std(dim=axes, keepdim=True))
    return phi * rescaled + (1 - phi) * guided


@pytest.mark.parametrize("phi", [0.1, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(3, 2), (2, 3, 5, 7), (2, 4, 1031), (1, 20_003)], ids=str)
def test_rescale_is_that_of_diffusers(backend: str, shape: tuple[int, ...], phi: float) -> None:
    """Numerator and denominator are unbiased alike, so the quotient is that of our biased deviations."""
    w = 7.5
    u, c = normal(shape, 1) + 0.5, 2 * normal(shape, 2) - 0.25
    m = torch.cat([u, c])
    got = ops.step(
        torch.zeros(shape), m, Table([0], q=1.0, b=1.0), 0, guidance=w, guidance_rescale=phi, backend=backend
    )
    guided = u.double() + w * (c.double() - u.double())
    want = rescaled_by_diffusers(guided, c, phi)
    # Four roundings of u + w (c - u), whose terms reach w (|u| + |c|), a deviation that moves as much, and four more.
    size = w * float((u.abs() + c.abs()).max())
    assert (got - want).abs().max() <= 2 * 4 * UNIT * size * 4 + 4 * UNIT * float(want.abs().max())


@pytest.mark.parametrize("value", [0.0, 0.1, -3.7, 1e30], ids=str)
@pytest.mark.parametrize("size", [1, 3, 1000, 9001])
def test_constant_outputs_are_left_alone(backend: str, value: float, size: int) -> None:
    """diffusers divides by 0 here (its issue 13425)."""
    shape = (2, size)
    table = Table([0], q=1.0, b=1.0)
    for u in (value, 0.5 * value, 0.0):
        m = torch.cat([torch.full(shape, u), torch.full(shape, value)])
        options = dict(guidance=3.0, backend=backend)
        plain = ops.step(torch.zeros(shape), m, table, 0, **options)  # type: ignore[arg-type]
        rescaled = ops.step(torch.zeros(shape), m, table, 0, guidance_rescale=0.7, **options)  # type: ignore[arg-type]
        assert plain.isfinite().all() and torch.equal(rescaled, plain), u


def test_a_constant_conditional_half_scales_by_1_minus_phi(backend: str) -> None:
    shape = (2, 1000)
    m = torch.cat([normal(shape, 1), torch.full(shape, 0.1)])
    table = Table([0], q=1.0, b=1.0)
    plain = ops.step(torch.zeros(shape), m, table, 0, guidance=3.0, backend=backend)
    got = ops.step(torch.zeros(shape), m, table, 0, guidance=3.0, guidance_rescale=0.75, backend=backend)
    assert torch.equal(got, 0.25 * plain), "0.25 is exact"


@pytest.mark.parametrize("bad", [NAN, INF], ids=str)
@pytest.mark.parametrize("half", [0, 1], ids=["unconditional", "conditional"])
def test_only_the_sample_with_a_nan_is_lost(backend: str, bad: float, half: int) -> None:
    u, c = normal((2, 50), 1), normal((2, 50), 2)
    table = Table([0], q=1.0, b=1.0)
    options = dict(guidance=3.0, guidance_rescale=0.7, backend=backend)
    want = ops.step(torch.zeros(2, 50), torch.cat([u, c]), table, 0, **options)  # type: ignore[arg-type]
    (u, c)[half][0, 3] = bad
    got = ops.step(torch.zeros(2, 50), torch.cat([u, c]), table, 0, **options)  # type: ignore[arg-type]
    assert got[0].isnan().all() and torch.equal(got[1], want[1])


def test_large_offsets_do_not_hide_small_deviations(backend: str) -> None:
    """The deviation is a thousandth of the mean: sums of squares in float32 would have no digit of it left."""
    shape = (1, 10_000)
    c = 1000 + (normal(shape, 1) * 64).round() / 64
    u = 1000 + (normal(shape, 2) * 64).round() / 64
    got = ops.step(
        torch.zeros(shape),
        torch.cat([u, c]),
        Table([0], q=1.0, b=1.0),
        0,
        guidance=3.0,
        guidance_rescale=1.0,
        backend=backend,
    )
    guided = u.double() + 3 * (c.double() - u.double())
    want = guided * (c.double().std() / guided.std())
    # The values are whole 64ths, so the guided output is exact; the factor and its product are two roundings each.
    assert ((got - want) / want).abs().max() <= 4 * UNIT
