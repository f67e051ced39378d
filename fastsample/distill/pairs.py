"""Which two points of a path are to agree in consistency distillation and training."""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from fastsample.distill.grid import nearest
from fastsample.distill.method import Batch
from fastsample.schedule import Float64Array
from fastsample.times.continuous import karras_sigmas
from fastsample.times.timesteps import apart


def levels_between(sigmas: Float64Array, count: int, scales: int) -> tuple[int, ...]:
    """So many of the timesteps of `scales` levels between which sigma^(1/7) is evenly spaced, the noisiest first.

    Args:
        sigmas: sigma / alpha by timestep, (T,).
        count: how many are taken, evenly by their number; all of them where it is `scales`.
        scales: levels from the last timestep's to the first's. They are distinct timesteps: where two would meet, the
            cleaner one moves on.
    """
    wanted = karras_sigmas(sigmas[-1], sigmas[0], scales)
    timesteps = np.abs(np.log(sigmas)[None] - np.log(wanted)[:, None]).argmin(axis=1)
    chosen = apart(timesteps, len(sigmas))[np.floor(np.arange(count) * scales / count).astype(int)]
    return tuple(int(t) for t in chosen)


class Pairs(Protocol):
    """A curriculum."""

    def __init__(self, sigmas: Float64Array, scales: int, iterations: int) -> None: ...

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        """(t, r, row), int64 (B,) each: timesteps with r < t, -1 for clean data, and the teacher's row from t to r."""

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        """Of each pair's loss."""


class Fixed:
    """Neighbours among `scales` levels, each as likely (Song et al. 2023, distillation)."""

    def __init__(self, sigmas: Float64Array, scales: int, iterations: int) -> None:
        self._timesteps = torch.tensor((*levels_between(sigmas, scales, scales), -1))

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        row = batch.integers(len(self._timesteps) - 1)
        timesteps = self._timesteps.to(batch.device)
        return timesteps[row], timesteps[row + 1], row

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        return torch.ones(len(t))


class Adaptive:
    """Neighbours among N(k) levels, from 2 to `scales` as training goes on (Song et al. 2023, training):

    N(k) = ceil( sqrt( k / K ((scales + 1)^2 - 4) + 4 ) - 1 ) + 1
    """

    def __init__(self, sigmas: Float64Array, scales: int, iterations: int) -> None:
        self._sigmas, self._scales, self._iterations = sigmas, scales, iterations

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        share = batch.iteration / self._iterations
        count = math.ceil(math.sqrt(share * ((self._scales + 1) ** 2 - 4) + 4) - 1) + 1
        count = min(count, self._scales)
        timesteps = torch.tensor((*levels_between(self._sigmas, count, count), -1), device=batch.device)
        row = batch.integers(count)
        return timesteps[row], timesteps[row + 1], None

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        return torch.ones(len(t))


class Easy:
    """t log-normal, and r = t (1 - 2^-(stage + 1) n(t)), n(t) = 1 + 8 / (1 + e^t), in sigma (Geng et al. 2024).

    In the first stage r is next to clean data, as in the training of a diffusion model; it comes nearer to t in eight
    stages. The weight is 1 / (t - r).
    """

    _mean, _std, _stages = -1.1, 2.0, 8

    def __init__(self, sigmas: Float64Array, scales: int, iterations: int) -> None:
        self._sigmas, self._iterations = torch.tensor(sigmas), iterations

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor | None]:
        sigma = torch.exp(self._mean + self._std * batch.normals(()).double().cpu())
        t = self._nearest(sigma).clamp(min=0)
        sigma = self._sigmas[t]
        stage = batch.iteration * self._stages // self._iterations
        share = 2.0 ** -(stage + 1) * (1 + 8 * torch.sigmoid(-sigma))
        r = torch.minimum(self._nearest(sigma * (1 - share).clamp(min=0)), t - 1)
        return t.to(batch.device), r.to(batch.device), None

    def _nearest(self, sigma: Tensor) -> Tensor:
        """The timestep of the nearest level; -1 below half of the lowest."""
        return torch.where(sigma < self._sigmas[0] / 2, -1, nearest(self._sigmas, sigma))

    def weight(self, t: Tensor, r: Tensor) -> Tensor:
        t, r = t.cpu(), r.cpu()
        before = torch.where(r < 0, 0.0, self._sigmas[r.clamp(min=0)])
        return (1 / (self._sigmas[t] - before)).float()


CURRICULA: dict[str, type[Pairs]] = {"fixed": Fixed, "adaptive": Adaptive, "easy": Easy}
