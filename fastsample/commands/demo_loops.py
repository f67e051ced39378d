"""What `fastsample demo` compares: the loop of `ddim` with a plain one, and a sample alone with it among others."""

from __future__ import annotations

import statistics
from typing import NamedTuple

import torch
from torch import Tensor

from fastsample.commands.budget import Budget, repeated
from fastsample.commands.demo_rows import GUIDANCE, MANY, NO_LABEL, SHAPE, guided
from fastsample.ops import randn
from fastsample.samplers import DDIM, ddim
from fastsample.schedule import Schedule
from fastsample.zoo import UNet

FEW = 5  # steps of a run of the digits model, and of the samples that are compared
_SHARE = 0.15  # of the budget, for each of the two loops


class Loops(NamedTuple):
    """Seconds a step of the whole batch, and the median of the ratios round by round."""

    ours: float
    plain: float
    ratio: float


def measure(model: UNet, y: Tensor, rounds: int, budget: Budget) -> tuple[Loops, Loops]:
    """With the digits model, and with one that takes no time at all."""
    with torch.no_grad():
        return _interleaved(model, FEW, y, rounds, budget), _interleaved(
            _FreeModel(model.schedule), MANY, y, rounds, budget
        )


def plain_ddim(model: Denoiser, x: Tensor, steps: int, y: Tensor) -> Tensor:
    """The guided loop as one writes it in plain PyTorch: what `ddim` is timed against."""
    alphas_cumprod = model.schedule.alphas_cumprod
    timesteps = DDIM(model.schedule, steps=steps).table.t.tolist()
    labels = torch.cat([torch.full_like(y, NO_LABEL), y])
    for t, previous in zip(timesteps, [*timesteps[1:], None], strict=True):
        alpha_bar = float(alphas_cumprod[t])
        alpha_bar_previous = 1.0 if previous is None else float(alphas_cumprod[previous])
        output = model(torch.cat([x, x]), torch.full((2 * len(x),), t), y=labels)
        unconditional, conditional = output[:, : x.shape[1]].chunk(2)
        epsilon = unconditional + GUIDANCE * (conditional - unconditional)
        x0 = (x - (1 - alpha_bar) ** 0.5 * epsilon) / alpha_bar**0.5
        x = alpha_bar_previous**0.5 * x0 + (1 - alpha_bar_previous) ** 0.5 * epsilon
    return x


class _FreeModel:
    """Returns the same tensor every time, so that only the sampler's own work is timed."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self._output = torch.zeros(2 * SHAPE[0], 2 * SHAPE[1], *SHAPE[2:])

    def __call__(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self._output


Denoiser = UNet | _FreeModel


def _interleaved(model: Denoiser, steps: int, y: Tensor, rounds: int, budget: Budget) -> Loops:
    x = randn(SHAPE, seed=0)

    def both() -> tuple[float, float]:
        start = budget.clock()
        ddim(model, x, steps=steps, **guided(y))
        middle = budget.clock()
        plain_ddim(model, x, steps, y)
        return (middle - start) / steps, (budget.clock() - middle) / steps

    times = repeated(both, rounds + 1, budget.part(_SHARE))
    counted = times[1:] or times  # the first round warms up
    ratio = statistics.median(plain / ours for ours, plain in counted)
    return Loops(
        statistics.median(ours for ours, _ in counted), statistics.median(plain for _, plain in counted), ratio
    )


def seeds_told(model: UNet, seed: int) -> str:
    """Whether a sample is the same alone and in a batch, as text."""
    single, sixteen, place = (1, *SHAPE[1:]), (16, *SHAPE[1:]), 5
    same = torch.equal(randn(single, seed=seed, index=place), randn(sixteen, seed=seed)[place : place + 1])
    eights = torch.full((16,), 8)
    alone = ddim(model, single, steps=FEW, eta=1.0, seed=seed, index=place, **guided(eights[:1]))
    among = ddim(model, sixteen, steps=FEW, eta=1.0, seed=seed, **guided(eights))[place : place + 1]
    return (
        f"sample {place} of seed {seed}, alone and in a batch of 16: noise bits {'identical' if same else 'DIFFERENT'};"
        f" samples (eta 1, {FEW} steps) differ by at most {(alone - among).abs().max():.1e}, which is the model's own "
        "rounding"
    )
