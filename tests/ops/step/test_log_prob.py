"""ops.step's log_prob_out: the density of what was drawn, against torch.distributions in float64."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, Normal

from fastsample import DDPM, Schedule, Table, ops
from support.devices import Target
from support.formula import normal
from support.gaussian import Epsilon
from support.levels import LEVELS, at_level, needs_cpu, on_threads
from support.step_modes import DTYPES, KINDS

# One part of a sample and several on every backend, whole and not.
SHAPES = [(1, 1), (3, 5), (2, 3, 5, 7), (3, 1, 128), (2, 4, 33, 31), (1, 2, 2048)]
NOISY = [name for name, row in KINDS.items() if row.get("s")]
OUTPUTS = [*((kind, torch.float32) for kind in NOISY), *(("learned", dtype) for dtype in DTYPES[1:])]
EPSILON = 2.0**-24


def table_of(kind: str) -> Table:
    """Three plain rows, whose entries the last one may read."""
    row = KINDS[kind]
    return Table([3, 2, 1, 0], **{k: v if k == "limit" else np.array([0.0, 0, 0, v]) for k, v in row.items()})


def density(m: Tensor, table: Table, z: Tensor) -> tuple[Tensor, Tensor]:
    """(log density of the last row's x' in float64, what its roundings may come to), per sample.

    About the mean, since float64 has no room for both where a variance is that small.
    """
    channels = z.shape[1]
    learned = float(table.g1[3]) * m[:, channels:].double() if m.shape[1] > channels else torch.zeros_like(z).double()
    learned = learned.clamp(-126 * math.log(2), 127 * math.log(2))
    sigma = float(table.s[3]) * math.exp(float(table.g0[3])) * learned.exp()
    found = Normal(0.0, sigma).log_prob(sigma * z.double()).flatten(1).sum(1)
    # s, g1 v and the result are rounded to float32; drawn noise may differ from the reference's by an ulp.
    each = 2 + 2 * learned.abs() + 4 * z.double() ** 2
    return found, EPSILON * (found.abs() + each.flatten(1).sum(1))


def operands(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    channels = 2 * shape[1] if "g1" in KINDS[kind] else shape[1]
    return normal(shape, 1), normal((shape[0], channels, *shape[2:]), 2, dtype), normal(shape, 3)


@pytest.mark.parametrize(("kind", "dtype"), OUTPUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_density_of_given_noise(backend: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, m, z = operands(shape, kind, dtype)
    history = [normal(shape, 4 + i) for i in range(3)]
    table, log_prob = table_of(kind), torch.full((shape[0],), math.nan)
    entry = torch.full_like(x, math.nan)
    got = ops.step(x, m, table, 3, noise=z, history=history, x0_out=entry, log_prob_out=log_prob, backend=backend)
    want, error = density(m, table, z)
    assert ((log_prob.double() - want).abs() <= error).all()
    plain, plain_entry = torch.empty_like(x), torch.full_like(x, math.nan)
    ops.step(x, m, table, 3, noise=z, history=history, out=plain, x0_out=plain_entry, backend=backend)
    assert torch.equal(got, plain) and torch.equal(entry, plain_entry), "asking changes nothing else"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["folded-noise", "learned"])
def test_density_of_drawn_noise_on_every_backend(any_backend: Target, kind: str, shape: tuple[int, ...]) -> None:
    x, m, _ = operands(shape, kind)
    log_prob = torch.full((shape[0],), math.nan, device=any_backend.device)
    given = x.to(any_backend.device), m.to(any_backend.device), table_of(kind), 3
    ops.step(*given, seed=7, log_prob_out=log_prob, backend=any_backend.backend)
    want, error = density(m, table_of(kind), ops.randn(shape, seed=7, step=3, stream=1))
    assert ((log_prob.cpu().double() - want).abs() <= error).all()


def test_guided_rescaled_and_thresholded(any_backend: Target) -> None:
    """The mean is another, what is drawn is not: the variance half is the conditional one's."""
    x, m = normal((2, 3, 35), 1), normal((4, 6, 35), 2)
    table = Table([3, 2, 1, 0], **KINDS["thresholded"], s=0.5, g1=0.7)
    log_prob = torch.full((2,), math.nan, device=any_backend.device)
    where = {"guidance": [7.5, 1.0], "guidance_rescale": 0.7}
    given = x.to(any_backend.device), m.to(any_backend.device), table, 3
    ops.step(*given, seed=[3, 4], log_prob_out=log_prob, backend=any_backend.backend, **where)
    want, error = density(m[2:], table, ops.randn(x.shape, seed=[3, 4], step=3, stream=1))
    assert ((log_prob.cpu().double() - want).abs() <= error).all()


def test_rows_of_samples(any_backend: Target) -> None:
    """Each sample has its own row's scale; on a GPU one that draws nothing, or does not exist, has no density."""
    x, m, z = normal((4, 3, 35), 1), normal((4, 3, 35), 2), normal((4, 3, 35), 3)
    table = Table([2, 1, 0], a=0.5, s=[0.5, 0.1, 0.0])
    rows = torch.tensor([0, 1, -3, 1])
    log_prob = torch.full((4,), math.nan, device=any_backend.device)
    on = any_backend.device
    ops.step(
        *(x.to(on), m.to(on), table, rows.to(on)),
        noise=z.to(on),
        log_prob_out=log_prob,
        backend=any_backend.backend,
    )
    sigma = torch.tensor([0.5, 0.1, 0.5, 0.1], dtype=torch.float64).reshape(-1, 1, 1)
    want = Normal(0.0, sigma).log_prob(sigma * z.double()).flatten(1).sum(1)
    torch.testing.assert_close(log_prob.cpu().double(), want, rtol=4 * EPSILON, atol=1e-5)


@needs_cpu
@pytest.mark.parametrize("kind", ["folded-noise", "learned"])
def test_same_bits_on_every_level_and_thread_count_and_in_any_batch(kind: str) -> None:
    x, m, _ = operands((5, 1, 4099), kind, torch.bfloat16)
    together, alone = set(), set()
    for level in LEVELS:
        for threads in (1, 3):
            log_prob, one = torch.empty(5), torch.empty(1)
            with at_level(level), on_threads(threads):
                ops.step(x, m, table_of(kind), 3, seed=11, log_prob_out=log_prob, backend="cpu")
                ops.step(x[3:4], m[3:4], table_of(kind), 3, seed=11, index=3, log_prob_out=one, backend="cpu")
            together.add(log_prob.numpy().tobytes())
            alone.add(one.numpy().tobytes())
            assert one == log_prob[3]
    assert len(together) == len(alone) == 1


def test_a_chain_has_the_density_of_its_gaussian() -> None:
    """Each step of a model of a Gaussian is one of x: together they are one Gaussian, of all states but the first."""
    schedule = Schedule.linear(1000)
    sampler = DDPM(schedule, steps=6, clip=None)
    model, table = Epsilon(schedule), sampler.table
    x, total = normal((2, 1, 40), 5), torch.zeros(2, dtype=torch.float64)
    states, slopes, means, log_prob = [x.double()], [], [], torch.empty(2)
    for k, t in enumerate(table.t[:-1]):  # the last row draws nothing
        times = torch.full((2,), int(t))

        def mean(state: Tensor, k: int = k, times: Tensor = times) -> Tensor:
            zero = torch.zeros_like(state)
            return ops.step(state, model(state, times), table, k, noise=zero, backend="reference")

        zero = torch.zeros(2, 1, 40, dtype=torch.float64)
        means.append(float(mean(zero)[0, 0, 0]))
        slopes.append(float(mean(zero + 1)[0, 0, 0]) - means[-1])
        x = ops.step(x, model(x, times), table, k, seed=9, log_prob_out=log_prob)
        total += log_prob
        states.append(x.double())
    sigma = table.s * np.exp(table.g0)
    chain = torch.stack(states[1:], dim=-1)
    # x_k = slope x_{k-1} + mean + sigma z: column j of the factor is what z_j has become by row k.
    factor, location = torch.zeros(len(slopes), len(slopes)).double(), torch.zeros_like(chain)
    before = states[0]
    for k, slope in enumerate(slopes):
        if k:
            factor[k] = slope * factor[k - 1]
        factor[k, k] = float(sigma[k])
        before = location[..., k] = slope * before + means[k]
    want = MultivariateNormal(location, scale_tril=factor).log_prob(chain).flatten(1).sum(1)
    # x' itself was rounded to float32, a few parts in 10^7 of the smallest sigma.
    error = 40 * len(slopes) * 16 * EPSILON * float(abs(chain).max()) / float(sigma[:-1].min())
    assert (total - want).abs().max() <= error < 1e-2 * want.abs().min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["folded-noise", "learned", "clamped-noise"])
def test_derivatives_are_those_of_the_density_at_what_was_drawn(kind: str, dtype: torch.dtype) -> None:
    x, m, z = (one.to(dtype) for one in operands((2, 3, 5), kind))
    table = table_of(kind)
    m.requires_grad_()
    log_prob = torch.empty(2, dtype=dtype)
    drawn = ops.step(x, m, table, 3, noise=z, log_prob_out=log_prob).detach()
    (got,) = torch.autograd.grad(log_prob.sum(), m)
    mean = ops.step(x.double(), m.double(), table, 3, noise=torch.zeros_like(x).double())
    v = m[:, 3:].double() if m.shape[1] > 3 else mean * 0
    sigma = float(table.s[3]) * torch.exp(float(table.g0[3]) + float(table.g1[3]) * v)
    (want,) = torch.autograd.grad(Normal(mean, sigma).log_prob(drawn.double()).sum(), m)
    assert want.abs().max() > 0.1
    # x' holds z to a rounding of x' over sigma.
    torch.testing.assert_close(got, want, rtol=64 * torch.finfo(dtype).eps, atol=64 * torch.finfo(dtype).eps)


def test_compiled() -> None:
    x, m, _ = operands((2, 3, 5), "learned")
    want, got = torch.empty(2), torch.full((2,), math.nan)

    def step(x: Tensor, m: Tensor, log_prob: Tensor) -> Tensor:
        return ops.step(x, m, table, 3, seed=5, log_prob_out=log_prob)

    table = table_of("learned")
    eager = step(x, m, want)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(x, m, got)
    assert torch.equal(compiled, eager) and torch.equal(got, want)


X, M = torch.zeros(2, 3, 4), torch.zeros(2, 3, 4)
SILENT_LAST = Table([1, 0], a=1.0, s=[1.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"row": 1}, ValueError, "row 1 draws nothing", id="row-without-noise"),
        pytest.param({"row": torch.tensor([0, 1])}, ValueError, "row 1 draws nothing", id="one-row-without-noise"),
        pytest.param({"log_prob_out": torch.zeros(3)}, ValueError, r"log_prob_out must have shape \(2,\)", id="shape"),
        pytest.param({"log_prob_out": torch.zeros(2, 1)}, ValueError, "log_prob_out must have shape", id="two-axes"),
        pytest.param(
            {"log_prob_out": torch.zeros(2).half()}, TypeError, "log_prob_out must be torch.float32", id="dtype"
        ),
        pytest.param({"log_prob_out": torch.zeros(2).to("meta")}, ValueError, "log_prob_out lies on meta", id="device"),
        pytest.param({"log_prob_out": [0.0, 0.0]}, TypeError, "log_prob_out must be a tensor", id="list"),
        pytest.param({"log_prob_out": torch.zeros(1).expand(2)}, ValueError, "log_prob_out is expanded", id="expanded"),
        pytest.param({"log_prob_out": M[:, 0, 0]}, ValueError, "log_prob_out overlaps model_output", id="in-m"),
    ],
)
def test_refused_before_anything_is_written(
    backend: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    out = torch.full_like(X, math.nan)
    call = {"row": 0, "log_prob_out": torch.zeros(2), "seed": 0, "out": out, **arguments}
    with pytest.raises(error, match=message):
        ops.step(X, M, SILENT_LAST, call.pop("row"), backend=backend, **call)
    assert out.isnan().all()
