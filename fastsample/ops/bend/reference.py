"""Guidance by CFG-Zero* and adaptive projected guidance in plain torch: the specification of every kernel."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.ops.step.reductions import rescale_factor

Method = Literal["plain", "cfg_zero_star", "apg"]
METHODS: tuple[Method, ...] = get_args(Method)
TINY = 1e-8  # beside a squared norm, as the methods' authors have it


class Settings(NamedTuple):
    """A method of guidance and what it takes, see fastsample.Guidance.

    Attributes:
        method: one of METHODS.
        rescale: phi.
        eta, norm_threshold, momentum: of "apg".
    """

    method: Method
    rescale: float = 0.0
    eta: float = 0.0
    norm_threshold: float = 0.0
    momentum: float = 0.0


def bend_reference(
    output: Tensor, channels: int, weights: Tensor, settings: Settings, moved: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """(m, what moves after it) of `output` with both halves. Differentiable; computes at least in float32.

    Args:
        output, channels: as Bend is called with.
        weights: w, one per sample.
        moved: what moved before, like m without its variance half; None for nothing yet.
    """
    batch = len(output) // 2
    variance = None
    if output.ndim > 1 and output.shape[1] > channels:
        output, variance = output[:, :channels], output[batch:, channels:]
    dtype = torch.promote_types(output.dtype, torch.float32)
    unconditional, conditional = (half.to(dtype) for half in output.split(batch))
    weight = per_sample(weights, conditional)
    if settings.method == "cfg_zero_star":
        size = _dot(unconditional, unconditional) + TINY
        unconditional = unconditional * per_sample(_dot(conditional, unconditional) / size, unconditional)
    difference = conditional - unconditional
    if settings.method == "apg":
        if settings.momentum != 0:
            difference = moved = difference if moved is None else difference + settings.momentum * moved.to(difference)
        difference = _projected(difference, conditional, settings)
    m = unconditional + weight * difference
    if settings.rescale != 0:
        m = m * rescale_factor(m, conditional, settings.rescale)
    m = torch.where(weight == 1, conditional, m)
    return (m if variance is None else torch.cat([m, variance.to(m.dtype)], dim=1)), moved


def _projected(difference: Tensor, conditional: Tensor, settings: Settings) -> Tensor:
    if settings.norm_threshold > 0:
        size = _dot(difference, difference).clamp(min=TINY**2).sqrt()  # of which 0 has no derivative
        difference = difference * per_sample((settings.norm_threshold / size).clamp(max=1), difference)
    along = _dot(difference, conditional) / _dot(conditional, conditional).clamp(min=TINY**2)
    return difference - (1 - settings.eta) * per_sample(along, conditional) * conditional


def _dot(one: Tensor, other: Tensor) -> Tensor:
    """Of each sample, added up in float64."""
    return (one * other).reshape(len(one), -1).sum(1, dtype=torch.float64).to(one.dtype)
