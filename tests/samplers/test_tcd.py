"""TCD: diffusers' published sums and whole chains against its live scheduler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fastsample import DDIM, Schedule, ops
from fastsample.samplers.tcd import TCD, tcd
from support import diffusers_runs
from support.chains import diffusers_dummies, toy_model

SCHEDULE = Schedule.scaled_linear()
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


@pytest.mark.parametrize(("steps", "total", "mean"), [(1, 29.8715, 0.0389), (10, 181.2040, 0.2359)])
def test_published_sums(backend: str, steps: int, total: float, mean: float) -> None:
    """test_scheduler_tcd.py's deterministic loops, with their tolerances."""
    x, model = diffusers_dummies()
    got = tcd(model, x, schedule=SCHEDULE, steps=steps, gamma=0.0, backend=backend)
    assert abs(got.abs().sum().item() - total) < 1e-3
    assert abs(got.abs().mean().item() - mean) < 1e-3


@pytest.mark.parametrize("gamma", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [1, 4, 25])
def test_the_live_diffusers(backend: str, prediction: str, gamma: float, steps: int) -> None:
    """Whole chains. diffusers' tables are float32, which costs sqrt(1 - alpha bar) 1e-5 near t = 0."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.TCDScheduler(prediction_type=PREDICTIONS[prediction])
    scheduler.set_timesteps(steps)
    x = ops.randn((2, 3, 8, 8), seed=5)
    want = diffusers_runs.chain(scheduler, toy_model, x, eta=gamma)
    common: dict[str, Any] = dict(schedule=SCHEDULE, steps=steps, prediction=prediction, seed=5, backend=backend)
    got = tcd(toy_model, x, gamma=gamma, **common)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("gamma", [0.1, 0.3, 0.7, 0.9])
def test_the_timestep_on_the_way_is_that_of_diffusers(gamma: float) -> None:
    """floor((1 - gamma) t'), in torch's float32: in float64, 0.1 * 10 would come to timestep 0."""
    t = np.arange(999, -1, -1)
    table = TCD(SCHEDULE, timesteps=t, gamma=gamma).table
    between = torch.floor((1 - gamma) * torch.from_numpy(np.append(t[1:], 0))).long().numpy()
    kept = np.append(SCHEDULE.alphas_cumprod[t[1:]], SCHEDULE.alphas_cumprod[0]) / SCHEDULE.alphas_cumprod[between]
    np.testing.assert_allclose(table.s**2, 1 - kept, rtol=1e-12, atol=1e-15)


def test_gamma_0_is_ddim_to_timestep_0(backend: str) -> None:
    x = ops.randn((2, 3, 5), seed=1)
    schedule = DDIM(SCHEDULE, timesteps="lcm", steps=8, final_alpha_cumprod=float(SCHEDULE.alphas_cumprod[0]))
    want = schedule(toy_model, x, backend=backend)
    got = tcd(toy_model, x, schedule=SCHEDULE, steps=8, gamma=0.0, backend=backend)
    # The same rows but for the rounding of a square root of a square.
    assert (got - want).abs().max() <= 1e-6 * want.abs().max()


def test_every_row_keeps_the_noise_level() -> None:
    """For data 0 and the true epsilon, x' has deviation sigma': direction^2 + s^2 = sigma'^2."""
    for gamma in (0.0, 0.3, 1.0):
        table = TCD(SCHEDULE, steps=10, gamma=gamma).table
        assert table.alpha is not None and table.sigma is not None
        direction = table.d  # an epsilon model's own epsilon
        np.testing.assert_allclose(direction**2 + table.s**2, table.sigma[1:] ** 2, rtol=1e-12)
        assert table.sigma[-1] ** 2 == pytest.approx(1 - SCHEDULE.alphas_cumprod[0])
        assert table.stochastic == (gamma > 0,) * 9 + (False,)


def test_a_clip_takes_epsilon_from_the_new_x0(backend: str) -> None:
    common: dict[str, Any] = dict(schedule=SCHEDULE, timesteps="lcm", steps=8, clip=0.7, seed=0, backend=backend)
    got = tcd(toy_model, (2, 3, 5), gamma=0.0, **common)
    want = DDIM(SCHEDULE, timesteps="lcm", steps=8, clip=0.7, final_alpha_cumprod=float(SCHEDULE.alphas_cumprod[0]))
    assert (got - want(toy_model, (2, 3, 5), seed=0, backend=backend)).abs().max() <= 1e-6
    corrected = tcd(toy_model, (2, 3, 5), gamma=0.0, correct_x0=lambda x0, t: x0.clamp(-0.7, 0.7), **common)
    # A second pass rounds once more in each of 8 steps.
    assert (got - corrected).abs().max() <= 1e-5


def test_the_function_is_the_sampler(backend: str) -> None:
    sampler = TCD(SCHEDULE, steps=3, gamma=0.5)
    one = sampler(toy_model, (2, 3, 5), seed=3, backend=backend)
    assert torch.equal(one, tcd(toy_model, (2, 3, 5), schedule=SCHEDULE, steps=3, gamma=0.5, seed=3, backend=backend))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"gamma": -0.1}, ValueError, r"gamma must lie in \[0, 1\], got -0.1", id="gamma-negative"),
        pytest.param({"gamma": 1.5}, ValueError, r"gamma must lie in \[0, 1\]", id="gamma-above-1"),
        pytest.param({"gamma": math.nan}, ValueError, r"gamma must lie in \[0, 1\]", id="gamma-nan"),
        pytest.param({"gamma": None}, TypeError, "gamma must be a number", id="gamma-type"),
        pytest.param({"steps": 51}, ValueError, "original_steps=50", id="steps"),
        pytest.param({"prediction": "eps"}, ValueError, "prediction must be one of", id="prediction"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tcd(toy_model, (1, 3, 4), **arguments)
