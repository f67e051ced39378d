"""The forward process: samples with noise added, and the velocity between the two."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.checks import check_floating, check_has_values, check_number, checked_shape, integer, one_of
from fastsample.hints import hinting
from fastsample.ops.noise import randn
from fastsample.ops.noise.keys import Index, Seed, sample_keys
from fastsample.schedule import Float64Array, Schedule, checked_schedule
from fastsample.times.predictions import PREDICTIONS, Prediction

Velocity = Literal["v", "flow"]  # what models predict that learn one


@hinting()
def add_noise(
    x0: Tensor,
    t: int | float | Tensor,
    *,
    schedule: Schedule | None = None,
    prediction: Prediction = "epsilon",
    seed: Seed | None = None,
    index: Index = 0,
    noise: Tensor | None = None,
) -> Tensor:
    """Clean samples as they are at time t: sqrt(abar_t) x0 + sqrt(1 - abar_t) z, as diffusers' add_noise.

    For a flow (prediction "flow") it is (1 - s) x0 + s z with s = t / 1000, as diffusers' scale_noise.

    For training, and to begin sampling from a partly noised image (for which see also `strength` in
    fastsample.Options). The coefficients are taken in float64; half-precision x0 are computed in float32 and rounded
    once. Differentiable.

    Args:
        x0: clean samples, shape (B, ...), floating point. Never modified.
        t: timesteps of the schedule, one int for all samples or an int64 tensor (B,). For a flow the times that the
            model is given, 1000 s in [0, 1000], whole or fractional: a number or a tensor (B,). They are taken as they
            are: where the flow is shifted, shift them first.
        schedule: the forward process; None for a flow.
        prediction: "flow" for flow matching. The other names, as for `ddim`, mean the schedule's process alike.
        seed, index: z = fastsample.ops.randn(x0.shape, seed=seed, index=index), the noise that a sampler's x_T has for
            the same seed and places. In training leave them out: every call then draws fresh noise, which
            torch.manual_seed governs.
        noise: z itself, of x0's shape and on its device, instead of `seed`.

    Returns:
        Of x0's shape and dtype.

    Raises:
        ValueError: for t outside the schedule (or [0, 1000]) and shapes that do not fit, for an unknown prediction, for
            a schedule beside a flow, and where both seed and noise are given.
        TypeError: for what is no floating-point tensor, no timestep, no Schedule.

    Example:
        >>> x0 = torch.ones(2, 3, 8, 8)
        >>> add_noise(x0, torch.tensor([10, 900]), schedule=Schedule.linear(), seed=0).shape
        torch.Size([2, 3, 8, 8])
        >>> add_noise(torch.ones(1, 2), 250.0, prediction="flow", noise=torch.zeros(1, 2))
        tensor([[0.7500, 0.7500]])
    """
    alpha, sigma = _coefficients(x0, t, schedule, prediction)
    if seed is not None and noise is not None:
        raise ValueError("give seed= or noise=, not both")
    if noise is None:
        # The fresh noise is where the result comes to lie.
        scaled = randn(x0.shape, seed=seed, index=index, device=x0.device).to(alpha.dtype).mul_(sigma)
    else:
        _check_noise(noise, x0)
        if type(index) is not int or index != 0:  # which nothing reads
            sample_keys(0, index, len(x0), x0.device)
        scaled = noise.to(alpha.dtype) * sigma
    return scaled.addcmul_(x0.to(alpha.dtype), alpha).to(x0.dtype)


@hinting()
def velocity(
    x0: Tensor,
    noise: Tensor,
    t: int | float | Tensor,
    *,
    schedule: Schedule | None = None,
    prediction: Velocity = "v",
) -> Tensor:
    """sqrt(abar_t) noise - sqrt(1 - abar_t) x0: what a model of prediction "v" learns (Salimans & Ho 2022).

    As diffusers' get_velocity. With prediction="flow" it is noise - x0, what a flow-matching model learns at every t.
    Arguments, dtypes and errors are those of `add_noise`; prediction must be "v" or "flow".

    Example:
        >>> velocity(torch.ones(1, 2), torch.zeros(1, 2), 999, schedule=Schedule.linear())
        tensor([[-1.0000, -1.0000]])
        >>> x0, noise, t = torch.ones(2, 3), torch.zeros(2, 3), torch.tensor([250.0, 900.0])
        >>> x = add_noise(x0, t, prediction="flow", noise=noise)  # a training step's input, and its target
        >>> velocity(x0, noise, t, prediction="flow")[0]
        tensor([-1., -1., -1.])
    """
    one_of("prediction", prediction, get_args(Velocity))
    alpha, sigma = _coefficients(x0, t, schedule, prediction)
    if prediction == "flow":
        alpha, sigma = torch.ones_like(alpha), torch.ones_like(sigma)
    _check_noise(noise, x0)
    scaled = noise.to(alpha.dtype) * alpha
    return scaled.addcmul_(x0.to(alpha.dtype), sigma, value=-1).to(x0.dtype)


def _coefficients(
    x0: Tensor, t: int | float | Tensor, schedule: Schedule | None, prediction: Prediction
) -> tuple[Tensor, Tensor]:
    """alpha and sigma at t per sample, in the dtype that is computed in; they broadcast with x0."""
    one_of("prediction", prediction, PREDICTIONS)
    if prediction != "flow":
        checked_schedule(schedule)
    elif schedule is not None:
        raise ValueError("prediction='flow' takes no schedule: its levels are alpha = 1 - t / 1000, sigma = t / 1000")
    check_floating("x0", x0)
    checked_shape("x0", x0.shape)
    if schedule is None:
        times = _flow_times(t, len(x0))
        levels = (1 - times / 1000, times / 1000)
    else:
        visited = _timesteps(t, len(x0))
        if (outside := (visited < 0) | (visited >= schedule.T)).any():
            raise ValueError(f"t must lie in [0, {schedule.T}), got {visited[outside.argmax()]}")
        abar = schedule.alphas_cumprod[visited]
        levels = (np.sqrt(abar), np.sqrt(1 - abar))
    dtype = torch.float64 if x0.dtype == torch.float64 else torch.float32
    alpha, sigma = (per_sample(torch.from_numpy(level).to(x0.device, dtype), x0) for level in levels)
    return alpha, sigma


def _timesteps(t: int | float | Tensor, batch: int) -> np.ndarray:
    if not isinstance(t, Tensor):
        return np.array([integer("t", t)])
    if t.dtype != torch.int64:
        raise TypeError(f"t must be an int or an int64 tensor, got {t.dtype}")
    return _one_or_each(t, batch).numpy()


def _flow_times(t: int | float | Tensor, batch: int) -> Float64Array:
    if isinstance(t, Tensor):
        if t.dtype == torch.bool or t.is_complex():
            raise TypeError(f"t must be a number or a tensor of real numbers, got {t.dtype}")
        times = _one_or_each(t, batch).double().numpy()
    else:
        check_number("t", t)
        times = np.array([float(t)])
    if (outside := ~((times >= 0) & (times <= 1000))).any():
        raise ValueError(f"t of a flow is 1000 sigma and must lie in [0, 1000], got {times[outside.argmax()]}")
    return times


def _one_or_each(t: Tensor, batch: int) -> Tensor:
    """t on the CPU, of one axis."""
    if t.shape not in ((), (batch,)):
        raise ValueError(f"t must be one timestep or {batch}, one per sample; got shape {tuple(t.shape)}")
    check_has_values("t", t)
    return t.detach().cpu().reshape(-1)


def _check_noise(noise: Tensor, x0: Tensor) -> None:
    check_floating("noise", noise)
    if noise.shape != x0.shape or noise.device != x0.device:
        raise ValueError(
            f"noise must have x0's shape {tuple(x0.shape)} on {x0.device}, got {tuple(noise.shape)} on {noise.device}"
        )
