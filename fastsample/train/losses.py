"""The hybrid loss of Improved DDPM (Nichol & Dhariwal 2021)."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from fastsample.samplers.ddpm import ddpm_table
from fastsample.schedule import Schedule


class HybridLoss:
    """mse(epsilon) + lambda L_vlb per image, for models that predict [epsilon, v].

    q(x_{t-1} | x_t, x_0) has mean (sqrt(abar_{t-1}) beta_t x_0 + sqrt(alpha_t) (1 - abar_{t-1}) x_t) / (1 - abar_t)
    and variance beta_t (1 - abar_{t-1}) / (1 - abar_t). The model's log variance lies between log of that and
    log(beta_t). The variational term leaves epsilon alone (stop-gradient), so that it trains v only.

    Args:
        schedule: the forward process, at least two timesteps.

    Raises:
        ValueError: the schedule has a single timestep.
    """

    def __init__(self, schedule: Schedule, device: str | torch.device = "cpu") -> None:
        if schedule.T < 2:
            raise ValueError(f"the schedule needs at least 2 timesteps, got {schedule.T}")
        self.T = schedule.T
        alpha_bar = np.append(schedule.alphas_cumprod[::-1], 1.0)
        table = ddpm_table(np.arange(self.T)[::-1], alpha_bar, variance="learned_range")
        columns = {name: getattr(table, name)[: self.T] for name in ("alpha", "sigma", "p", "q", "a", "b")}
        columns |= {"smallest": 2 * (table.g0 - table.g1), "largest": 2 * (table.g0 + table.g1)}
        self._at_timestep = {
            name: torch.from_numpy(column[::-1].astype(np.float32)).to(device) for name, column in columns.items()
        }

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise; x0 and noise (B, C, H, W), t int64 (B,)."""
        return self._at("alpha", t) * x0 + self._at("sigma", t) * noise

    def vlb_term(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, *, clip: bool = False) -> Tensor:
        """The term of the variational bound at t in bits per dimension, (B,).

        KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) for t > 0 and -log p(x_0 | x_1) over 8-bit bins for t = 0.

        Args:
            output: [epsilon, v], (B, 2C, H, W).
            x0, xt: the image in [-1, 1] and the noisy one, (B, C, H, W).
            t: int64 (B,).
            clip: clamp the predicted x0 to [-1, 1], as is usual for evaluating a model but not for training it.
        """
        epsilon, v = output.chunk(2, dim=1)
        fraction = (v + 1) / 2
        floor = self._at("smallest", t)
        log_variance = fraction * self._at("largest", t) + (1 - fraction) * floor
        predicted_x0 = self._at("p", t) * xt + self._at("q", t) * epsilon
        if clip:
            predicted_x0 = predicted_x0.clamp(-1, 1)
        mean = self._posterior_mean(predicted_x0, xt, t)
        kl = _gaussian_kl(self._posterior_mean(x0, xt, t), floor, mean, log_variance)
        nll = -_log_likelihood_8bit(x0, mean, 0.5 * log_variance)
        return torch.where(t == 0, nll.flatten(1).mean(1), kl.flatten(1).mean(1)) / math.log(2)

    def __call__(self, output: Tensor, x0: Tensor, xt: Tensor, t: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        """(mse, vb), each (B,); their sum is the loss to minimise.

        vb is vlb_term times T / 1000, that is lambda = 0.001 on the sum over all timesteps.
        Shapes as in vlb_term; xt = q_sample(x0, t, noise).
        """
        epsilon, v = output.chunk(2, dim=1)
        mse = (noise - epsilon).square().flatten(1).mean(1)
        vb = self.vlb_term(torch.cat((epsilon.detach(), v), dim=1), x0, xt, t) * (self.T / 1000)
        return mse, vb

    def _posterior_mean(self, x0: Tensor, xt: Tensor, t: Tensor) -> Tensor:
        return self._at("b", t) * x0 + self._at("a", t) * xt

    def _at(self, name: str, t: Tensor) -> Tensor:
        return self._at_timestep[name][t][:, None, None, None]


def _gaussian_kl(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, e^log_variance) || N(other_mean, e^other_log_variance)) per element, in nats."""
    distance = (mean - other_mean).square() * torch.exp(-other_log_variance)
    # Near 0 these terms cancel: in another order, float32 would round visibly apart from Improved DDPM.
    return 0.5 * (-1 + other_log_variance - log_variance + torch.exp(log_variance - other_log_variance) + distance)


def _log_likelihood_8bit(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """log of the Gaussian's mass in x +- 1/255, per element; the outermost bins reach to infinity."""
    precision = torch.exp(-log_scale)
    above = _normal_cdf(precision * (x - mean + 1 / 255))
    below = _normal_cdf(precision * (x - mean - 1 / 255))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return mass.clamp(min=1e-12).log()


def _normal_cdf(x: Tensor) -> Tensor:
    """The tanh approximation of Improved DDPM, within 2e-4 of the standard normal CDF."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
