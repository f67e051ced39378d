"""What makes a policy's chunks elsewhere: Diffusion Policy's loop around a scheduler, and iPNDM in plain torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fastsample import IPNDM

Model = Callable[[Tensor, Tensor], Tensor]
_ADAMS_BASHFORTH = ((1,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def published_loop(
    scheduler: Any,
    steps: int,
    model: Model,
    start: Tensor,
    given: Mapping[str, Any],
    skipped: int = 0,
) -> Tensor:
    """A chunk as Diffusion Policy makes it, from noise; where steps are skipped, `start` is a clean chunk.

    Args:
        given: of every step, beside what it needs.
    """
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps[skipped:]
    x = start
    if skipped:
        x = scheduler.add_noise(start, torch.randn(start.shape, generator=given["generator"]), timesteps[:1])
    for t in timesteps:
        output = model(x, t)
        x = scheduler.step(output, t, x, **given).prev_sample
    return x


def plain_ipndm(sampler: IPNDM, model: Model, start: Tensor) -> Tensor:
    """The chunk of an iPNDM of order 4 that clips x0 to [-1, 1], as one writes it in plain torch."""
    table = sampler.table
    assert table.alpha is not None and table.sigma is not None
    levels = list(zip(table.alpha.tolist(), table.sigma.tolist(), strict=True))
    x, epsilons = start, list[Tensor]()
    for (alpha, sigma), (next_alpha, next_sigma), t in zip(levels[:-1], levels[1:], table.times, strict=True):
        x0 = ((x - sigma * model(x, torch.tensor(t))) / alpha).clamp(-1, 1)
        epsilons = [(x - alpha * x0) / sigma, *epsilons[:3]]
        weights = _ADAMS_BASHFORTH[len(epsilons) - 1]
        slope = sum(weight * epsilon for weight, epsilon in zip(weights, epsilons, strict=True))
        x = next_alpha * (x / alpha + (next_sigma / next_alpha - sigma / alpha) * slope)
    return x
