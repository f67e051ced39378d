"""The likelihood of data under a sampler: the terms of its variational bound, in bits per dimension."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from typing_extensions import Never

from fastsample.checks import not_a_tensor
from fastsample.hints import answering, hinting, no_such_argument
from fastsample.ops.address import check_readable
from fastsample.ops.backend import Backend
from fastsample.ops.checks import check_like, check_output, check_state, check_variance, checked_rows
from fastsample.ops.likelihood.coefficients import coefficients_of, levels_of
from fastsample.ops.likelihood.compiled import traced_likelihood
from fastsample.ops.likelihood.launch import likelihood_of_rows
from fastsample.ops.likelihood.reference import likelihood_reference
from fastsample.ops.tracing import differentiable, traced
from fastsample.tables import Table


@answering
def likelihood(
    x_start: Tensor,
    x: Tensor,
    model_output: Tensor,
    table: Table,
    row: int | Tensor,
    *,
    backend: Backend | None = None,
    **unknown: Never,
) -> Tensor:
    """One row's term of the variational bound on -log2 p(x_start), in bits per dimension (Nichol & Dhariwal 2021).

        x0   = limit(p*x + q*m)
        KL(q(x' | x, x_start) || p(x' | x)) = (g + exp(-g) - 1 + w (x_start - x0)^2 exp(-g)) / 2,
        g    = log variance of p - log variance of q,  w = b^2 / variance of q

    averaged over a sample and divided by ln 2. The last row, which leads to the data themselves (sigma = 0), has
    -log p(x_start) instead, p being the mass that the Gaussian puts on the pixel's bin, 2/255 wide, the first and last
    bins open, with cdf(y) = (1 + tanh(sqrt(2/pi) (y + 0.044715 y^3))) / 2 and no mass below 1e-12. The bound is the sum
    over all rows and `prior_bits`. One pass, 16 bytes an element in float32, 12 without a learned variance.

    Args:
        x_start: the data in [-1, 1], shape (B, ...), float32; float64 with the reference backend.
        x: x_start at the level that the row starts from, alpha*x_start + sigma*z; shape, dtype and device of x_start.
        model_output: the model's output for x, of its shape, or (B, 2C, ...) where x is (B, C, ...): the second half is
            v.
        table: DDPM's, such as DDPM(schedule, variance="learned_range", clip=1.0).table.
        row: which row, 0 (the noisiest) to len(table) - 1; negative rows count from the end. An int64 tensor (B,), on
            the CPU or beside x, for one row per sample: len(table) - 1 - t where the table visits all timesteps t. On a
            GPU it is not read by the host, and a row that does not exist makes NaN of its sample.
        backend: see fastsample.backends(): "triton", automatic on a GPU, or "reference", which alone serves gradients
            and float64.

    Returns:
        Shape (B,), in x's dtype.

    Raises:
        ValueError: for a wrong shape, device or row, a model_output without the variance half that the table reads, and
            a table whose rows are not posteriors of a forward process: one without levels, or of another sampler.
        TypeError: for a wrong dtype.

    Example:
        >>> from fastsample import DDPM, Schedule
        >>> table = DDPM(Schedule.linear(), prediction="x0").table
        >>> data = torch.zeros(2, 3, 8, 8)
        >>> likelihood(data, data, data, table, 500)
        tensor([0., 0.])
    """
    if unknown:
        raise no_such_argument(likelihood, unknown)
    for name, tensor in (("x", x), ("model_output", model_output)):
        if not isinstance(tensor, Tensor):
            raise not_a_tensor(name, tensor)
    if not isinstance(table, Table):
        raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}")
    check_state(x)
    check_like("x_start", x_start, x, dtype=x.dtype)
    check_output(model_output, x, guided=False)
    for name, tensor in (("x_start", x_start), ("x", x), ("model_output", model_output)):
        check_readable(name, tensor)
    if any(table.learned):
        check_variance(model_output, x)
    native = x.dtype is torch.float32 and not differentiable(x_start, x, model_output)
    if traced(x_start, x, model_output):
        coefficients = coefficients_of(table, x.dtype, x.device)
        if not native:
            if not (isinstance(row, Tensor) or torch.compiler.is_compiling()):
                row = checked_rows(row, table, x)[1]
            return likelihood_reference(x_start, x, model_output, coefficients, row)
        return traced_likelihood(x_start, x, model_output, coefficients, row, backend)
    rows, shared = checked_rows(row, table, x)
    coefficients = coefficients_of(table, x.dtype, x.device)
    return likelihood_of_rows(x_start, x, model_output, coefficients, rows, shared, backend, native=native)


@hinting()
def prior_bits(x_start: Tensor, table: Table) -> Tensor:
    """KL(q(x_T | x_start) || N(0, init_noise_sigma^2)) in bits per dimension: what the bound pays before the first row.

    Args:
        x_start: the data, shape (B, ...), float32 or float64.
        table: any that has noise levels.

    Returns:
        Shape (B,), in x_start's dtype.

    Raises:
        ValueError: for a table without levels, TypeError: for what is no tensor or table, or a wrong dtype.

    Example:
        >>> from fastsample import DDPM, Schedule
        >>> prior_bits(torch.ones(1, 3, 8, 8), DDPM(Schedule.linear()).table) < 1e-4
        tensor([True])
    """
    if not isinstance(x_start, Tensor):
        raise not_a_tensor("x_start", x_start)
    if not isinstance(table, Table):
        raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}")
    check_state(x_start)
    slope, constant = _prior(table)
    square = x_start.square().reshape(x_start.shape[0], -1).mean(dim=1)
    return slope * square + constant


def _prior(table: Table) -> tuple[float, float]:
    """(slope, constant) of the prior's bits in the mean square of the data."""
    alpha, sigma = levels_of(table)
    variance = table.init_noise_sigma**2
    ratio = float(sigma[0]) ** 2 / variance
    return float(alpha[0]) ** 2 / (2 * math.log(2) * variance), (ratio - 1 - math.log(ratio)) / (2 * math.log(2))
