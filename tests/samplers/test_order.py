"""On a mixture of Gaussians, whose noise is known exactly: how fast solvers converge, and what DDPM's samples are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Schedule, Table, ops
from fastsample.samplers.ddpm import DDPM
from fastsample.samplers.deis import DEIS
from fastsample.samplers.dpm_solver import DPMSolver
from fastsample.samplers.euler import Euler
from fastsample.samplers.heun import Heun
from fastsample.samplers.ipndm import IPNDM
from fastsample.samplers.unipc import UniPC

# Thousands of calls on few numbers: where cores are shared, waiting for threads would cost 20 times as much.
pytestmark = pytest.mark.usefixtures("one_thread")

# Weight, mean and deviation of each.
MIXTURE = ((0.3, -1.2, 0.35), (0.7, 0.8, 0.25))


def posterior(x: Tensor, alpha: float, sigma: float) -> tuple[Tensor, Tensor]:
    """(E[x0 | x], E[z | x]) for x = alpha x0 + sigma z."""
    total = x0 = z = torch.zeros_like(x)
    for weight, mean, deviation in MIXTURE:
        distance, variance = x - alpha * mean, alpha**2 * deviation**2 + sigma**2
        density = weight / math.sqrt(variance) * torch.exp(distance**2 / (-2 * variance))
        total = total + density
        x0 = x0 + density * (mean + alpha * deviation**2 / variance * distance)
        z = z + density * (sigma / variance * distance)
    return x0 / total, z / total


def cumulative(x: Tensor, alpha: float, sigma: float) -> Tensor:
    """The probability of less than x."""
    spreads = [math.sqrt(2 * (alpha**2 * deviation**2 + sigma**2)) for _, _, deviation in MIXTURE]
    return sum(
        weight * (1 + torch.erf((x - alpha * mean) / spread)) / 2
        for (weight, mean, _), spread in zip(MIXTURE, spreads, strict=True)
    )


def exact(x: Tensor, start: tuple[float, float], end: tuple[float, float]) -> Tensor:
    """What the ODE takes x to: in one dimension it keeps the order of points, so the cumulative probability."""
    target = cumulative(x, *start)
    low, high = torch.full_like(x, -10.0), torch.full_like(x, 10.0)
    for _ in range(60):
        middle = (low + high) / 2
        below = cumulative(middle, *end) < target
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def slope(solve: Callable[[int], Tensor], want: Tensor) -> float:
    """Of log error against log step."""
    counts = (40, 80, 160, 320)
    errors = [(solve(steps) - want).abs().mean().item() for steps in counts]
    assert errors[-1] > 1e-9, "still far above rounding"
    return -np.polyfit(np.log(counts), np.log(errors), 1)[0]


# Levels with log SNR evenly spaced: lambda = log(alpha / sigma) from 2.5 at t = 0 down to -2.5 at t = FINE.
FINE = 1280
ALPHA_BAR = 1 / (1 + np.exp(-2 * np.linspace(2.5, -2.5, FINE + 1)))
FINE_SCHEDULE = Schedule.from_alphas_cumprod(ALPHA_BAR)
POINTS = torch.linspace(-1.5, 1.5, 64, dtype=torch.float64)


def level(t: int) -> tuple[float, float]:
    return math.sqrt(ALPHA_BAR[t]), math.sqrt(1 - ALPHA_BAR[t])


@pytest.mark.parametrize(
    ("solver", "options", "order"),
    [
        pytest.param(DDIM, {}, 1, id="ddim"),
        pytest.param(Euler, {}, 1, id="euler"),
        pytest.param(DPMSolver, {"order": 1, "lower_order_final": False}, 1, id="dpm-solver-1"),
        pytest.param(DPMSolver, {"order": 2, "lower_order_final": False}, 2, id="dpm-solver-2"),
        pytest.param(DPMSolver, {"order": 2, "prediction": "v"}, 2, id="dpm-solver-2-v"),
        pytest.param(Heun, {}, 2, id="heun"),
        pytest.param(Heun, {"prediction": "x0"}, 2, id="heun-x0"),
        # The coefficients of even steps and one Euler start keep all of them at 2.
        pytest.param(IPNDM, {"order": 2}, 2, id="ipndm-2"),
        pytest.param(IPNDM, {"order": 3}, 2, id="ipndm-3"),
        pytest.param(IPNDM, {"order": 4}, 2, id="ipndm-4"),
        pytest.param(DEIS, {"order": 2, "variant": "tab", "lower_order_final": False}, 2, id="deis-2-tab"),
        pytest.param(DEIS, {"order": 2, "variant": "log_rho", "lower_order_final": False}, 2, id="deis-2-log-rho"),
        pytest.param(UniPC, {"order": 1, "lower_order_final": False}, 2, id="unipc-1-corrected"),
        pytest.param(UniPC, {"order": 1, "corrector": False}, 1, id="unipc-1"),
        pytest.param(UniPC, {"order": 2, "lower_order_final": False}, 3, id="unipc-2-corrected"),
        pytest.param(
            UniPC, {"order": 2, "corrector": False, "variant": "bh1", "lower_order_final": False}, 2, id="unipc-2-bh1"
        ),
    ],
)
def test_order(solver: type[Any], options: dict[str, Any], order: int) -> None:
    """Between the same two levels, each list of timesteps halves the steps of the one before.

    A single first-order row, the first of a multistep solver or the last of Heun's, costs a second-order one nothing.
    """

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = level(int(t[0]))
        x0, z = posterior(x, alpha, sigma)
        return {"epsilon": z, "x0": x0, "v": alpha * z - sigma * x0}[options.get("prediction", "epsilon")]

    def solve(steps: int) -> Tensor:
        timesteps = range(FINE // steps, FINE + 1, FINE // steps)
        sampler = solver(FINE_SCHEDULE, timesteps=timesteps, final_alpha_cumprod=ALPHA_BAR[0], **options)
        return sampler(model, POINTS, model_dtype=torch.float64)

    assert abs(slope(solve, exact(POINTS, level(FINE), level(0))) - order) < 0.15


def of_steps(solver: type[Any], steps: int, exact_rows: int, **options: Any) -> Tensor:
    """A run whose first rows begin where the ODE itself would be, entries and all."""
    timesteps = range(FINE // steps, FINE + 1, FINE // steps)
    table = solver(
        FINE_SCHEDULE, timesteps=timesteps, final_alpha_cumprod=ALPHA_BAR[0], lower_order_final=False, **options
    ).table
    x, history = POINTS, []
    for k, t in enumerate(table.t.tolist()):
        x = exact(POINTS, level(FINE), level(t)) if k < exact_rows else x
        entry, epsilon = torch.empty_like(x), posterior(x, *level(t))[1]
        x = ops.step(x, epsilon, table, k, history=history, x0_out=entry, backend="reference")
        history = [entry, *history][:3]
    return x


@pytest.mark.parametrize(
    ("solver", "options", "exact_rows", "order"),
    [
        pytest.param(DEIS, {"variant": "log_rho"}, 3, 3.0, id="deis-3"),
        pytest.param(DEIS, {"variant": "log_rho"}, 1, 2.0, id="deis-3-from-one-euler-row"),
        pytest.param(UniPC, {"corrector": False}, 3, 3.0, id="unipc-3"),
        pytest.param(UniPC, {"corrector": True}, 3, 3.3, id="unipc-3-corrected"),
    ],
)
def test_order_3_takes_a_start_of_that_order(
    solver: type[Any], options: dict[str, Any], exact_rows: int, order: float
) -> None:
    """At the end: what one Euler row leaves falls with the square, and outweighs the rest only in fine steps."""
    want = exact(POINTS, level(FINE), level(0))
    coarse, fine = (
        (of_steps(solver, steps, exact_rows, order=3, **options) - want).abs().mean().item() for steps in (640, 1280)
    )
    assert abs(math.log2(coarse / fine) - order) < 0.15


@pytest.mark.parametrize(("solver", "order"), [pytest.param(Euler, 1, id="euler"), pytest.param(Heun, 2, id="heun")])
def test_order_on_a_flow(solver: type[Any], order: int) -> None:
    """From pure noise to the data themselves, in evenly spaced sigma."""

    def model(x: Tensor, t: Tensor) -> Tensor:
        sigma = t[0].item() / 1000
        x0, z = posterior(x, 1 - sigma, sigma)
        return z - x0

    def solve(steps: int) -> Tensor:
        return solver(steps=steps, timesteps="trailing", prediction="flow")(model, POINTS, model_dtype=torch.float64)

    assert abs(slope(solve, exact(POINTS, (0.0, 1.0), (1.0, 0.0))) - order) < 0.15


# DDPM


def moments(deviations: list[float]) -> np.ndarray:
    """E[x^1 .. x^4] of the mixture with these deviations."""
    total = np.zeros(4)
    for (weight, mean, _), d in zip(MIXTURE, deviations, strict=True):
        total += weight * np.array(
            [mean, mean**2 + d**2, mean**3 + 3 * mean * d**2, mean**4 + 6 * (mean * d) ** 2 + 3 * d**4]
        )
    return total


def deviation_reached(table: Table, deviation: float) -> float:
    """What a chain makes of N(0, deviation^2): its rows are linear there, with epsilon = sigma x / Var(x)."""
    variance = 1.0
    for row, alpha, sigma in zip(table, table.alpha, table.sigma, strict=False):
        epsilon = sigma / (alpha**2 * deviation**2 + sigma**2)
        factor = row["a"] + row["b"] * (row["p"] + row["q"] * epsilon)
        variance = factor**2 * variance + (row["s"] * math.exp(row["g0"])) ** 2
    return math.sqrt(variance)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_samples_have_the_moments_of_the_mixture(variance: str) -> None:
    """Within 4 standard errors of n samples, and what a thousand steps are off by themselves.

    Each step is exact but for its variance, which should be that of the posterior of this mixture: fixed_small is right
    for a single point, fixed_large for N(0, 1). Where it tells, next to the data, every component is on its own, and
    for one alone `deviation_reached` says what comes of it: deviations up to 1.5 % too small, or 0.4 % too large.
    """
    n, schedule = 16384, Schedule.linear()

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha_bar = schedule.alphas_cumprod[int(t[0])]
        z = posterior(x.double(), math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar))[1].float()
        return torch.cat([z, torch.zeros_like(z)], dim=1) if variance == "learned_range" else z

    sampler = DDPM(schedule, variance=variance)
    x = sampler(model, (1, n), seed=1).double().numpy().ravel()
    powers = x ** np.arange(1, 5)[:, None]
    want = moments([deviation for _, _, deviation in MIXTURE])
    allowed = np.abs(moments([deviation_reached(sampler.table, deviation) for _, _, deviation in MIXTURE]) - want)
    assert (np.abs(powers.mean(1) - want) <= 4 * powers.std(1) / math.sqrt(n) + allowed).all()
