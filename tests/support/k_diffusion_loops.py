"""The sampling loops of the papers in float64, step by step on tensors, with k-diffusion's callbacks and noise."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

Denoiser = Callable[[Tensor, Tensor], Tensor]
Callback = Callable[[dict[str, Any]], object]


def karras(steps: int, low: float = 0.03, high: float = 15.0, *, to_zero: bool = True) -> Tensor:
    """steps + 1 levels between high and low whose seventh roots are evenly spaced; or `steps` of them, and 0."""
    count = steps if to_zero else steps + 1
    share = torch.arange(count, dtype=torch.float64) / max(count - 1, 1)
    levels = (high ** (1 / 7) * (1 - share) + low ** (1 / 7) * share) ** 7
    return torch.cat([levels, levels.new_zeros(1)]).float() if to_zero else levels.float()


def denoiser(x: Tensor, sigma: Tensor) -> Tensor:
    """Smooth in both, of no method's order."""
    sigma = sigma.reshape(-1, *[1] * (x.ndim - 1))
    return x / (1 + sigma**2) + 0.3 * torch.sin(x / (1 + sigma))


class Given(NamedTuple):
    """What a loop is given: x float64; z(sigma, sigma') draws noise."""

    model: Denoiser
    x: Tensor
    sigmas: Tensor
    z: Callable[[Tensor, Tensor], Tensor]
    callback: Callback | None = None

    def steps(self) -> Iterator[tuple[int, float, float]]:
        levels = self.sigmas.tolist()
        yield from zip(range(len(levels) - 1), levels[:-1], levels[1:], strict=True)

    def noise(self, i: int) -> Tensor:
        return self.z(self.sigmas[i], self.sigmas[i + 1]).double()

    def ask(self, x: Tensor, sigma: float) -> Tensor:
        return self.model(x, torch.full((len(x),), sigma, dtype=x.dtype))

    def show(self, x: Tensor, i: int, sigma_hat: float, denoised: Tensor) -> None:
        if self.callback is not None:
            sigma = self.sigmas[i]
            self.callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma_hat, "denoised": denoised})


def edm(given: Given, *, heun: bool, s_churn: float = 0, s_tmin: float = 0, s_noise: float = 1) -> Tensor:
    """Algorithm 2 of Karras et al. (2022), and without its second half Euler's method. Slopes precede callbacks."""
    x, count = given.x, len(given.sigmas) - 1
    for i, sigma, to in given.steps():
        gamma = min(s_churn / count, 2**0.5 - 1) if sigma >= s_tmin else 0
        hat = sigma + gamma * sigma
        if gamma > 0:
            x = x + (hat**2 - sigma**2) ** 0.5 * s_noise * given.noise(i)
        x0 = given.ask(x, hat)
        slope = (x - x0) / hat
        given.show(x, i, hat, x0)
        reached = x + (to - hat) * slope
        if heun and to > 0:
            other = (reached - given.ask(reached, to)) / to
            reached = x + (to - hat) * 0.5 * (slope + other)
        x = reached
    return x


def ddpm_like(given: Given, *, eta: float = 1, s_noise: float = 1, at_zero: bool = True) -> Tensor:
    """DDIM's eta (Song et al. 2021, equation 16) in the variance preserving coordinates it is stated in."""
    x = given.x
    for i, sigma, to in given.steps():
        x0 = given.ask(x, sigma)
        given.show(x, i, sigma, x0)
        abar, following = 1 / (1 + sigma**2), 1 / (1 + to**2)
        own = eta * math.sqrt((1 - following) / (1 - abar) * (1 - abar / following))
        most = math.sqrt(1 - following)
        own = min(own, most)  # which eta above 1 asks more than
        epsilon = (x - x0) / sigma
        y = following**0.5 * x0 + math.sqrt((most - own) * (most + own)) * epsilon
        x = y / following**0.5
        if to > 0 and (eta > 0 or at_zero):
            x = x + own / following**0.5 * s_noise * given.noise(i)
    return x


def dpmpp(given: Given, *, eta: float = 0, s_noise: float = 1, heun: bool = False) -> Tensor:
    """x0 as a line through the last two over lambda = -log sigma, integrated exactly ("heun") or at its middle."""
    x, last = given.x, None
    for i, sigma, to in given.steps():
        x0 = given.ask(x, sigma)
        given.show(x, i, sigma, x0)
        if to == 0:
            return x0
        lam, end, n = -math.log(sigma), -math.log(to), 1 + eta
        w = end - lam
        weight = 1 - math.exp(-n * w)
        following = to / sigma * math.exp(-eta * w) * x + weight * x0
        if last is not None:
            per_lambda = (x0 - last[1]) / (lam - last[0])
            # The integral of n e^(-n (end - l)) (l - lam) over l from lam to end.
            following = following + (w - weight / n if heun else weight * w / 2) * per_lambda
        if eta:
            following = following + to * math.sqrt(1 - math.exp(-2 * eta * w)) * s_noise * given.noise(i)
        x, last = following, (lam, x0)
    return x


def consistency(given: Given) -> Tensor:
    """To clean data and back."""
    x = given.x
    for i, sigma, to in given.steps():
        x0 = given.ask(x, sigma)
        given.show(x, i, sigma, x0)
        x = x0 + to * given.noise(i) if to > 0 else x0
    return x


def adams_bashforth(given: Given, *, most: int = 4) -> Tensor:
    """The slope's polynomial through the last values, as if steps were of one size: backward differences."""
    x, slopes = given.x, []
    for i, sigma, to in given.steps():
        x0 = given.ask(x, sigma)
        given.show(x, i, sigma, x0)
        slopes = [(x - x0) / sigma, *slopes][:most]
        differences, row = [], slopes
        while row:
            differences.append(row[0])
            row = [new - old for new, old in pairwise(row)]
        mean = sum(share * one for share, one in zip((1, 1 / 2, 5 / 12, 3 / 8), differences, strict=False))
        x = x + (to - sigma) * mean if to > 0 else x0
    return x
