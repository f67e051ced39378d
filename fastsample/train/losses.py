"""The hybrid loss of Improved DDPM (Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastsample.broadcast import per_sample
from fastsample.checks import not_a_tensor
from fastsample.ops.checks import check_variance
from fastsample.ops.likelihood.coefficients import coefficients_of
from fastsample.ops.likelihood.reference import bits
from fastsample.ops.tracing import constant_when_traced, outside, traced
from fastsample.samplers import DDPM
from fastsample.schedule import Schedule
from fastsample.tables import Table


class HybridLoss:
    """mse(epsilon) + lambda L_vlb per image, for models that predict [epsilon, v].

    q(x_{t-1} | x_t, x_0) has mean (sqrt(abar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - abar_{t-1}) x_t) / (1 - abar_t)
    and variance beta_t (1 - abar_{t-1}) / (1 - abar_t). The model's log variance lies between log of that and
    log(beta_t). The variational term leaves epsilon alone (stop-gradient), so that it trains v only.

    Everything is computed in float32, or in float64 where any of the tensors is. See fastsample.ops.likelihood for the
    bound. A t on the CPU is checked; one on a GPU is not read by the host.

    Args:
        schedule: the forward process, at least two timesteps.
        device: taken for compatibility and not needed, since coefficients go where the images lie.

    Raises:
        ValueError: the schedule has a single timestep, or later a t does not lie in [0, T).
    """

    def __init__(self, schedule: Schedule, device: str | torch.device = "cpu") -> None:
        if schedule.T < 2:
            raise ValueError(f"the schedule needs at least 2 timesteps, got {schedule.T}")
        torch.empty(0, device=device)  # raises where there is no such device
        self.T = schedule.T
        self._clipped_table = DDPM(schedule, variance="learned_range", clip=1.0).table
        self._table = self._clipped_table.replace(limit=math.inf)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; x0 and noise (B, C, H, W), t int64 (B,)."""
        t = self._checked(t).to(x0.device, torch.int64)
        alpha, sigma = (per_sample(one, x0) for one in _levels(self._table, _common(x0, noise), x0.device)[:, t])
        return alpha * x0 + sigma * noise

    def vlb_term(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, *, clip: bool = False) -> Tensor:
        """The term of the variational bound at t in bits per dimension, (B,).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and -log p(x_0 | x_1) over 8-bit bins for t = 0.

        Args:
            output: [epsilon, v], (B, 2C, H, W).
            x0, xt: the image in [-1, 1] and the noisy one, (B, C, H, W).
            t: int64 (B,).
            clip: clamp the predicted x0 to [-1, 1], as is usual for evaluating a model but not for training it.
        """
        epsilon, v = _halves(output, xt)
        return self._bits(epsilon, v, x0, xt, t, clip=clip)

    def __call__(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(mse, vb), each (B,); their sum is the loss to minimise.

        vb is vlb_term times T / 1000, that is lambda = 0.001 on the sum over all timesteps.
        Shapes as in vlb_term; xt = q_sample(x0, t, noise).
        """
        epsilon, v = _halves(output, xt)
        mse = (noise - epsilon).square().flatten(1).mean(1)
        vb = self._bits(epsilon.detach(), v, x0, xt, t, clip=False) * (self.T / 1000)
        return mse, vb

    def _bits(self, epsilon: Tensor, v: Tensor, x0: Tensor, xt: Tensor, t: Tensor, *, clip: bool) -> Tensor:
        dtype = _common(x0, xt, epsilon)
        coefficients = coefficients_of(self._clipped_table if clip else self._table, dtype, xt.device)
        t = self._checked(t).to(xt.device, torch.int64)
        # The table begins at the noisiest timestep, and a row that does not exist makes NaN of its sample.
        row = torch.where((t >= 0) & (t < self.T), self.T - 1 - t, self.T)
        # Without the choice of a backend: whichever is asked for elsewhere, only plain torch has gradients.
        return bits(x0.to(dtype), xt.to(dtype), epsilon, v, coefficients, row)

    def _checked(self, t: Tensor) -> Tensor:
        """The same t. Raises ValueError where it is on the CPU and outside the schedule."""
        if not isinstance(t, Tensor):
            raise not_a_tensor("t", t)
        if t.is_floating_point() or t.is_complex() or t.dtype == torch.bool:
            raise TypeError(f"t must be a tensor of integers, got {t.dtype}")
        if t.ndim > 1:
            raise ValueError(f"t must have shape (B,), got {tuple(t.shape)}")
        if t.is_cpu and not traced(t):
            outside_schedule = (t < 0) | (t >= self.T)
            if outside_schedule.any():
                raise ValueError(f"t must lie in [0, {self.T}), got {t[outside_schedule][0]}")
        return t


def _halves(output: Tensor, xt: Tensor) -> tuple[Tensor, Tensor]:
    check_variance(output, xt, name="output")
    epsilon, v = output.chunk(2, dim=1)
    return epsilon, v


@constant_when_traced
def _levels(table: Table, dtype: torch.dtype, device: torch.device) -> Tensor:
    """alpha and sigma at every timestep, shape (2, T), made once per dtype and device."""

    def make(table: Table) -> Tensor:
        assert table.alpha is not None and table.sigma is not None
        with outside():
            return torch.from_numpy(np.stack((table.alpha[-2::-1], table.sigma[-2::-1]))).to(device, dtype)

    return table.derived(("levels", dtype, device), make)


def _common(*tensors: Tensor) -> torch.dtype:
    """What all of them are computed in."""
    dtype = torch.float32
    for one in tensors:
        dtype = torch.promote_types(dtype, one.dtype)
    return dtype
