"""The hybrid loss of Improved DDPM (Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsample.forward import add_noise
from fastsample.ops.likelihood import likelihood
from fastsample.samplers import DDPM
from fastsample.schedule import Schedule


class HybridLoss:
    """mse(epsilon) + lambda L_vlb per image, for models that predict [epsilon, v].

    q(x_{t-1} | x_t, x_0) has mean (sqrt(abar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - abar_{t-1}) x_t) / (1 - abar_t)
    and variance beta_t (1 - abar_{t-1}) / (1 - abar_t). The model's log variance lies between log of that and
    log(beta_t). The variational term leaves epsilon alone (stop-gradient), so that it trains v only.

    Everything is computed in float32, or in float64 where the images are. See fastsample.ops.likelihood for the bound.

    Args:
        schedule: the forward process, at least two timesteps.
        device: taken for compatibility and not needed, since coefficients go where the images lie.

    Raises:
        ValueError: the schedule has a single timestep.
    """

    def __init__(self, schedule: Schedule, device: str | torch.device = "cpu") -> None:
        if schedule.T < 2:
            raise ValueError(f"the schedule needs at least 2 timesteps, got {schedule.T}")
        self.T = schedule.T
        self._schedule = schedule
        self._clipped_table = DDPM(schedule, variance="learned_range", clip=1.0).table
        self._table = self._clipped_table.replace(limit=math.inf)

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; x0 and noise (B, C, H, W), t int64 (B,)."""
        return add_noise(_at_least_float32(x0), t, schedule=self._schedule, noise=noise)

    def vlb_term(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, *, clip: bool = False) -> Tensor:
        """The term of the variational bound at t in bits per dimension, (B,).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and -log p(x_0 | x_1) over 8-bit bins for t = 0.

        Args:
            output: [epsilon, v], (B, 2C, H, W).
            x0, xt: the image in [-1, 1] and the noisy one, (B, C, H, W).
            t: int64 (B,).
            clip: clamp the predicted x0 to [-1, 1], as is usual for evaluating a model but not for training it.
        """
        table = self._clipped_table if clip else self._table
        # The table begins at the noisiest timestep.
        return likelihood(_at_least_float32(x0), _at_least_float32(xt), output, table, self.T - 1 - t)

    def __call__(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(mse, vb), each (B,); their sum is the loss to minimise.

        vb is vlb_term times T / 1000, that is lambda = 0.001 on the sum over all timesteps.
        Shapes as in vlb_term; xt = q_sample(x0, t, noise).
        """
        epsilon, v = output.chunk(2, dim=1)
        mse = (noise - epsilon).square().flatten(1).mean(1)
        vb = self.vlb_term(torch.cat((epsilon.detach(), v), dim=1), x0, xt, t) * (self.T / 1000)
        return mse, vb


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
