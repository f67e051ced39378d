"""ops.posterior: improved-diffusion's means and log variances, rows per sample, gradients, and what has no variance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Schedule, Table, ops
from fastsample.ops.posterior import posterior
from fastsample.ops.posterior.reference import posterior_reference
from fastsample.samplers.ddpm import DDPM
from support.chains import CHAINS, learned_model, toy_model
from support.golden import golden

SCHEDULE = Schedule.cosine(20)


def close(got: Tensor, want: Any, tolerance: float) -> bool:
    want = torch.as_tensor(want)
    return bool((got - want).abs().max() <= tolerance * want.abs().max())


# Unclipped, as published.
@pytest.mark.filterwarnings("ignore:at t = 3999 x0 is")
@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
@pytest.mark.parametrize(("name", "timesteps", "seed"), CHAINS)
def test_golden_distributions(backend: str, name: str, timesteps: str, seed: int, clip: float | None) -> None:
    """p_mean_variance at x_T of a learned range: within 1e-5 of the largest value, both in float32."""
    data = golden(name)
    table = DDPM(Schedule.from_betas(data["betas"]), timesteps=timesteps, variance="learned_range", clip=clip).table
    x = torch.from_numpy(data["x_T"])
    suffix = "_clip" if clip else ""
    for i, index in enumerate(data["step_index"].tolist()):
        row = len(table) - 1 - index
        out = learned_model(x, torch.full((len(x),), int(table.t[row])))
        mean, log_variance = posterior(x, out, table, row, backend=backend)
        assert close(mean, data["mean" + suffix][i], 1e-5), index
        assert close(log_variance, data["log_variance" + suffix][i], 1e-5), index


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("row", [0, 7, 18, -1])
def test_it_is_what_the_step_draws_from(backend: str, variance: str, row: int) -> None:
    """x' = mean + exp(log_variance / 2) z, and the mean itself in the last row: four float32 roundings apart."""
    table = DDPM(SCHEDULE, variance=variance, clip=1.0).table
    x, z = ops.randn((3, 2, 5), seed=1), ops.randn((3, 2, 5), seed=2)
    out = learned_model(x, torch.full((3,), 4))
    mean, log_variance = posterior(x, out, table, row, backend=backend)
    drawn = ops.step(x, out, table, row, noise=z, backend=backend)
    assert mean.shape == log_variance.shape == x.shape
    expected = mean if row == -1 else mean + torch.exp(log_variance / 2) * z
    assert close(drawn, expected, 1e-6)
    k = row % 20
    v = out[:, 2:].double()
    assert close(log_variance, 2 * (table.g0[k] + table.g1[k] * v) + 0 * x, 1e-6)


def test_rows_of_ddim_have_the_variance_of_their_noise(backend: str) -> None:
    table = DDIM(SCHEDULE, steps=5, eta=0.7, prediction="x0").table
    x = ops.randn((2, 3), seed=1)
    mean, log_variance = posterior(x, toy_model(x, torch.zeros(2)), table, 2, backend=backend)
    assert close(log_variance, torch.full((2, 3), 2 * math.log(table.s[2])), 1e-6)
    assert torch.equal(mean, ops.step(x, toy_model(x, torch.zeros(2)), table.replace(s=0.0), 2, backend=backend))


def test_a_row_of_its_own_for_every_sample(backend: str) -> None:
    """The same bits as each sample alone."""
    for variance in ("fixed_small", "learned_range"):
        table = DDPM(SCHEDULE, variance=variance, clip=1.0).table
        x = ops.randn((4, 2, 5), seed=3)
        out = learned_model(x, torch.full((4,), 4))
        rows = torch.tensor([19, 0, 7, -1])
        together = posterior(x, out, table, rows, backend=backend)
        for i, row in enumerate(rows.tolist()):
            alone = posterior(x[i : i + 1], out[i : i + 1], table, row, backend=backend)
            for whole, part in zip(together, alone, strict=True):
                assert torch.equal(whole[i : i + 1], part)


def test_every_backend_agrees(backend: str) -> None:
    table = DDPM(SCHEDULE, variance="learned_range", clip=1.0).table
    x = ops.randn((3, 4, 33), seed=4)
    out = learned_model(x, torch.full((3,), 4))
    got = posterior(x, out, table, 5, backend=backend)
    want = posterior(x.double(), out.double(), table, 5, backend="reference")
    # The mean takes three float32 operations on numbers below 5, the log variance one.
    assert all(close(a, b, 1e-6) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_outputs_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    table = DDPM(SCHEDULE, variance="learned_range").table
    x = ops.randn((2, 3, 8), seed=5)
    out = learned_model(x, torch.full((2,), 4)).to(dtype)
    got, want = (posterior(x, given, table, 5, backend=backend) for given in (out, out.float()))
    assert all(part.dtype == torch.float32 and torch.equal(part, other) for part, other in zip(got, want, strict=True))


def test_strided_operands(backend: str) -> None:
    table = DDPM(SCHEDULE, variance="learned_range").table
    x = ops.randn((2, 6, 8), seed=5).transpose(1, 2)
    out = torch.cat([toy_model(x, torch.zeros(2)), x.cos()], dim=1)
    flipped = out.transpose(1, 2).contiguous().transpose(1, 2)
    for got, want in zip(
        posterior(x, flipped, table, 5, backend=backend),
        posterior(x.contiguous(), out.contiguous(), table, 5, backend=backend),
        strict=True,
    ):
        assert torch.equal(got, want)


def test_gradients() -> None:
    table = DDPM(SCHEDULE, variance="learned_range", clip=1.0).table
    x = ops.randn((2, 3), seed=6).double().requires_grad_()
    out = ops.randn((2, 6), seed=7).double().requires_grad_()
    for row in (4, torch.tensor([4, 19])):
        assert torch.autograd.gradcheck(lambda x, out, row=row: posterior(x, out, table, row), (x, out))
    mean, log_variance = posterior(x.detach().float(), out.float(), table, 4)
    assert mean.requires_grad and log_variance.requires_grad
    with torch.no_grad():
        assert not posterior(x.float(), out.float(), table, 4, backend="reference")[0].requires_grad


def test_operands_are_left_alone(backend: str) -> None:
    table = DDPM(SCHEDULE, variance="learned_range").table
    x, out = ops.randn((2, 3), seed=6), ops.randn((2, 6), seed=7)
    before = x.clone(), out.clone()
    posterior(x, out, table, 3, backend=backend)
    assert torch.equal(x, before[0]) and torch.equal(out, before[1])


FIXED = DDPM(SCHEDULE).table
LEARNED = DDPM(SCHEDULE, variance="learned_range").table


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"table": DDIM(SCHEDULE, steps=5).table}, ValueError, "row 1 is deterministic", id="eta-0"),
        pytest.param({"table": DDIM(SCHEDULE, steps=5, eta=1.0).table, "row": 4}, ValueError, "row 4 is d", id="last"),
        pytest.param({"table": LEARNED}, ValueError, "row 1 reads a learned variance", id="no-variance-half"),
        pytest.param(
            {"table": Table([3, 2, 1], c1=[0.0, 1.0, 1.0], s=1.0)}, ValueError, "row 1 reads entries of", id="history"
        ),
        pytest.param({"row": 20}, ValueError, "row 20 is outside a table of 20", id="row"),
        pytest.param({"row": torch.tensor([1, 2, 3])}, ValueError, "one int or 2", id="rows-shape"),
        pytest.param({"row": torch.tensor([1, 20])}, ValueError, "not all inside", id="rows-outside"),
        pytest.param({"row": torch.tensor([1.0, 2.0])}, TypeError, "int64", id="rows-dtype"),
        pytest.param({"model_output": torch.zeros(2, 4)}, ValueError, "model_output must have x's shape", id="shape"),
        pytest.param({"model_output": torch.zeros(2, 3).int()}, TypeError, "floating point", id="output-dtype"),
        pytest.param({"model_output": None}, TypeError, "model_output must be a tensor", id="no-output"),
        pytest.param({"x": torch.zeros(2, 3).half()}, TypeError, "x must be float32", id="state-dtype"),
        pytest.param({"table": None}, TypeError, "table must be a fastsample.Table", id="no-table"),
        pytest.param({"backend": "gpu"}, ValueError, "gpu", id="backend"),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"x": torch.zeros(2, 3), "model_output": torch.zeros(2, 3), "table": FIXED, "row": 1}
    with pytest.raises(error, match=message):
        posterior(**{**given, **arguments})


def test_a_fixed_variance_needs_no_second_half() -> None:
    x = torch.zeros(2, 3)
    for out in (torch.zeros(2, 3), torch.cat([torch.zeros(2, 3), torch.full((2, 3), math.nan)], dim=1)):
        mean, log_variance = posterior(x, out, FIXED, 1)
        assert mean.isfinite().all() and np.allclose(log_variance, 2 * FIXED.g0[1], rtol=1e-6)


def test_reference_is_the_formula_in_float64() -> None:
    table = DDPM(SCHEDULE, variance="learned_range", clip=1.0).table
    x, m = (torch.randn(3, channels, 5, dtype=torch.float64) for channels in (2, 4))
    for row in (0, 7, torch.tensor([0, 7, 19])):
        k = row.numpy() if isinstance(row, Tensor) else np.full(3, row)
        p, q, a, b, g0, g1, s = (
            torch.from_numpy(getattr(table, name)[k])[:, None, None] for name in ["p", "q", "a", "b", "g0", "g1", "s"]
        )
        mean, log_variance = posterior_reference(x, m, table, row)
        of_m, v = m.chunk(2, dim=1)
        torch.testing.assert_close(mean, a * x + b * (p * x + q * of_m).clamp(-1, 1), rtol=1e-12, atol=1e-12)
        wanted = 2 * (g0 + g1 * v) + 2 * torch.where(s == 0, 1.0, s).log()
        torch.testing.assert_close(log_variance, wanted, rtol=1e-12, atol=1e-12)
