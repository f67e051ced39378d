"""The forward process: samples with noise added, and the velocity between the two."""

from __future__ import annotations

import operator

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.keys import Index, Seed
from fastsample.ops.noise import checked_shape, randn
from fastsample.schedule import Schedule, checked_schedule


def add_noise(
    x0: Tensor,
    t: int | Tensor,
    *,
    schedule: Schedule,
    seed: Seed | None = None,
    index: Index = 0,
    noise: Tensor | None = None,
) -> Tensor:
    """sqrt(abar_t) x0 + sqrt(1 - abar_t) z: clean samples as they are at timestep t, as diffusers' add_noise.

    For training, and to begin sampling from a partly noised image (for which see also `strength` in
    fastsample.Options). The coefficients are taken in float64; half-precision x0 are computed in float32 and rounded
    once. Differentiable.

    Args:
        x0: clean samples, shape (B, ...), floating point. Never modified.
        t: timesteps of the schedule, one int for all samples or an int64 tensor (B,).
        schedule: the forward process.
        seed, index: z = fastsample.ops.randn(x0.shape, seed=seed, index=index), the noise that a sampler's x_T has for
            the same seed and places. In training leave them out: every call then draws fresh noise, which
            torch.manual_seed governs.
        noise: z itself, of x0's shape and on its device, instead of `seed`.

    Returns:
        Of x0's shape and dtype.

    Raises:
        ValueError: for t outside the schedule and shapes that do not fit, and where both seed and noise are given.
        TypeError: for what is no floating-point tensor, no integer timestep, no Schedule.

    Example:
        >>> x0 = torch.ones(2, 3, 8, 8)
        >>> add_noise(x0, torch.tensor([10, 900]), schedule=Schedule.linear(), seed=0).shape
        torch.Size([2, 3, 8, 8])
    """
    alpha, sigma = _coefficients(x0, t, schedule)
    if seed is not None and noise is not None:
        raise ValueError("give seed= or noise=, not both")
    if noise is None:
        # The fresh noise is where the result comes to lie.
        scaled = randn(x0.shape, seed=seed, index=index, device=x0.device).to(alpha.dtype).mul_(sigma)
    else:
        scaled = _checked("noise", noise, x0).to(alpha.dtype) * sigma
    return scaled.addcmul_(x0.to(alpha.dtype), alpha).to(x0.dtype)


def velocity(x0: Tensor, noise: Tensor, t: int | Tensor, *, schedule: Schedule) -> Tensor:
    """sqrt(abar_t) noise - sqrt(1 - abar_t) x0: what a model of prediction "v" learns (Salimans & Ho 2022).

    As diffusers' get_velocity. Arguments, dtypes and errors are those of `add_noise`.

    Example:
        >>> velocity(torch.ones(1, 2), torch.zeros(1, 2), 999, schedule=Schedule.linear())
        tensor([[-1.0000, -1.0000]])
    """
    alpha, sigma = _coefficients(x0, t, schedule)
    scaled = _checked("noise", noise, x0).to(alpha.dtype) * alpha
    return scaled.addcmul_(x0.to(alpha.dtype), sigma, value=-1).to(x0.dtype)


def _coefficients(x0: Tensor, t: int | Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
    """sqrt(abar_t) and sqrt(1 - abar_t) per sample, in the dtype that is computed in; they broadcast with x0."""
    checked_schedule(schedule)
    if not isinstance(x0, Tensor) or not x0.is_floating_point():
        raise TypeError(f"x0 must be a floating-point tensor, got {getattr(x0, 'dtype', type(x0).__name__)}")
    checked_shape("x0", x0.shape)
    visited = _timesteps(t, len(x0))
    if (outside := (visited < 0) | (visited >= schedule.T)).any():
        raise ValueError(f"t must lie in [0, {schedule.T}), got {visited[outside.argmax()]}")
    abar = schedule.alphas_cumprod[visited].reshape(-1, *(1,) * (x0.ndim - 1))
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    alpha, sigma = (torch.from_numpy(np.sqrt(one)).to(x0.device, dtype) for one in (abar, 1 - abar))
    return alpha, sigma


def _timesteps(t: int | Tensor, batch: int) -> np.ndarray:
    if not isinstance(t, Tensor):
        try:
            return np.array([operator.index(t)])
        except TypeError:
            raise TypeError(f"t must be an int or an int64 tensor, got {type(t).__name__}") from None
    if t.dtype != torch.int64:
        raise TypeError(f"t must be an int or an int64 tensor, got {t.dtype}")
    if t.shape not in ((), (batch,)):
        raise ValueError(f"t must be one timestep or {batch}, one per sample; got shape {tuple(t.shape)}")
    return t.cpu().numpy().reshape(-1)


def _checked(name: str, tensor: Tensor, x0: Tensor) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise TypeError(
            f"{name} must be a floating-point tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}"
        )
    if tensor.shape != x0.shape or tensor.device != x0.device:
        raise ValueError(
            f"{name} must have x0's shape {tuple(x0.shape)} on {x0.device}, got {tuple(tensor.shape)} on "
            f"{tensor.device}"
        )
    return tensor
