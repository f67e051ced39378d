"""DPM-Solver++: chains against diffusers and the paper's formulas in float64, starts part-way, bad arguments."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import Schedule
from fastsample.samplers.ddim import DDIM
from fastsample.samplers.dpm_solver import DPMSolver, dpm_solver
from fastsample.samplers.limits import DynamicThreshold
from fastsample.times.flow import flow_levels
from fastsample.times.solver_timesteps import solver_timesteps
from support import diffusers_runs
from support.chains import toy_model
from support.diffusers_runs import start

SCHEDULE = Schedule.scaled_linear()
PEER_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}


def peer(**options: Any) -> Any:
    """diffusers' scheduler on SCHEDULE."""
    return diffusers_runs.scheduler_of("DPMSolverMultistepScheduler", **options)


# Against diffusers

SPACINGS: dict[str, dict[str, Any]] = {
    "linspace": {"timestep_spacing": "linspace"},
    "leading": {"timestep_spacing": "leading"},
    "trailing": {"timestep_spacing": "trailing"},
    "karras": {"use_karras_sigmas": True},
    "log_snr": {"use_lu_lambdas": True},
}


@pytest.mark.parametrize("clip", [None, DynamicThreshold(max=1.0), DynamicThreshold(0.9, max=3.0)], ids=str)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_diffusers_chains(prediction: str, order: int, spacing: str, clip: DynamicThreshold | None) -> None:
    """Within 1e-4 of the largest value: diffusers' alpha bars and each of its up to 25 steps are rounded to float32."""
    thresholding = {}
    if clip is not None:
        thresholding = {"dynamic_thresholding_ratio": clip.quantile, "sample_max_value": clip.max, "thresholding": True}
    scheduler = peer(
        solver_order=order, prediction_type=PEER_PREDICTION[prediction], **SPACINGS[spacing], **thresholding
    )
    for steps in (5, 10, 20, 25):
        scheduler.set_timesteps(steps)
        sampler = DPMSolver(SCHEDULE, steps=steps, order=order, timesteps=spacing, prediction=prediction, clip=clip)
        assert sampler.table.t.tolist() == scheduler.timesteps.tolist()
        want = diffusers_runs.chain(scheduler, toy_model, start())
        assert (sampler(toy_model, start()) - want).abs().max() <= 1e-4 * want.abs().max(), steps


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        pytest.param({"timesteps": [980, 700, 333, 90, 7]}, {}, id="explicit"),
        pytest.param({"lower_order_final": False}, {"lower_order_final": False}, id="higher-order-final"),
        pytest.param(
            {"final_alpha_cumprod": float(SCHEDULE.alphas_cumprod[0])},
            {"final_sigmas_type": "sigma_min"},
            id="sigma-min",
        ),
        pytest.param(
            {"final_alpha_cumprod": float(SCHEDULE.alphas_cumprod[0]), "timesteps": "karras"},
            {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
            id="sigma-min-karras",
        ),
        pytest.param(
            {"timesteps": solver_timesteps(1000, "leading", 7, steps_offset=1)},
            {"timestep_spacing": "leading", "steps_offset": 1},
            id="stable-diffusion",
        ),
    ],
)
@pytest.mark.parametrize("order", [2, 3])
def test_diffusers_options(backend: str, arguments: dict, options: dict, order: int) -> None:
    scheduler = peer(solver_order=order, **options)
    if isinstance(arguments.get("timesteps"), list):
        scheduler.set_timesteps(timesteps=arguments["timesteps"])
    else:
        scheduler.set_timesteps(7)
    want = diffusers_runs.chain(scheduler, toy_model, start())
    given = {"steps": 7, "timesteps": "linspace", **arguments}
    got = dpm_solver(toy_model, start(), **given, order=order, schedule=SCHEDULE, backend=backend)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("order", [1, 2, 3])
def test_flow_chains(order: int) -> None:
    """diffusers' flow update at the levels of its FlowMatchEulerDiscreteScheduler, which it does not offer itself."""
    scheduler = peer(solver_order=order, prediction_type="flow_prediction", use_flow_sigmas=True)
    scheduler.set_timesteps(16)
    t, _, sigma = flow_levels("linspace", 16, shift=3.0)
    scheduler.sigmas, scheduler.timesteps = torch.tensor(sigma).float(), torch.tensor(t).float()
    want = diffusers_runs.chain(scheduler, toy_model, start())
    got = dpm_solver(toy_model, start(), steps=16, order=order, prediction="flow", shift=3.0)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


FINAL = float(Schedule.linear().alphas_cumprod[0])


@pytest.mark.parametrize(
    ("arguments", "mean"),
    [
        pytest.param({}, 0.3301, id="epsilon"),
        # diffusers' test has r = clamp(quantile, 1, 0.5) = 0.5, a maximum below 1 that DynamicThreshold refuses.
        pytest.param({"correct_x0": lambda x0, t: x0.clamp(-0.5, 0.5) / 0.5}, 1.1364, id="thresholding"),
        pytest.param({"prediction": "v"}, 0.2251, id="v"),
        pytest.param({"prediction": "v", "timesteps": "karras"}, 0.2096, id="karras-v"),
    ],
)
def test_diffusers_full_loops(backend: str, arguments: dict, mean: float) -> None:
    """The means that diffusers' own tests hold, with their tolerance and settings."""
    x = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    got = dpm_solver(
        lambda x, t: x * (t[0] / (t[0] + 1)),
        x,
        steps=10,
        final_alpha_cumprod=FINAL,
        lower_order_final=False,
        backend=backend,
        **{"timesteps": "linspace", **arguments},
    )
    assert abs(got.abs().mean().item() - mean) < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 5, 9, 30, 333, 998])
@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
def test_timesteps_are_those_of_diffusers(spacing: str, steps: int) -> None:
    scheduler = peer(timestep_spacing=spacing, steps_offset=1 if spacing == "leading" else 0)
    scheduler.set_timesteps(steps)
    got = solver_timesteps(1000, spacing, steps, steps_offset=1)
    # 998 trailing steps of theirs are 999: arange's inexact end adds a timestep -1.
    assert got.tolist() == scheduler.timesteps.tolist()[:steps]


# Against the paper


def paper_chain(x: Tensor, t: np.ndarray, order: int, prediction: str, clip: float | None) -> Tensor:
    """Lu et al. 2022 in their quantities r and D, one sample at a time of float64 arithmetic, clean data at the end."""
    alpha_bar = np.append(SCHEDULE.alphas_cumprod[t], 1.0)
    alpha, sigma = np.sqrt(alpha_bar), np.sqrt(1 - alpha_bar)
    lam = [math.log(a / s) if s > 0 else math.inf for a, s in zip(alpha, sigma, strict=True)]
    found: list[Tensor] = []
    for k in range(len(t)):
        m = toy_model(x, torch.tensor(t[k]))
        x0 = {"epsilon": (x - sigma[k] * m) / alpha[k], "v": alpha[k] * x - sigma[k] * m, "x0": m}[prediction]
        found.append(x0 if clip is None else x0.clamp(-clip, clip))
        h = lam[k + 1] - lam[k]
        left = len(t) - k if len(t) < 15 else 1 if k + 1 == len(t) else 3
        phi = alpha[k + 1] * (1 - math.exp(-h))
        now = min(order, k + 1, left)
        next_x = sigma[k + 1] / sigma[k] * x + phi * found[k]
        if now >= 2:
            r0 = (lam[k] - lam[k - 1]) / h
            d1 = (found[k] - found[k - 1]) / r0
            if now == 2:
                next_x = next_x + 0.5 * phi * d1
        if now == 3:
            r1 = (lam[k - 1] - lam[k - 2]) / h
            difference = d1 - (found[k - 1] - found[k - 2]) / r1
            next_x = (
                next_x
                + alpha[k + 1] * ((math.exp(-h) - 1) / h + 1) * (d1 + r0 / (r0 + r1) * difference)
                - alpha[k + 1] * ((math.exp(-h) - 1 + h) / h**2 - 0.5) * difference / (r0 + r1)
            )
        x = next_x
    return x


@pytest.mark.parametrize("clip", [None, 0.7], ids=["free", "clip"])
@pytest.mark.parametrize("steps", [1, 2, 3, 14, 15, 40])
@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_matches_the_paper_in_float64(prediction: str, order: int, steps: int, clip: float | None) -> None:
    """40 float64 steps of a smooth model; 1e-16 grows by 1/alpha = 15 and by h^-2, some 1e3 at 40 steps."""
    sampler = DPMSolver(SCHEDULE, steps=steps, order=order, prediction=prediction, clip=clip)
    x = start().double()
    want = paper_chain(x, sampler.table.t, order, prediction, clip)
    got = sampler(toy_model, x, model_dtype=torch.float64)
    assert got.dtype == torch.float64
    assert (got - want).abs().max() <= 1e-11 * want.abs().max()


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_order_one_is_ddim(prediction: str) -> None:
    t = (999, 600, 250, 30)
    first = DPMSolver(SCHEDULE, timesteps=t, order=1, prediction=prediction).table
    ddim = DDIM(SCHEDULE, timesteps=t, prediction=prediction).table
    # What x and m are multiplied with. 1/alpha is 15 and cancels; float64 leaves 1e-13.
    for mine, theirs in (
        (first.a + first.b * first.p, ddim.a + ddim.b * ddim.p),
        (first.b * first.q, ddim.d + ddim.b * ddim.q),
    ):
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-13)


def test_orders_rise_and_fall() -> None:
    def history(**options: Any) -> list[int]:
        table = DPMSolver(SCHEDULE, order=3, **options).table
        return (1 + (table.c1 != 0) + (table.c2 != 0)).tolist()

    assert history(steps=6) == [1, 2, 3, 3, 2, 1]
    assert history(steps=15) == [1, 2, *[3] * 12, 1]
    assert history(steps=4, lower_order_final=False) == [1, 2, 3, 1]
    assert history(steps=4, lower_order_final=False, final_alpha_cumprod=0.9999) == [1, 2, 3, 3]
    assert history(steps=1) == [1]


def test_rows_keep_the_levels_they_lead_through() -> None:
    table = DPMSolver(SCHEDULE, timesteps=[900, 500, 100]).table
    np.testing.assert_allclose(table.alpha**2, [*SCHEDULE.alphas_cumprod[[900, 500, 100]], 1.0], rtol=1e-15)
    np.testing.assert_allclose(table.alpha**2 + table.sigma**2, 1.0, rtol=1e-15)


# Pure noise, clean data


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("order", [1, 2, 3])
def test_zero_terminal_snr(backend: str, order: int) -> None:
    """From alpha bar 0 the first width is infinite: that row gives alpha' x0 + sigma' x, the next has no slope."""
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    sampler = DPMSolver(schedule, steps=20, order=order, timesteps="trailing", prediction="v")
    table = sampler.table
    assert (table.a[0], table.b[0]) == (table.sigma[1], table.alpha[1])
    assert table.c1[1] == 0 and table.c2[2] == 0
    assert sampler(toy_model, start(), backend=backend).isfinite().all()
    with pytest.raises(ValueError, match="alpha bar is 0"):
        DPMSolver(schedule, order=order, timesteps="trailing")


def test_a_last_level_that_repeats_is_the_identity() -> None:
    table = DPMSolver(SCHEDULE, timesteps=[500, 200, 0], final_alpha_cumprod=SCHEDULE.alphas_cumprod[0]).table
    assert (table.a[-1], table.b[-1], table.c1[-1]) == (1, 0, 0)


def test_a_level_without_noise_is_refused_but_at_the_end() -> None:
    with pytest.raises(ValueError, match="sigma is 0"):
        DPMSolver(Schedule.from_alphas_cumprod([1.0, 0.5, 0.1]), timesteps=[2, 1, 0])


# Starting part-way


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("row", [1, 4, 9])
def test_a_start_part_way_is_the_shorter_run(backend: str, order: int, row: int) -> None:
    """The order rises from 1 again, so the rows from there on are those of a list of timesteps that begins there."""
    t = tuple(range(950, 0, -95))
    whole = DPMSolver(SCHEDULE, timesteps=t, order=order, lower_order_final=False)
    rest = DPMSolver(SCHEDULE, timesteps=t[row:], order=order, lower_order_final=False)
    assert len(whole.table_from(row)) == len(t)
    got = whole(toy_model, start(), start_step=row, backend=backend)
    assert torch.equal(got, rest(toy_model, start(), backend=backend))


def test_strength_runs_the_last_rows() -> None:
    seen: list[int] = []
    got = dpm_solver(toy_model, start(), steps=20, strength=0.3, callback=lambda step: seen.append(step.index))
    assert seen == [14, 15, 16, 17, 18, 19] and got.isfinite().all()


# As objects and functions


def test_every_backend_gives_the_same_picture(backend: str) -> None:
    options = {"steps": 20, "order": 3, "seed": 3, "clip": DynamicThreshold(max=2.0)}
    got = dpm_solver(toy_model, (2, 3, 9), backend=backend, **options)
    want = dpm_solver(toy_model, (2, 3, 9), backend="reference", **options)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_correcting_nothing_changes_nothing(backend: str) -> None:
    options = {"steps": 12, "order": 3, "seed": 3, "backend": backend}
    got = dpm_solver(toy_model, (2, 3, 9), correct_x0=lambda x0, t: x0, **options)
    want = dpm_solver(toy_model, (2, 3, 9), **options)
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_sampler_is_immutable_and_reusable() -> None:
    sampler = DPMSolver(Schedule.linear(), steps=5)
    with pytest.raises(AttributeError):
        sampler.order = 3  # type: ignore[misc]
    first = sampler(toy_model, (2, 3), seed=4)
    assert torch.equal(first, sampler(toy_model, (2, 3), seed=4))
    assert torch.equal(first, dpm_solver(toy_model, (2, 3), steps=5, seed=4))
    listed = DPMSolver(Schedule.linear(), timesteps=iter([9, 5]))
    assert listed.timesteps == (9, 5) and listed.steps == 2
    assert hash(listed) == hash(DPMSolver(Schedule.linear(), timesteps=[5, 9]))
    assert sampler == DPMSolver(Schedule.linear(), steps=5) != DPMSolver(Schedule.linear(), steps=5, order=3)
    assert "order=2" in repr(sampler)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"order": 4}, ValueError, "order must be 1, 2 or 3, got 4", id="order"),
        pytest.param({"steps": 1001}, ValueError, r"steps must lie in \[1, 1000\]", id="steps-above-T"),
        pytest.param(
            {"steps": 1000, "timesteps": "linspace"}, ValueError, r"steps must lie in \[1, 999\]", id="linspace-of-T"
        ),
        pytest.param({"steps": 0}, ValueError, "steps must be at least 1, got 0", id="no-steps"),
        pytest.param({"steps": 0, "timesteps": "karras"}, ValueError, "steps must be at least 1", id="no-karras-steps"),
        pytest.param({"steps": 2.5}, TypeError, "steps must be an int, got 2.5", id="steps-fractional"),
        pytest.param({"steps": 2.5, "timesteps": "log_snr"}, TypeError, "steps must be an int", id="log-snr-steps"),
        pytest.param({"timesteps": "uniform"}, ValueError, "no spacing", id="unknown-spacing"),
        pytest.param({"timesteps": [5.5, 2.5]}, TypeError, "integers", id="fractional-times"),
        pytest.param({"prediction": "score"}, ValueError, "epsilon, v, x0", id="prediction"),
        pytest.param({"clip": 0.0}, ValueError, "clip", id="clip-zero"),
        pytest.param({"final_alpha_cumprod": 0.5}, ValueError, "final_alpha_cumprod", id="final-too-noisy"),
        pytest.param({"final_alpha_cumprod": "1"}, TypeError, "final_alpha_cumprod", id="final-string"),
        pytest.param({"shift": 3.0}, ValueError, "shift is for prediction='flow' only", id="shift-without-flow"),
        pytest.param({"schedule": "linear"}, TypeError, "Schedule", id="schedule-type"),
        pytest.param(
            {"prediction": "flow", "schedule": SCHEDULE}, ValueError, "takes neither schedule", id="flow-schedule"
        ),
        pytest.param({"prediction": "flow", "timesteps": "karras"}, ValueError, "linspace, trailing", id="flow-karras"),
        pytest.param({"beta": 3}, TypeError, "beta", id="unknown-option"),
        pytest.param(
            {"schedule": SCHEDULE.rescale_zero_terminal_snr(), "prediction": "v", "timesteps": "karras"},
            ValueError,
            "alpha bar is 0",
            id="karras-at-zero-snr",
        ),
    ],
)
def test_bad_arguments_raise_before_the_model_is_called(arguments: dict, error: type[Exception], message: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model must not be called")

    with pytest.raises(error, match=message):
        dpm_solver(model, (1, 3, 4), **arguments)


def test_a_schedule_is_needed() -> None:
    with pytest.raises(TypeError, match=r"schedule must be a fastsample\.Schedule, got NoneType"):
        DPMSolver(None)


def test_tables_need_a_row() -> None:
    with pytest.raises(ValueError, match="timesteps must not be empty"):
        DPMSolver(SCHEDULE, timesteps=np.array([], dtype=np.int64))
