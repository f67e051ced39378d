"""DEIS: chains against diffusers and an oracle in float64, and what its polynomials integrate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fastsample import Schedule
from fastsample.samplers.ddim import DDIM
from fastsample.samplers.deis import DEIS, deis
from fastsample.samplers.limits import DynamicThreshold
from fastsample.times.levels import sigma_over_alpha
from support import diffusers_runs
from support.chains import toy_model
from support.diffusers_runs import start
from support.multistep import Levels, integrals, run

# diffusers multiplies tensors by functions of numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept context:DeprecationWarning")

SCHEDULE = Schedule.scaled_linear()
T = np.arange(float(SCHEDULE.T))
FINAL = float(SCHEDULE.alphas_cumprod[0])  # where diffusers' DEIS always ends
PEER_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


def of_log(levels: Levels, rows: Sequence[int], k: int) -> np.ndarray:
    """The integrals of the polynomials in log r through these rows."""
    r = levels.r
    return integrals([np.log(r[j]) for j in rows], np.log, r[k], max(r[k + 1], 1e-300), np.geomspace)


def of_t(levels: Levels, rows: Sequence[int], k: int) -> np.ndarray:
    """The same in t, of which r is known at whole timesteps, and its logarithm is linear between them."""
    whole = sigma_over_alpha(SCHEDULE)

    def t_of(r: np.ndarray) -> np.ndarray:
        return np.where(r < whole[0], r / whole[0] - 1, np.interp(np.log(np.maximum(r, whole[0])), np.log(whole), T))

    return integrals([levels.t[j] for j in rows], t_of, levels.r[k], levels.r[k + 1], np.linspace)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_diffusers_chains(prediction: str, order: int) -> None:
    """Within 1e-4 of the largest value, up to 20 steps: beyond, diffusers' float32 coefficients lose too much."""
    scheduler = diffusers_runs.scheduler_of(
        "DEISMultistepScheduler", solver_order=order, prediction_type=PEER_PREDICTION[prediction]
    )
    for steps in (1, 2, 5, 10, 20):
        scheduler.set_timesteps(steps)
        sampler = DEIS(
            SCHEDULE, steps=steps, order=order, variant="log_rho", prediction=prediction, timesteps="linspace",
            final_alpha_cumprod=FINAL,
        )  # fmt: skip
        assert sampler.table.t.tolist() == scheduler.timesteps.tolist()
        want = diffusers_runs.chain(scheduler, toy_model, start())
        assert (sampler(toy_model, start()) - want).abs().max() <= 1e-4 * want.abs().max(), steps


def test_diffusers_thresholding(backend: str) -> None:
    scheduler = diffusers_runs.scheduler_of(
        "DEISMultistepScheduler",
        solver_order=3,
        thresholding=True,
        dynamic_thresholding_ratio=0.9,
        sample_max_value=3.0,
    )
    scheduler.set_timesteps(8)
    want = diffusers_runs.chain(scheduler, toy_model, start())
    options: dict[str, Any] = {"variant": "log_rho", "timesteps": "linspace", "final_alpha_cumprod": FINAL}
    clip = DynamicThreshold(0.9, max=3.0)
    got = deis(toy_model, start(), steps=8, order=3, clip=clip, schedule=SCHEDULE, backend=backend, **options)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("steps", [4, 12, 40])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("variant", ["log_rho", "tab"])
@pytest.mark.parametrize("final", [FINAL, 1.0], ids=["to-the-first-level", "to-clean-data"])
def test_against_the_formula_in_float64(variant: str, order: int, steps: int, final: float) -> None:
    """In sigma space, with integrals that a fine grid gives; the state stays float64 throughout."""
    sampler = DEIS(SCHEDULE, steps=steps, order=order, variant=variant, final_alpha_cumprod=final)
    want = run(sampler, of_log if variant == "log_rho" else of_t, order, lowers=steps < 15)
    got = sampler(toy_model, start().double(), model_dtype=torch.float64)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()  # of the grid


def test_a_flow_in_its_own_velocity() -> None:
    """A velocity that is a polynomial in sigma of degree 2 is integrated exactly from the third row on."""
    sampler = DEIS(
        prediction="flow", timesteps=[1000, 900, 700, 400, 250, 100], order=3, variant="tab", lower_order_final=False
    )
    x = torch.zeros(1, 2, dtype=torch.float64)

    def velocity(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        sigma = t.double().reshape(-1, 1) / 1000
        return (3 * sigma**2 - 2 * sigma + 0.5).expand_as(x)

    steps = [step.x.clone() for step in sampler.iterate(velocity, x)]
    moved = steps[-1] - steps[1]
    sigma = 0.7
    assert (moved + (sigma**3 - sigma**2 + 0.5 * sigma)).abs().max() < 1e-6


@pytest.mark.parametrize("variant", ["log_rho", "tab"])
@pytest.mark.parametrize("prediction", ["flow", "v"])
def test_from_pure_noise(prediction: str, variant: str) -> None:
    schedule = None if prediction == "flow" else Schedule.linear().rescale_zero_terminal_snr()
    sampler = DEIS(schedule, steps=6, timesteps="trailing", variant=variant, prediction=prediction)
    assert sampler.table.alpha is not None and sampler.table.alpha[0] == 0
    assert sampler(toy_model, start()).isfinite().all()


def test_order_1_is_ddim() -> None:
    one = DEIS(SCHEDULE, steps=8, order=1, timesteps="trailing")(toy_model, start())
    other = DDIM(SCHEDULE, steps=8, timesteps="trailing")(toy_model, start())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["log_rho", "tab"])
def test_a_start_part_way_is_a_run_of_its_own(variant: str) -> None:
    sampler = DEIS(SCHEDULE, timesteps=[900, 700, 500, 300, 100], variant=variant)
    later = DEIS(SCHEDULE, timesteps=[500, 300, 100], variant=variant)
    assert torch.equal(sampler(toy_model, start(), start_step=2), later(toy_model, start()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"order": 4}, "order must be 1, 2 or 3, got 4", id="order"),
        pytest.param({"variant": "rho"}, "variant must be one of", id="variant"),
        pytest.param({"prediction": "noise"}, "prediction", id="prediction"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DEIS(SCHEDULE, steps=5, **arguments)
