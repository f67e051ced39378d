"""The likelihood in plain torch: the specification, and what gradients go through."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.ops.likelihood.coefficients import COLUMNS
from fastsample.ops.tracing import traced

_FLOOR = 1e-12  # the smallest probability of a pixel, improved-diffusion's
_EDGE = 0.999  # pixels beyond it are in the first or last bin
_HALF_BIN = 1 / 255


def likelihood_reference(
    x_start: Tensor, x: Tensor, model_output: Tensor, coefficients: Tensor, row: int | Tensor
) -> Tensor:
    """`likelihood` in plain torch: the specification, differentiable, in x's dtype; coefficients as coefficients_of."""
    if model_output.shape == x.shape:
        return bits(x_start, x, model_output, torch.zeros_like(x), coefficients, row)
    channels = x.shape[1]
    return bits(x_start, x, model_output[:, :channels], model_output[:, channels:], coefficients, row)


def bits(x_start: Tensor, x: Tensor, m: Tensor, v: Tensor, coefficients: Tensor, row: int | Tensor) -> Tensor:
    """`likelihood_reference` where the model's output has been taken apart: gradients may go through v alone.

    Written so that neither small divergences nor improbable pixels lose their digits in float32.
    """
    if isinstance(row, Tensor):
        count = coefficients.shape[0]
        exists = (row >= -count) & (row < count)
        columns = coefficients[torch.where(exists, row, 0)]
        columns = torch.where(exists.reshape(-1, 1), columns, math.nan)
    else:
        columns = coefficients[row]
    # One row of all samples, on a CPU: the host knows its numbers, and what it does not have need not be computed.
    known = not isinstance(row, Tensor) and columns.is_cpu and not traced(columns)
    values: list[Any] = columns.tolist() if known else [per_sample(column, x) for column in columns.unbind(-1)]
    p, q, limit, a, b, weight, constant, slope, data = values[: len(COLUMNS)]
    m, v = m.to(x.dtype), v.to(x.dtype)

    def times(coefficient: Any, operand: Tensor) -> Tensor:
        """The product; without a coefficient the operand is not read."""
        if known:
            return coefficient * operand if coefficient else operand.new_zeros(())
        return torch.where(coefficient == 0, 0.0, coefficient * operand)

    x0 = times(p, x) + times(q, m)
    if not (known and limit == math.inf):
        x0 = torch.clamp(x0, -limit, limit)
    gap = constant + times(slope, v)

    def divergence() -> Tensor:
        return 0.5 * (gap + torch.expm1(-gap) + weight * (x_start - x0).square() * torch.exp(-gap))

    def surprise() -> Tensor:
        # A row that leads to data has no q: there `constant` makes `gap` the log variance of p itself.
        return _surprise(x_start, times(a, x) + b * x0, gap)

    def either() -> Tensor:
        return torch.where(data == 1, surprise(), divergence())

    terms = either() if not known else surprise() if data else divergence()
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
