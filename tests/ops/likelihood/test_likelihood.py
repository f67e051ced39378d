"""ops.likelihood: improved-diffusion's bits per dimension, the formulas in float64, gradients, compiled code."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from fastsample import DDIM, DDPM, Schedule, Table
from fastsample.ops.likelihood import likelihood, prior_bits
from fastsample.ops.posterior import posterior
from fastsample.samplers.limits import DynamicThreshold
from support.chains import CHAINS, golden_noise, learned_model
from support.devices import DEVICE, HAS_GPU
from support.formula import UNIT, normal
from support.golden import golden

pytest.importorskip("triton")

BACKENDS = ["reference", "triton"]
SCHEDULE = Schedule.cosine(20)
VARIANCES = ["fixed_small", "fixed_large", "learned", "learned_range"]


def run(x_start: Tensor, x: Tensor, out: Tensor, table: Table, row: int | Tensor, backend: str) -> Tensor:
    """likelihood where the backend has its tensors."""
    device = DEVICE if backend == "triton" else "cpu"
    given = (one.to(device) for one in (x_start, x, out))
    return likelihood(*given, table, row, backend=backend).cpu()


@functools.cache
def example(variance: str = "learned_range", prediction: str = "epsilon", clip: Any = 1.0) -> Table:
    return DDPM(SCHEDULE, variance=variance, prediction=prediction, clip=clip).table


def pixels(shape: tuple[int, ...], seed: int) -> Tensor:
    """8-bit images in [-1, 1], both ends among them."""
    return (normal(shape, seed).mul(100).add(128).round().clamp(0, 255) / 127.5 - 1).float()


def noised(x_start: Tensor, table: Table, rows: list[int], seed: int = 9) -> Tensor:
    levels = torch.tensor([[table.alpha[k], table.sigma[k]] for k in rows], dtype=torch.float32)  # type: ignore[index]
    alpha, sigma = levels.T.reshape(2, -1, *[1] * (x_start.ndim - 1))
    return alpha * x_start + sigma * normal(tuple(x_start.shape), seed)


def by_formula(x_start: Tensor, x: Tensor, out: Tensor, table: Table, row: int) -> Tensor:
    """The published definitions in float64: torch's divergence of two normals, and a difference of two cdfs."""
    x_start, x, out = x_start.double(), x.double(), out.double()
    mean, log_variance = posterior(x, out, table, row, backend="reference")
    p = Normal(mean, torch.exp(log_variance / 2))
    alpha, sigma = table.alpha, table.sigma
    assert alpha is not None and sigma is not None
    if row % len(table) == len(table) - 1:

        def cdf(y: Tensor) -> Tensor:
            return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))

        upper, lower = (cdf((x_start + side / 255 - p.mean) / p.stddev) for side in (1, -1))
        mass = torch.where(x_start < -0.999, upper, torch.where(x_start > 0.999, 1 - lower, upper - lower))
        nats = -mass.clamp(min=1e-12).log()
    else:
        # q(x' | x, x_start) by Bayes: x' is a priori alpha' x_start + sigma' z, and x is r x' and more noise.
        r = alpha[row] / alpha[row + 1]
        added = sigma[row] ** 2 - (r * sigma[row + 1]) ** 2
        precision = 1 / sigma[row + 1] ** 2 + r**2 / added
        q_mean = (alpha[row + 1] * x_start / sigma[row + 1] ** 2 + r * x / added) / precision
        nats = kl_divergence(Normal(q_mean, torch.full_like(q_mean, precision**-0.5)), p)
    return nats.reshape(len(x), -1).mean(dim=1) / math.log(2)


def close(got: Tensor, want: Any, tolerance: float, absolute: float = 0.0) -> bool:
    want = torch.as_tensor(want, dtype=torch.float64)
    return bool(((got.double() - want).abs() <= tolerance * want.abs() + absolute).all())


# improved-diffusion's own float32 sums -1 + log ratio + ratio, each near 1, where both variances are nearly equal.
PUBLISHED = UNIT


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("name", "timesteps", "seed"), CHAINS)
def test_golden_bits(backend: str, name: str, timesteps: str, seed: int) -> None:
    """calc_bpd_loop's terms, all rows in one call, their prior and total, and single terms with other noise."""
    data = golden(name)
    table = DDPM(Schedule.from_betas(data["betas"]), timesteps=timesteps, variance="learned_range", clip=1.0).table
    x_start, count = torch.from_numpy(data["x0_8bit"]), len(table)

    def terms(rows: list[int], seeds: list[int]) -> Tensor:
        levels = ((np.float32(one[k]) for one in (table.alpha, table.sigma)) for k in rows)  # type: ignore[index]
        noise = (golden_noise(seed, k, x_start.shape) for k in seeds)
        x = torch.cat([alpha * x_start + sigma * z for (alpha, sigma), z in zip(levels, noise, strict=True)])
        t = torch.from_numpy(table.t[rows]).repeat_interleave(len(x_start))
        each = torch.tensor(rows).repeat_interleave(len(x_start))
        return run(x_start.repeat(len(rows), 1, 1, 1), x, learned_model(x, t), table, each, backend).reshape(
            len(rows), -1
        )

    # The interpreter takes its time for every sample.
    rows = [*range(count)] if backend == "reference" else [0, count // 2, count - 1]
    vb = terms(rows, [701 + k for k in rows])
    assert close(vb.T, data["bpd_vb"][:, rows], 1e-5, PUBLISHED)
    prior = prior_bits(x_start, table)
    assert close(prior, data["bpd_prior_bpd"], 1e-5, PUBLISHED)
    if backend == "reference":
        assert close(vb.sum(dim=0) + prior, data["bpd_total_bpd"], 1e-6)
        index = data["step_index"].tolist()
        single = terms([count - 1 - i for i in index], [600 + i for i in index])
        assert close(single, data["vb_terms_bpd"], 1e-5, PUBLISHED)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("row", [0, 11, 18, -1])
@pytest.mark.parametrize("variance", VARIANCES)
def test_terms_are_those_of_the_formulas(backend: str, variance: str, row: int) -> None:
    """float32 rounds x0 three times, near 1, before x_start is taken from it: 2e-7 against deviations from 0.01."""
    table = example(variance)
    x_start = pixels((2, 2, 5, 7), 1)
    x = noised(x_start, table, [row] * 2)
    out = learned_model(x, torch.full((2,), 4))
    want = by_formula(x_start, x, out, table, row)
    assert close(run(x_start, x, out, table, row, backend), want, 2e-5)
    if backend == "reference":
        got = likelihood(x_start.double(), x.double(), out.double(), table, row)
        assert got.dtype == torch.float64 and close(got, want, 1e-9)


@pytest.mark.filterwarnings("ignore:the row at t = 19 multiplies")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("prediction", ["epsilon", "x0", "v"])
@pytest.mark.parametrize("clip", [None, 0.5], ids=["free", "clip"])
def test_predictions_and_clips(backend: str, prediction: str, clip: float | None) -> None:
    table = example("fixed_small", prediction, clip)
    x_start = pixels((2, 40), 1)
    for row in (6, 19):
        x = noised(x_start, table, [row] * 2)
        out = normal((2, 40), 3) * 0.3
        assert close(run(x_start, x, out, table, row, backend), by_formula(x_start, x, out, table, row), 2e-5), row


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gap", [0.0, 1e-3, 0.2499, 0.2501, 3.0, -1e-4, -8.0])
def test_divergences_of_close_variances_keep_their_digits(backend: str, gap: float) -> None:
    """x0 is right and only the variances differ: g + exp(-g) - 1, whose terms cancel to g^2 / 2."""
    table = example("learned", "x0", None)
    x_start = normal((1, 2, 8), 1)
    row = 6
    variance = float(example("fixed_small").g0[row]) * 2
    out = torch.cat([x_start, torch.full_like(x_start, variance + gap)], dim=1)
    got = run(x_start, noised(x_start, table, [row]), out, table, row, backend)
    exact = np.float64(np.float32(variance + gap)) - variance
    # v and the constant are rounded to float32, near 5: that moves g by 2^-22, and g^2 / 2 by g 2^-22.
    want = 0.5 * (exact + np.expm1(-exact)) / math.log(2)
    moved = 2**-22 * abs(np.expm1(-exact)) + 2**-45
    assert close(got, [want], 1e-5 if backend == "triton" else 1e-5 + 4 * UNIT / max(abs(gap), 1e-6), moved)


@pytest.mark.parametrize("mean", [-1.0, -0.4, 0.0, 0.999, 1.3])
@pytest.mark.parametrize("log_variance", [-9.0, -4.0, 0.0])
def test_the_bins_of_a_pixel_share_all_mass(mean: float, log_variance: float) -> None:
    """All 256 values that a pixel may have, a sample each. The floor of 1e-12 adds at most 256 of these."""
    x_start = (torch.arange(256.0) / 127.5 - 1).reshape(256, 1)
    out = torch.tensor([[mean, log_variance]]).expand(256, 2)
    table = example("learned", "x0", None)
    bits = likelihood(x_start, torch.zeros(256, 1), out, table, -1, backend="reference")
    assert abs(float(torch.exp2(-bits.double()).sum()) - 1) <= 1e-5
    # What the kernel makes of all of them as one sample.
    together = [one.reshape(1, 1, -1) for one in (x_start, torch.zeros(256, 1))]
    planes = out.T.reshape(1, 2, -1).contiguous()
    assert close(run(*together, planes, table, -1, "triton"), bits.mean(dim=0, keepdim=True), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_improbable_pixels_keep_their_digits(backend: str) -> None:
    """Masses down to 1e-12, where a difference of two float32 cdfs is 0 on one side; what lies below counts as that."""
    table = example("learned", "x0", None)
    away = torch.tensor([[0.02], [0.05], [0.08], [0.1], [0.5]])
    zeros = torch.zeros(5, 1)
    out = torch.cat([away, torch.full((5, 1), -8.0)], dim=1)
    want = by_formula(zeros, zeros, out, table, -1)  # cdfs near 0
    assert close(want[-1], 12 * math.log2(10), 1e-9)
    for side in (1, -1):
        assert close(run(zeros, zeros, out * torch.tensor([side, 1]), table, -1, backend), want, 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 3, 5), (1, 1023), (1, 1, 1025)], ids=str)
def test_shapes(backend: str, shape: tuple[int, ...]) -> None:
    table = example("fixed_large")
    x_start = pixels(shape, 1)
    for row in (3, 19):
        x = noised(x_start, table, [row] * shape[0])
        out = 0.1 * x
        got = run(x_start, x, out, table, row, backend)
        assert got.shape == shape[:1] and close(got, by_formula(x_start, x, out, table, row), 2e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_of_its_own_for_every_sample(backend: str) -> None:
    """Both kinds of rows in one batch, the same bits as each sample alone."""
    table, rows = example(), [19, 0, 7, -1]
    x_start = pixels((4, 2, 600), 1)
    x = noised(x_start, table, rows)
    out = learned_model(x, torch.full((4,), 4))
    together = run(x_start, x, out, table, torch.tensor(rows), backend)
    for i, row in enumerate(rows):
        own = slice(i, i + 1)
        assert torch.equal(together[own], run(x_start[own], x[own], out[own], table, row, backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_outputs_of_any_dtype(backend: str, dtype: torch.dtype) -> None:
    table = example()
    x_start = pixels((2, 3, 8), 1)
    x = noised(x_start, table, [5, 5])
    out = learned_model(x, torch.full((2,), 4)).to(dtype)
    got, want = (run(x_start, x, given, table, 5, backend) for given in (out, out.float()))
    assert got.dtype == torch.float32 and torch.equal(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strided_operands(backend: str) -> None:
    table = example("fixed_small")
    x_start = pixels((2, 6, 8), 1).transpose(1, 2)
    x = noised(x_start, table, [5, 5])
    out = torch.cat([0.1 * x, x], dim=1).transpose(1, 2).contiguous().transpose(1, 2)
    got = run(x_start, x.transpose(1, 2).contiguous().transpose(1, 2), out, table, 5, backend)
    assert torch.equal(got, run(x_start.contiguous(), x.contiguous(), out.contiguous(), table, 5, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_sample_with_a_nan_is_lost(backend: str) -> None:
    table = example()
    x_start = pixels((4, 2, 5), 1)
    for row in (7, 19):
        x = noised(x_start, table, [row] * 4)
        out = learned_model(x, torch.full((4,), 4))
        want = run(x_start, x, out, table, row, backend)
        broken, data = out.clone(), x_start.clone()
        broken[0, 1, 2] = broken[1, 3, 2] = data[2, 0, 0] = math.nan
        got = run(data, x, broken, table, row, backend)
        assert got[:3].isnan().all() and torch.equal(got[3:], want[3:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_coefficient_is_not_read(backend: str) -> None:
    """The variance half under a fixed variance; x in the last row where the model predicts x0."""
    x_start = pixels((2, 3, 4), 1)
    out = torch.cat([x_start * 0.9, torch.full_like(x_start, math.nan)], dim=1)
    table = example("fixed_small", "x0")
    got = run(x_start, torch.full_like(x_start, math.nan), out, table, -1, backend)
    assert torch.equal(got, run(x_start, torch.zeros_like(x_start), out[:, :3], table, -1, backend))
    assert got.isfinite().all()


def test_rows_that_do_not_exist() -> None:
    """Rows on a GPU are not read before: kernels make NaN of them, and so does the reference."""
    from fastsample.kernels.likelihood import likelihood as kernel
    from fastsample.ops.likelihood.coefficients import coefficients_of
    from fastsample.ops.likelihood.reference import likelihood_reference

    table, rows = example("fixed_small"), torch.tensor([20, 3, -21, -17])
    x_start = pixels((4, 6), 1)
    out = torch.empty(4)
    coefficients = coefficients_of(table, torch.float32, torch.device("cpu"))
    want = likelihood(x_start, x_start, x_start, table, 3)
    got = likelihood_reference(x_start, x_start, x_start, coefficients, rows)
    assert got[::2].isnan().all() and torch.equal(got[1::2], want[1::2])
    if not HAS_GPU:
        kernel(coefficients, rows, 0, x_start, x_start, x_start, out)
        assert out[::2].isnan().all() and close(out[1::2], want[1::2], 1e-6)


def test_the_prior_is_the_divergence_from_standard_normals() -> None:
    x_start = pixels((3, 2, 8), 1).double()
    for table in (example(), DDPM(Schedule.linear(), steps=10).table, example().replace(init_noise_sigma=2.0)):
        assert table.alpha is not None and table.sigma is not None
        q = Normal(table.alpha[0] * x_start, torch.full_like(x_start, table.sigma[0]))
        want = kl_divergence(q, Normal(0.0, table.init_noise_sigma)).reshape(3, -1).mean(dim=1) / math.log(2)
        assert close(prior_bits(x_start, table), want, 1e-9, 1e-15)
        assert close(prior_bits(x_start.float(), table), want, 1e-6, 1e-15)


# Gradients and compiled code


@pytest.mark.parametrize("row", [6, -1, torch.tensor([6, 19])], ids=["kl", "data", "rows"])
def test_gradients(row: int | Tensor) -> None:
    """x_start between the edges, where the mass of its bin is smooth."""
    table = example()
    x_start = (pixels((2, 1, 3), 1) * 0.5).double().requires_grad_()
    x = noised(x_start.detach().float(), table, [6, 6]).double().requires_grad_()
    out = (0.3 * normal((2, 2, 3), 3)).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: likelihood(*given, table, row), (x_start, x, out))
    single = likelihood(x_start.detach().float(), x.detach().float(), out.float(), table, row)
    assert single.requires_grad
    with pytest.raises(ValueError, match="without gradients"):
        likelihood(x_start.float(), x.float(), out.float(), table, row, backend="triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_registered_op(backend: str) -> None:
    from fastsample.ops.likelihood.coefficients import coefficients_of

    table = example()
    x_start = pixels((2, 2, 5), 1)
    out = learned_model(x_start, torch.full((2,), 4))
    device = DEVICE if backend == "triton" else "cpu"
    tensors = [one.to(device) for one in (x_start, x_start, out)]
    coefficients = coefficients_of(table, torch.float32, torch.device(device))
    rows = torch.tensor([3, 19]) if backend == "triton" else None
    arguments = (*tensors, coefficients, rows, 4, backend)
    torch.library.opcheck(torch.ops.fastsample.likelihood, arguments)
    want = run(x_start, x_start, out, table, 4 if rows is None else rows, backend)
    assert torch.equal(torch.ops.fastsample.likelihood(*arguments).cpu(), want)


def test_compiled_whole(compiler: Any) -> None:
    """Rows as ints are a number in the graph from the second one on; rows as tensors are one graph."""
    table = example()
    x_start = pixels((2, 2, 5), 1)
    out = learned_model(x_start, torch.full((2,), 4))
    compiled = torch.compile(likelihood, fullgraph=True, backend=compiler)
    for row in (19, 5, 7, 2, 11):
        assert close(compiled(x_start, x_start, out, table, row), likelihood(x_start, x_start, out, table, row), 1e-6)
    assert compiler.frame_count <= 2
    before = compiler.frame_count
    for rows in (torch.tensor([19, 5]), torch.tensor([0, 1])):
        assert close(compiled(x_start, x_start, out, table, rows), likelihood(x_start, x_start, out, table, rows), 1e-6)
    assert compiler.frame_count == before + 1


def test_gradients_of_compiled_code(compiler: Any) -> None:
    table = example()
    x_start = pixels((2, 2, 5), 1)
    out, other = (learned_model(x_start, torch.full((2,), 4)).requires_grad_() for _ in range(2))
    for given, run_one in ((out, torch.compile(likelihood, fullgraph=True, backend=compiler)), (other, likelihood)):
        run_one(x_start, x_start, given, table, torch.tensor([6, 19])).sum().backward()
    assert out.grad is not None and other.grad is not None and torch.allclose(out.grad, other.grad, rtol=1e-5)


# Refused

FIXED = example("fixed_small")
DYNAMIC = example("fixed_small", clip=DynamicThreshold())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"table": Table([1, 0], a=0.5, s=1.0)}, ValueError, "no noise levels", id="no-levels"),
        pytest.param({"table": DDIM(SCHEDULE, steps=5).table}, ValueError, "row 0 has another mean", id="ddim"),
        pytest.param({"table": DDIM(SCHEDULE, steps=5, eta=1.0).table}, ValueError, "another mean", id="ddim-eta-1"),
        pytest.param({"table": DYNAMIC}, ValueError, "thresholds x0", id="thresholded"),
        pytest.param({"table": FIXED.replace(s=0.0)}, ValueError, "row 0 adds no noise", id="no-noise"),
        pytest.param({"table": FIXED.replace(g0=0.0)}, ValueError, "row 19 has no v", id="no-variance"),
        pytest.param({"table": example()}, ValueError, "the table reads a learned variance", id="no-variance-half"),
        pytest.param({"row": 20}, ValueError, "row 20 is outside a table of 20", id="row"),
        pytest.param({"row": torch.tensor([1, 2, 3])}, ValueError, "one int or 2", id="rows-shape"),
        pytest.param({"row": torch.tensor([1, 20])}, ValueError, "not all inside", id="rows-outside"),
        pytest.param({"row": 1.5}, TypeError, "row must be an int", id="row-type"),
        pytest.param({"x_start": torch.zeros(2, 4)}, ValueError, "x_start must have x's shape", id="data-shape"),
        pytest.param({"x_start": torch.zeros(2, 3).double()}, TypeError, "must be torch.float32", id="data-dtype"),
        pytest.param({"x_start": None}, TypeError, "x_start must be a tensor", id="no-data"),
        pytest.param({"model_output": torch.zeros(2, 4)}, ValueError, "model_output must have x's shape", id="shape"),
        pytest.param({"model_output": None}, TypeError, "model_output must be a tensor", id="no-output"),
        pytest.param({"x": torch.zeros(2, 3).half()}, TypeError, "x must be float32", id="state-dtype"),
        pytest.param({"table": None}, TypeError, "table must be a fastsample.Table", id="no-table"),
        pytest.param({"backend": "cpu"}, ValueError, "no kernel for likelihood", id="cpu"),
        pytest.param({"backend": "cuda"}, ValueError, "no kernel for likelihood", id="cuda"),
    ],
)
def test_refused(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    zeros = torch.zeros(2, 3)
    given: dict[str, Any] = {"x_start": zeros, "x": zeros, "model_output": zeros, "table": FIXED, "row": 1}
    with pytest.raises(error, match=message):
        likelihood(**{**given, **arguments})


def test_a_prior_that_is_refused() -> None:
    with pytest.raises(ValueError, match="no noise levels"):
        prior_bits(torch.zeros(1, 2), Table([0], b=1.0))
    with pytest.raises(TypeError, match="x_start must be a tensor"):
        prior_bits(None, example())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="Table"):
        prior_bits(torch.zeros(1, 2), None)  # type: ignore[arg-type]
