"""What a sampler says about given data: the terms of its variational bound, in bits per dimension."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.address import check_readable
from fastsample.ops.backend import choose
from fastsample.ops.checks import check_like, check_output, check_state, check_variance, checked_rows
from fastsample.ops.tracing import constant_when_traced, differentiable, outside, traced
from fastsample.schedule import Float64Array
from fastsample.tables import Table

_COLUMNS = ("p", "q", "limit", "a", "b", "weight", "constant", "slope", "data")
_ROW = 16  # floats of a row of coefficients as kernels read it, 64 bytes like a table's
_FLOOR = 1e-12  # the smallest probability of a pixel, improved-diffusion's
_EDGE = 0.999  # pixels beyond it are in the first or last bin
_HALF_BIN = 1 / 255


def likelihood(
    x_start: Tensor, x: Tensor, model_out: Tensor, table: Table, row: int | Tensor, *, backend: str | None = None
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
        model_out: the model's output for x, of its shape, or (B, 2C, ...) where x is (B, C, ...): the second half is v.
        table: DDPM's, such as DDPM(schedule, variance="learned_range", clip=1.0).table.
        row: which row, 0 (the noisiest) to len(table) - 1; negative rows count from the end. An int64 tensor (B,), on
            the CPU or beside x, for one row per sample: len(table) - 1 - t where the table visits all timesteps t. On a
            GPU it is not read by the host, and a row that does not exist makes NaN of its sample.
        backend: see fastsample.backends(): "triton", automatic on a GPU, or "reference", which alone serves gradients
            and float64.

    Returns:
        Shape (B,), in x's dtype.

    Raises:
        ValueError: for a wrong shape, device or row, a model_out without the variance half that the table reads, and a
            table whose rows are not posteriors of a forward process: one without levels, or of another sampler.
        TypeError: for a wrong dtype.

    Example:
        >>> from fastsample import DDPM, Schedule
        >>> table = DDPM(Schedule.linear(), prediction="x0").table
        >>> data = torch.zeros(2, 3, 8, 8)
        >>> likelihood(data, data, data, table, 500)
        tensor([0., 0.])
    """
    for name, tensor in (("x", x), ("model_out", model_out)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not isinstance(table, Table):
        raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}")
    check_state(x)
    check_like("x_start", x_start, x, dtype=x.dtype)
    check_output(model_out, x, guided=False, name="model_out")
    for name, tensor in (("x_start", x_start), ("x", x), ("model_out", model_out)):
        check_readable(name, tensor)
    if any(table.learned):
        check_variance(model_out, x, name="model_out")
    native = x.dtype is torch.float32 and not differentiable(x_start, x, model_out)
    if traced(x_start, x, model_out):
        coefficients = _coefficients(table, x.dtype, x.device)
        if not native:
            return likelihood_reference(x_start, x, model_out, coefficients, row)
        given = (row, 0) if isinstance(row, Tensor) else (None, row)
        return torch.ops.fastsample.likelihood(x_start, x, model_out, coefficients, *given, backend)
    rows, shared = checked_rows(row, table, x)
    coefficients = _coefficients(table, x.dtype, x.device)
    chosen = choose(backend, x.device, native=native, offers=("triton",), op="likelihood")
    if chosen == "triton":
        return _likelihood_triton(x_start, x, model_out, coefficients, rows, shared)
    return likelihood_reference(x_start, x, model_out, coefficients, shared if rows is None else rows)


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
        raise TypeError(f"x_start must be a tensor, got {type(x_start).__name__}")
    if not isinstance(table, Table):
        raise TypeError(f"table must be a fastsample.Table, got {type(table).__name__}")
    check_state(x_start)
    slope, constant = _prior(table)
    square = x_start.square().reshape(x_start.shape[0], -1).mean(dim=1)
    return slope * square + constant


def likelihood_reference(
    x_start: Tensor, x: Tensor, model_out: Tensor, coefficients: Tensor, row: int | Tensor
) -> Tensor:
    """`likelihood` in plain torch: the specification, differentiable, in x's dtype; `coefficients` are `_coefficients`.

    Written so that neither small divergences nor improbable pixels lose their digits in float32.
    """
    if isinstance(row, Tensor):
        count = coefficients.shape[0]
        exists = (row >= -count) & (row < count)
        own = coefficients[torch.where(exists, row, 0)]
        own = torch.where(exists.reshape(-1, 1), own, math.nan)
    else:
        own = coefficients[row]
    p, q, limit, a, b, weight, constant, slope, data = (
        own[..., i].reshape(-1, *(1,) * (x.ndim - 1)) for i in range(len(_COLUMNS))
    )
    channels = x.shape[1] if x.ndim > 1 else 1
    m = (model_out[:, :channels] if x.ndim > 1 else model_out).to(x.dtype)
    v = model_out[:, channels:].to(x.dtype) if model_out.shape != x.shape else torch.zeros_like(x)

    def times(coefficient: Tensor, operand: Tensor) -> Tensor:
        return torch.where(coefficient == 0, 0.0, coefficient * operand)  # what has none is not read

    x0 = times(p, x) + times(q, m)
    x0 = torch.minimum(torch.maximum(x0, -limit), limit)
    gap = constant + times(slope, v)
    divergence = 0.5 * (gap + torch.expm1(-gap) + weight * (x_start - x0).square() * torch.exp(-gap))
    # A row that leads to data has no q: there `constant` makes `gap` the log variance of p itself.
    terms = torch.where(data == 1, _surprise(x_start, times(a, x) + b * x0, gap), divergence)
    return terms.reshape(x.shape[0], -1).mean(dim=1) / math.log(2)


def _surprise(x_start: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the mass that a Gaussian has in each pixel's bin, in terms of its bounds on the logistic scale."""
    inverse = torch.exp(-0.5 * log_variance)
    low, high = inverse * (x_start - mean - _HALF_BIN), inverse * (x_start - mean + _HALF_BIN)
    scale, cubic = 2 * math.sqrt(2 / math.pi), 0.044715
    # sigmoid(A) - sigmoid(B) = sigmoid(A) sigmoid(-B) (1 - e^(B - A)).
    lower, upper = (scale * (end + cubic * end**3) for end in (low, high))
    width = scale * 2 * _HALF_BIN * inverse * (1 + cubic * (high * high + high * low + low * low))
    below_upper, above_lower = torch.nn.functional.logsigmoid(upper), torch.nn.functional.logsigmoid(-lower)
    inside = below_upper + above_lower + torch.log(-torch.expm1(-width))
    mass = torch.where(x_start < -_EDGE, below_upper, torch.where(x_start > _EDGE, above_lower, inside))
    return -mass.clamp(min=math.log(_FLOOR))


def _likelihood_triton(
    x_start: Tensor, x: Tensor, model_out: Tensor, coefficients: Tensor, rows: Tensor | None, row: int
) -> Tensor:
    from fastsample.kernels import likelihood as kernel

    if model_out.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        model_out = model_out.float()
    x_start, x, model_out = (one.resolve_neg().contiguous() for one in (x_start, x, model_out))
    rows = None if rows is None else rows.to(x.device)
    out = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    kernel.likelihood(coefficients, rows, row, x_start, x, model_out, out)
    return out


@torch.library.custom_op("fastsample::likelihood", mutates_args=())
def _registered(
    x_start: Tensor,
    x: Tensor,
    model_out: Tensor,
    coefficients: Tensor,
    rows: Tensor | None,
    row: int,
    backend: str | None,
) -> Tensor:
    if rows is not None:
        rows = rows.to(x.device).expand(x.shape[0]).contiguous()
    if choose(backend, x.device, native=True, offers=("triton",), op="likelihood") == "triton":
        return _likelihood_triton(x_start, x, model_out, coefficients, rows, row)
    return likelihood_reference(x_start, x, model_out, coefficients, row if rows is None else rows)


@_registered.register_fake
def _one_per_sample(x_start: Tensor, x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape[0])


@constant_when_traced
def _coefficients(table: Table, dtype: torch.dtype, device: torch.device) -> Tensor:
    """What the terms of each row are made from, shape (rows, 16), made once per dtype and device."""

    def make(table: Table) -> Tensor:
        with outside():
            return torch.from_numpy(_columns(table)).to(device, dtype)

    return table.derived(("likelihood", dtype, device), make)


def _columns(table: Table) -> Float64Array:
    alpha, sigma = _levels(table)
    if table.thresholded:
        raise ValueError("table thresholds x0 dynamically: a likelihood needs clip=None or a number")
    with np.errstate(divide="ignore", invalid="ignore"):
        shrink = alpha[:-1] / alpha[1:]
        added = sigma[:-1] ** 2 - (shrink * sigma[1:]) ** 2  # the variance of x given x'
        share = added / sigma[:-1] ** 2
        a, b, variance = shrink * (sigma[1:] / sigma[:-1]) ** 2, alpha[1:] * share, share * sigma[1:] ** 2
        to_data = sigma[1:] == 0
        log_variance = 2 * (table.g0 + np.log(np.abs(table.s), out=np.zeros(len(table)), where=table.s != 0))
        weight = np.where(to_data, 0.0, b**2 / variance)
        constant = np.where(to_data, log_variance, log_variance - np.log(variance))
    for bad, why in (
        (~np.isclose(table.a, a, rtol=1e-6, atol=1e-9), "has another mean"),
        (~np.isclose(table.b, b, rtol=1e-6, atol=1e-9), "has another mean"),
        ((table.d != 0) | (table.c1 != 0) | (table.c2 != 0), "has another mean"),
        (~to_data & (table.s == 0), "adds no noise"),
        ((table.s == 0) & (table.g0 == 0) & (table.g1 == 0), "has no variance"),
    ):
        if bad.any():
            raise ValueError(f"row {bad.argmax()} {why}: a likelihood needs rows of DDPM, posteriors q(x' | x, x0)")
    columns = dict(a=a, b=b, weight=weight, constant=constant, slope=2 * table.g1, data=to_data)
    found = [columns[name] if name in columns else getattr(table, name) for name in _COLUMNS]
    return np.pad(np.stack(found, axis=1).astype(np.float64), ((0, 0), (0, _ROW - len(found))))


def _levels(table: Table) -> tuple[Float64Array, Float64Array]:
    if table.alpha is None or table.sigma is None:
        raise ValueError("table has no noise levels (alpha, sigma): a likelihood needs those of its forward process")
    return table.alpha, table.sigma


def _prior(table: Table) -> tuple[float, float]:
    """(slope, constant) of the prior's bits in the mean square of the data."""
    alpha, sigma = _levels(table)
    variance = table.init_noise_sigma**2
    ratio = float(sigma[0]) ** 2 / variance
    return float(alpha[0]) ** 2 / (2 * math.log(2) * variance), (ratio - 1 - math.log(ratio)) / (2 * math.log(2))
