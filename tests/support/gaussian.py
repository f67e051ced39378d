"""A Gaussian whose noise is known exactly, in 8-bit bins, and the variational bound of it in closed form."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample import Schedule, spaced_timesteps

MEAN, DEVIATION = 0.1, 0.25
LEVELS = np.arange(256) / 127.5 - 1


def probabilities() -> NDArray[np.float64]:
    """The mass of each of the 256 levels: of its bin, the first and last of which are open."""
    edges = [NormalDist(MEAN, DEVIATION).cdf(edge) for edge in (LEVELS[1:] + LEVELS[:-1]) / 2]
    return np.diff(np.array([0.0, *edges, 1.0]))


def entropy() -> float:
    """Bits of a level."""
    mass = probabilities()
    return float(-(mass * np.log2(mass, where=mass > 0, out=np.zeros_like(mass))).sum())


def levels(shape: tuple[int, ...]) -> Tensor:
    """Independent levels, float32."""
    mass = probabilities()
    drawn = np.random.default_rng(0).choice(256, shape, p=mass / mass.sum())
    return torch.from_numpy(LEVELS[drawn]).float()


class Epsilon:
    """The noise's posterior mean, linear in x since all is Gaussian; behind it a variance half of one value."""

    def __init__(self, schedule: Schedule, v: float | None = None) -> None:
        self.schedule, self._v = schedule, v

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = float(self.schedule.alphas_cumprod[int(t[0])])
        alpha, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
        epsilon = sigma / (alpha_bar * DEVIATION**2 + sigma**2) * (x - alpha * MEAN)
        return epsilon if self._v is None else torch.cat((epsilon, torch.full_like(x, self._v)), dim=1)


def expected_bound(schedule: Schedule, steps: int, variance: str, v: float = 0.0) -> float:
    """The mean of the bound over levels and noise in bits, without clipping: all but the decoder in closed form.

    Variances as fastsample.DDPM has them. The error of x0 is linear in x0 and z, so that two moments of x0 are enough.
    """
    t = spaced_timesteps(schedule.T, "respaced", steps)[::-1]
    now = schedule.alphas_cumprod[t]
    then = np.append(1.0, now[:-1])
    beta = 1 - now / then
    small = beta * (1 - then) / (1 - now)
    small[0] = small[1]
    large = np.append(small[0], beta[1:])
    fraction = (v + 1) / 2
    log_variance = {
        "fixed_small": np.log(small),
        "fixed_large": np.log(large),
        "learned": np.full(steps, v),
        "learned_range": fraction * np.log(beta) + (1 - fraction) * np.log(small),
    }[variance]
    alpha, sigma = np.sqrt(now), np.sqrt(1 - now)
    gain = alpha * DEVIATION**2 / (now * DEVIATION**2 + 1 - now)
    mass = probabilities()
    square, spread = float(mass @ LEVELS**2), float(mass @ (LEVELS - MEAN) ** 2)
    prior = (now[-1] * square + sigma[-1] ** 2 - 1 - math.log(sigma[-1] ** 2)) / 2
    error = (1 - gain * alpha) ** 2 * spread + (gain * sigma) ** 2
    weight = np.sqrt(then) * beta / (1 - now)
    ratio = np.exp(log_variance - np.log(small))
    divergences = (np.log(ratio) + 1 / ratio - 1 + weight**2 * error / np.exp(log_variance)) / 2
    decoder = _decoder_nats(alpha[0], sigma[0], gain[0], math.exp(log_variance[0] / 2))
    return float(prior + divergences[1:].sum() + decoder) / math.log(2)


def _decoder_nats(alpha: float, sigma: float, gain: float, deviation: float) -> float:
    """-log p(x0 | x) by quadrature over z, which a Gaussian's tails make exact to rounding."""
    z = np.linspace(-8, 8, 2001)
    weights = np.exp(-(z**2) / 2)
    x = alpha * LEVELS[:, None] + sigma * z
    mean = MEAN + gain * (x - alpha * MEAN)
    upper, lower = (_cdf((LEVELS[:, None] + side / 255 - mean) / deviation) for side in (1, -1))
    upper[-1], lower[0] = 1.0, 0.0
    nats = -np.log(np.maximum(upper - lower, 1e-12))
    return float(probabilities() @ (nats @ weights) / weights.sum())


def _cdf(y: NDArray[np.float64]) -> NDArray[np.float64]:
    return 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))
