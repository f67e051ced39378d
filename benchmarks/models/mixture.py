"""A Gaussian mixture in one dimension: its noise is known exactly, and so is where the probability flow leads."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastsample import Schedule

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([-1.5, 0.4, 1.8], dtype=torch.float64)
DEVIATION = 0.4


class Mixture:
    """The model of data sum_i w_i N(mu_i, s^2): at level (alpha, sigma) sum_i w_i N(alpha mu_i, alpha^2 s^2 + sigma^2).

    Everything is float64, x of shape (B, 1).
    """

    def __init__(self, schedule: Schedule) -> None:
        alpha_bar = torch.tensor(schedule.alphas_cumprod)
        self.schedule = schedule
        self._alpha, self._sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        """E[z | x] = sigma sum_i r_i (x - alpha mu_i) / variance, with the responsibilities r_i of the components."""
        alpha, sigma = self._alpha[t][:, None], self._sigma[t][:, None]
        variance = alpha**2 * DEVIATION**2 + sigma**2
        distance = x - alpha * MEANS
        share = torch.softmax(WEIGHTS.log() - distance**2 / (2 * variance), dim=1)
        return sigma / variance * (share * distance).sum(dim=1, keepdim=True)

    def cdf(self, x: Tensor, t: int) -> Tensor:
        """P(x_t <= x)."""
        alpha, sigma = float(self._alpha[t]), float(self._sigma[t])
        deviation = math.sqrt(alpha**2 * DEVIATION**2 + sigma**2)
        return (WEIGHTS * torch.special.ndtr((x - alpha * MEANS) / deviation)).sum(dim=1, keepdim=True)

    def quantile(self, probability: Tensor, t: int) -> Tensor:
        """The x with cdf(x, t) = probability, by bisection down to the last bit."""
        low, high = torch.full_like(probability, -50.0), torch.full_like(probability, 50.0)
        for _ in range(80):
            middle = (low + high) / 2
            below = self.cdf(middle, t) < probability
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def flow(self, x: Tensor, start: int, end: int) -> Tensor:
        """The exact solution of the probability flow ODE: in one dimension paths cannot cross, so ranks are kept."""
        return self.quantile(self.cdf(x, start), end)
