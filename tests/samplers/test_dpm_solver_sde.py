"""DPM-Solver++ with noise between its steps: chains against diffusers, and order 3 against its formula in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fastsample import DPMSolver, Schedule
from support import diffusers_runs
from support.chains import toy_model
from support.diffusers_runs import start

SCHEDULE = Schedule.scaled_linear()
PEER_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_diffusers_chains_of_the_sde(prediction: str, order: int) -> None:
    scheduler = diffusers_runs.scheduler_of(
        "DPMSolverMultistepScheduler",
        solver_order=order,
        prediction_type=PEER_PREDICTION[prediction],
        algorithm_type="sde-dpmsolver++",
    )
    for steps in (1, 5, 20):
        scheduler.set_timesteps(steps)
        sampler = DPMSolver(
            SCHEDULE, timesteps=scheduler.timesteps.tolist(), order=order, prediction=prediction, sde=True
        )
        assert sampler.table.stochastic == (True,) * (steps - 1) + (False,)
        want = diffusers_runs.chain(scheduler, toy_model, start(), seed=5)
        got = sampler(toy_model, start(), noise=lambda k: diffusers_runs.step_noise(k, start().shape))
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), steps


@pytest.mark.parametrize("steps", [6, 18])
def test_order_3_of_the_sde_against_its_formula(steps: int) -> None:
    """k-diffusion's dpmpp_3m_sde in float64, on the levels of a run; diffusers has another sign in it."""
    sampler = DPMSolver(SCHEDULE, steps=steps, order=3, sde=True, lower_order_final=False)
    table = sampler.table
    assert table.alpha is not None and table.sigma is not None
    x, earlier = start().double(), []
    with np.errstate(divide="ignore"):
        log_snr = np.log(table.alpha) - np.log(table.sigma)
    for k, t in enumerate(table.t.tolist()):
        alpha, sigma, after_alpha, after = table.alpha[k], table.sigma[k], table.alpha[k + 1], table.sigma[k + 1]
        x0 = (x - sigma * toy_model(x, torch.full((len(x),), t))) / alpha
        h = log_snr[k + 1] - log_snr[k]
        x = after / sigma * math.exp(-h) * x - after_alpha * math.expm1(-2 * h) * x0
        widths = [log_snr[k - j] - log_snr[k - j - 1] for j in range(len(earlier))]
        if len(earlier) == 1 and k + 1 < steps:
            x = x - after_alpha * math.expm1(-2 * h) * 0.5 * h / widths[0] * (x0 - earlier[0])
        if len(earlier) == 2 and k + 1 < steps:
            r0, r1 = widths[0] / h, widths[1] / h
            d1_0, d1_1 = (x0 - earlier[0]) / r0, (earlier[0] - earlier[1]) / r1
            d1, d2 = d1_0 + (d1_0 - d1_1) * r0 / (r0 + r1), (d1_0 - d1_1) / (r0 + r1)
            phi_2 = math.expm1(-2 * h) / (2 * h) + 1
            x = x + after_alpha * (phi_2 * d1 - (phi_2 / (2 * h) - 0.5) * d2)
        x = x + after * math.sqrt(-math.expm1(-2 * h)) * diffusers_runs.step_noise(k, x.shape).double()
        earlier = [x0, *earlier][:2]
    got = sampler(
        toy_model,
        start().double(),
        noise=lambda k: diffusers_runs.step_noise(k, start().shape).double(),
        model_dtype=torch.float64,
    )
    assert (got - x).abs().max() <= 1e-9 * x.abs().max()
