"""iPNDM: chains against its formulas in float64, and what rows remember."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import Schedule
from fastsample.samplers.ddim import DDIM
from fastsample.samplers.ipndm import IPNDM, ipndm
from support.chains import toy_model
from support.diffusers_runs import start
from support.multistep import Levels, run

SCHEDULE = Schedule.scaled_linear()
COEFFICIENTS = {1: [1], 2: [3 / 2, -1 / 2], 3: [23 / 12, -16 / 12, 5 / 12], 4: [55 / 24, -59 / 24, 37 / 24, -9 / 24]}


def adams_bashforth(levels: Levels, rows: Sequence[int], k: int) -> np.ndarray:
    return (levels.r[k + 1] - levels.r[k]) * np.array(COEFFICIENTS[len(rows)])


@pytest.mark.parametrize("timesteps", ["trailing", "karras"])
@pytest.mark.parametrize("steps", [1, 3, 6, 30])
@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_against_the_formula_in_float64(order: int, steps: int, timesteps: str) -> None:
    """In sigma space, as the papers' code has it."""
    sampler = IPNDM(SCHEDULE, steps=steps, order=order, timesteps=timesteps)
    want = run(sampler, adams_bashforth, order, lowers=False)
    got = sampler(toy_model, start().double(), model_dtype=torch.float64)
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9 * want.abs().max().item())


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_predictions_of_one_model_agree(backend: str, prediction: str) -> None:
    sampler = IPNDM(SCHEDULE, steps=8, prediction=prediction)
    table = sampler.table
    assert table.alpha is not None and table.sigma is not None
    levels = {t: (table.alpha[k], table.sigma[k]) for k, t in enumerate(table.t.tolist())}

    def model(x: Tensor, t: Tensor) -> Tensor:
        alpha, sigma = levels[int(t[0])]
        epsilon = toy_model(x, t)
        x0 = (x - sigma * epsilon) / alpha
        return {"epsilon": epsilon, "v": alpha * epsilon - sigma * x0, "x0": x0}[prediction]

    want = ipndm(toy_model, start().double(), steps=8, schedule=SCHEDULE, model_dtype=torch.float64)
    got = sampler(model, start(), backend=backend)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_flow_in_its_own_velocity() -> None:
    """By hand, from pure noise to clean data."""
    sampler = IPNDM(prediction="flow", steps=5, order=4, timesteps="trailing")
    x, earlier = start().double(), []
    sigma = sampler.table.sigma
    assert sigma is not None
    for k, t in enumerate(sampler.table.t.tolist()):
        earlier.insert(0, toy_model(x, torch.full((len(x),), t)))
        used = COEFFICIENTS[min(4, k + 1)]
        x = x + (sigma[k + 1] - sigma[k]) * sum(c * v for c, v in zip(used, earlier, strict=False))
    torch.testing.assert_close(sampler(toy_model, start().double(), model_dtype=torch.float64), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip", [None, 1.0])
def test_order_1_is_ddim_that_derives_epsilon_anew(clip: float | None) -> None:
    rederived = {} if clip is None else {"rederive_epsilon": True}
    one = IPNDM(SCHEDULE, steps=8, order=1, timesteps="trailing", clip=clip)(toy_model, start())
    other = DDIM(SCHEDULE, steps=8, timesteps="trailing", clip=clip, **rederived)(toy_model, start())
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("clip", [None, 0.7])
def test_what_is_shown_is_x0(backend: str, clip: float | None) -> None:
    """Rows remember epsilon; whoever looks sees x0, and changes nothing by looking."""
    sampler = IPNDM(SCHEDULE, steps=6, clip=clip)
    table = sampler.table
    shown, states = [], [start()]
    for step in sampler.iterate(toy_model, start(), backend=backend):
        shown.append(step.x0.clone())
        states.append(step.x.clone())
    assert torch.equal(states[-1], sampler(toy_model, start(), backend=backend))
    for k, (x, x0) in enumerate(zip(states, shown, strict=False)):
        want = table.p[k] * x + table.q[k] * toy_model(x, torch.full((len(x),), table.times[k]))
        want = want if clip is None else want.clamp(-clip, clip)
        assert (x0 - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_correction_of_x0_reaches_what_rows_remember(backend: str) -> None:
    """A clamp as a correction is the clamp of the sampler."""
    want = IPNDM(SCHEDULE, steps=6, clip=0.7)(toy_model, start(), backend=backend)
    corrected = IPNDM(SCHEDULE, steps=6, correct_x0=lambda x0, t: x0.clamp(-0.7, 0.7))
    got = corrected(toy_model, start(), backend=backend)
    assert (got - want).abs().max() <= 2e-5 * want.abs().max()


@pytest.mark.parametrize("order", [2, 4])
def test_a_start_part_way_is_a_run_of_its_own(order: int) -> None:
    sampler = IPNDM(SCHEDULE, timesteps=[900, 700, 500, 300, 100], order=order)
    later = IPNDM(SCHEDULE, timesteps=[500, 300, 100], order=order)
    assert torch.equal(sampler(toy_model, start(), start_step=2), later(toy_model, start()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param({"order": 5}, "order must be 1, 2, 3 or 4, got 5", id="order"),
        pytest.param({"order": 0}, "order must be", id="no-order"),
        pytest.param({"prediction": "noise"}, "prediction", id="prediction"),
        pytest.param({"clip": 0.0}, "clip", id="clip"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IPNDM(SCHEDULE, steps=5, **arguments)
