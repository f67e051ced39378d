"""Euler, Euler ancestral and Heun: chains against diffusers and a float64 loop, noise levels, bad arguments."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import Schedule, Step
from fastsample.samplers.ddim import ddim
from fastsample.samplers.dpm_solver import DPMSolver
from fastsample.samplers.euler import Euler, EulerAncestral, euler, euler_ancestral
from fastsample.samplers.heun import Heun, heun
from fastsample.samplers.limits import DynamicThreshold
from fastsample.times.continuous import spaced_levels
from support import diffusers_runs
from support.chains import toy_model
from support.diffusers_runs import start

SCHEDULE = Schedule.scaled_linear()
PEER_PREDICTION = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
SPACINGS = ("linspace", "leading", "trailing", "karras")


def peer(name: str, spacing: str = "linspace", **options: Any) -> Any:
    """diffusers' scheduler `name` on SCHEDULE."""
    spaced = {"use_karras_sigmas": True} if spacing == "karras" else {"timestep_spacing": spacing}
    return diffusers_runs.scheduler_of(name, **spaced, **options)


# Against diffusers


@functools.cache
def discrete_runs(solver: type[Euler | Heun], prediction: str, spacing: str) -> list[tuple[int, np.ndarray, Tensor]]:
    """Steps, times and what diffusers makes of them: the same for every backend of ours."""
    scheduler = peer(f"{solver.__name__}DiscreteScheduler", spacing, prediction_type=PEER_PREDICTION[prediction])
    found = []
    for steps in (5, 10, 30):
        scheduler.set_timesteps(steps)
        alpha = solver(SCHEDULE, steps=steps, timesteps=spacing, prediction=prediction).table.alpha[0]
        found.append((steps, scheduler.timesteps.numpy(), diffusers_runs.chain(scheduler, toy_model, start() / alpha)))
    return found


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("prediction", PEER_PREDICTION)
@pytest.mark.parametrize("solver", [Euler, Heun], ids=["euler", "heun"])
def test_diffusers_chains(backend: str, solver: type[Euler | Heun], prediction: str, spacing: str) -> None:
    """Within 1e-4 of the largest value: diffusers' alpha bars and each of its up to 59 rows are rounded to float32."""
    for steps, t, want in discrete_runs(solver, prediction, spacing):
        sampler = solver(SCHEDULE, steps=steps, timesteps=spacing, prediction=prediction)
        # Their interpolation of Karras times is in float32, of logarithms with a slope of 1/200 a timestep.
        np.testing.assert_allclose(sampler.table.t, t, rtol=0, atol=5e-3)
        assert (sampler(toy_model, start(), backend=backend) - want).abs().max() <= 1e-4 * want.abs().max(), steps


@functools.cache
def ancestral_runs(prediction: str, spacing: str) -> list[tuple[int, Tensor]]:
    """Steps, and what diffusers makes of the noise of seed 5."""
    scheduler = peer("EulerAncestralDiscreteScheduler", spacing, prediction_type=PEER_PREDICTION[prediction])
    found = []
    for steps in (5, 20):
        scheduler.set_timesteps(steps)
        alpha = EulerAncestral(SCHEDULE, steps=steps, timesteps=spacing, prediction=prediction).table.alpha[0]
        found.append((steps, diffusers_runs.chain(scheduler, toy_model, start() / alpha)))
    return found


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("prediction", ["epsilon", "v"])
def test_diffusers_ancestral_chains(backend: str, prediction: str, spacing: str) -> None:
    """With the same noise on both sides; theirs draws some in the last row too and multiplies it with 0."""
    for steps, want in ancestral_runs(prediction, spacing):
        sampler = EulerAncestral(SCHEDULE, steps=steps, timesteps=spacing, prediction=prediction)
        noise = [diffusers_runs.step_noise(k, start().shape) for k in range(steps)]
        got = sampler(toy_model, start(), noise=noise.__getitem__, backend=backend)
        assert (got - want).abs().max() <= 1e-4 * want.abs().max(), steps
        assert torch.equal(sampler(toy_model, start(), seed=5, backend=backend), got), "seed 5 is what was given"


@functools.cache
def flow_run(solver: type[Euler | Heun], steps: int, shift: float) -> tuple[np.ndarray, Tensor]:
    """diffusers' times and its chain."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = getattr(diffusers, f"FlowMatch{solver.__name__}DiscreteScheduler")(shift=shift)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.numpy(), diffusers_runs.chain(scheduler, toy_model, start())


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 4, 28])
@pytest.mark.parametrize("solver", [Euler, Heun], ids=["euler", "heun"])
def test_diffusers_flow_chains(backend: str, solver: type[Euler | Heun], steps: int, shift: float) -> None:
    t, want = flow_run(solver, steps, shift)
    sampler = solver(steps=steps, prediction="flow", shift=shift)
    # float32 times up to 1000, rounded several times on their side.
    np.testing.assert_allclose(sampler.table.t, t, rtol=0, atol=3e-4)
    assert (sampler(toy_model, start(), backend=backend) - want).abs().max() <= 1e-4 * want.abs().max()


def test_trailing_flow_is_what_flux_pipelines_ask_for() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / 12, 12), mu=math.log(2.5))
    sampler = Euler(steps=12, timesteps="trailing", prediction="flow", shift=2.5)
    np.testing.assert_allclose(sampler.table.t, scheduler.timesteps.numpy(), rtol=0, atol=3e-4)
    want = diffusers_runs.chain(scheduler, toy_model, start())
    assert (sampler(toy_model, start()) - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize(
    ("sampler", "total", "mean"),
    [
        pytest.param(Euler(Schedule.linear(1100), steps=10, timesteps="linspace"), 10.0807, 0.0131, id="euler"),
        pytest.param(Heun(Schedule.linear(1100), steps=10, timesteps="linspace"), 0.1233, 0.0002, id="heun"),
        pytest.param(
            EulerAncestral(Schedule.linear(1100), steps=10, timesteps="linspace"), 152.3192, 0.1983, id="ancestral"
        ),
    ],
)
def test_diffusers_full_loops(backend: str, sampler: Euler | EulerAncestral | Heun, total: float, mean: float) -> None:
    """The sums that diffusers' own tests hold, with their inputs and noise (of a torch.Generator).

    Their loop keeps the scaled model input as the state that a step starts from, so it starts from alpha times what
    the step before led to. Here the callback multiplies with alpha, and the model is given what theirs is.
    """
    alpha, first_of_step = sampler.table.alpha, 2 if isinstance(sampler, Heun) else 1
    row = itertools.count()

    def model(x: Tensor, t: Tensor) -> Tensor:
        k = next(row)
        return (x if k % first_of_step else x / alpha[k]) * (t[0] / (t[0] + 1))

    def rescale(step: Step) -> None:
        if (step.index + 1) % first_of_step == 0:
            step.x.mul_(step.alpha)

    x = (torch.arange(768) / 768).reshape(3, 8, 8, 4).permute(3, 0, 1, 2)
    x_T = x * float(sampler.table.sigma[0] * alpha[0])
    noise = torch.Generator().manual_seed(0)
    got = sampler(model, x_T, noise=noise, callback=rescale, backend=backend)
    # Published with four decimals; 768 float32 values after 10 steps. Their own tolerances are 1e-2 and 1e-3.
    assert abs(got.abs().sum().item() - total) < 5e-4
    assert abs(got.abs().mean().item() - mean) < 1e-4


# Against other forms of the same method


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("clip", [None, 0.7, DynamicThreshold(max=2.0)], ids=["free", "clip", "threshold"])
def test_euler_is_ddim(backend: str, prediction: str, clip: Any) -> None:
    common = {"steps": 10, "timesteps": "trailing", "prediction": prediction, "clip": clip, "schedule": SCHEDULE}
    common["backend"] = backend
    assert torch.equal(euler(toy_model, start(), **common), ddim(toy_model, start(), **common))
    ancestral = euler_ancestral(toy_model, start(), seed=3, **common)
    assert torch.equal(ancestral, ddim(toy_model, start(), eta=1.0, seed=3, **common))


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("clip", [None, 0.7], ids=["free", "clip"])
@pytest.mark.parametrize("timesteps", ["trailing", "karras"])
def test_heun_matches_a_float64_loop_in_variance_exploding_variables(
    prediction: str, clip: float | None, timesteps: str
) -> None:
    """Karras et al. 2022, algorithm 1: slopes (y - D)/r of y = x / alpha over r = sigma / alpha.

    1e-16, times the largest ratio of neighbouring levels, 30 here, in each of 19 rows, and 1/alpha = 15.
    """
    sampler = Heun(SCHEDULE, steps=10, timesteps=timesteps, prediction=prediction, clip=clip)
    t, alpha, sigma = sampler.table.t[[0, *range(1, 19, 2)]], sampler.table.alpha, sampler.table.sigma
    alpha, sigma = (levels[[0, *range(1, 20, 2)]] for levels in (alpha, sigma))

    def denoised(y: Tensor, k: int) -> Tensor:
        x = alpha[k] * y
        m = toy_model(x, torch.tensor(t[k]))
        x0 = {"epsilon": (x - sigma[k] * m) / alpha[k], "v": alpha[k] * x - sigma[k] * m, "x0": m}[prediction]
        return x0 if clip is None else x0.clamp(-clip, clip)

    y, r = start().double() / alpha[0], sigma / alpha
    for k in range(10):
        slope = (y - denoised(y, k)) / r[k]
        moved = y + (r[k + 1] - r[k]) * slope
        if k < 9:
            slope = (slope + (moved - denoised(moved, k + 1)) / r[k + 1]) / 2
        y = y + (r[k + 1] - r[k]) * slope
    got = sampler(toy_model, start().double(), model_dtype=torch.float64)
    assert (got - y).abs().max() <= 1e-12 * y.abs().max()


def test_a_flow_step_adds_the_velocity() -> None:
    table = Euler(prediction="flow", steps=9, shift=3.0).table
    sigma = np.append(table.t.astype(np.float64) / 1000, 0.0)
    # x' = x + (sigma' - sigma) m, once x0 is folded in; t is rounded to float32, 6e-8 of it.
    np.testing.assert_allclose(table.a + table.b * table.p, 1.0, rtol=1e-15)
    np.testing.assert_allclose(table.b * table.q + table.d, np.diff(sigma), rtol=0, atol=1e-7)
    np.testing.assert_allclose(table.alpha + table.sigma, 1.0, rtol=1e-15)
    assert (table.sigma[0], table.sigma[-1]) == (1.0, 0.0)


def test_a_straight_flow_is_exact_in_one_step(backend: str) -> None:
    """x_sigma = (1 - sigma) x0 + sigma z with constant x0 has the velocity (x - x0)/sigma."""
    data = torch.full((2, 3), 0.75)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return (x - data) / (t / 1000).view(-1, 1)

    for steps in (1, 7):
        for sample in (euler, euler_ancestral, heun):
            got = sample(model, (2, 3), steps=steps, prediction="flow", shift=2.0, seed=1, backend=backend)
            # At the last level, sigma = 0.002, the model divides the rounding of x by sigma, the step multiplies it.
            assert (got - data).abs().max() < 1e-6


def test_heun_rows() -> None:
    sampler = Heun(SCHEDULE, timesteps=[900, 500, 100])
    table = sampler.table
    assert table.t.tolist() == [900, 500, 500, 100, 100]
    np.testing.assert_allclose(table.alpha**2, [*SCHEDULE.alphas_cumprod[[900, 500, 500, 100, 100]], 1.0], rtol=1e-15)
    assert (table.c1 != 0).tolist() == [False, True, False, True, False]
    assert table.history == 1 and not any(table.stochastic)
    seen: list[tuple[int, float]] = []
    sampler(toy_model, (1, 2), callback=lambda step: seen.append((step.index, step.t)))
    assert seen == list(enumerate(table.t.tolist()))
    assert len(Heun(SCHEDULE, steps=1).table) == 1


def test_heun_starts_at_whole_steps() -> None:
    for strength in (0.3, 0.35, 0.5, 1.0):
        seen: list[int] = []
        got = heun(
            toy_model, start(), steps=10, strength=strength, callback=lambda step, at=seen: at.append(step.index)
        )
        assert got.isfinite().all() and seen[0] % 2 == 0 and seen[-1] == 18
    with pytest.raises(ValueError, match="cannot start at row 3"):
        heun(toy_model, start(), steps=10, start_step=3)
    rest = Heun(SCHEDULE, timesteps=[500, 100])(toy_model, start())
    assert torch.equal(Heun(SCHEDULE, timesteps=[900, 500, 100])(toy_model, start(), start_step=2), rest)


# Levels


def test_whole_times_given_as_numbers_with_a_point_stay_whole() -> None:
    assert Euler(SCHEDULE, timesteps=[9.0, 900.0]).table == Euler(SCHEDULE, timesteps=[900, 9]).table
    fractional = Euler(SCHEDULE, timesteps=[9.0, 900.5])
    assert fractional.table.t.dtype == np.float32 and fractional.timesteps == (900.5, 9.0)


# Arguments


def test_samplers_are_reusable_values() -> None:
    for solver, function in ((Euler, euler), (EulerAncestral, euler_ancestral), (Heun, heun)):
        sampler = solver(Schedule.linear(), steps=5)
        first = sampler(toy_model, (2, 3), seed=4)
        assert torch.equal(first, sampler(toy_model, (2, 3), seed=4))
        assert torch.equal(first, function(toy_model, (2, 3), steps=5, seed=4))
        assert sampler == solver(Schedule.linear(), steps=5)
        assert hash(solver(SCHEDULE, timesteps=iter([9, 5]))) == hash(solver(SCHEDULE, timesteps=[5, 9]))
        with pytest.raises(AttributeError):
            sampler.steps = 9  # type: ignore[misc]
    assert Euler(SCHEDULE, steps=5) != EulerAncestral(SCHEDULE, steps=5)


@pytest.mark.filterwarnings("error")
def test_zero_terminal_snr(backend: str) -> None:
    """From alpha bar 0 Euler works in whole timesteps, Heun's ratio sigma / alpha has no value there."""
    schedule = SCHEDULE.rescale_zero_terminal_snr()
    options = {"schedule": schedule, "steps": 10, "prediction": "v", "backend": backend}
    assert euler(toy_model, start(), timesteps="trailing", **options).isfinite().all()
    assert torch.equal(euler(toy_model, start(), **options), euler(toy_model, start(), timesteps="trailing", **options))
    assert euler_ancestral(toy_model, start(), timesteps="trailing", **options).isfinite().all()
    with pytest.raises(ValueError, match=r"alpha bar is 0.*trailing"):
        euler(toy_model, start(), timesteps="linspace", **options)
    with pytest.raises(ValueError, match="Heun's method cannot start where alpha bar is 0"):
        heun(toy_model, start(), timesteps="trailing", **options)


def test_levels_without_noise_are_refused_but_at_the_end() -> None:
    schedule = Schedule.from_alphas_cumprod([1.0, 0.5, 0.1])
    with pytest.raises(ValueError, match="sigma is 0"):
        Heun(schedule, timesteps=[2, 1, 0])
    with pytest.raises(ValueError, match="alpha bar is 1: timestep 0 has no noise"):
        Euler(schedule, timesteps="karras")
    with pytest.raises(ValueError, match="spacing must be karras or log_snr"):
        spaced_levels(SCHEDULE, "exponential", 5)
    with pytest.raises(ValueError, match="clip must be positive"):
        Heun(SCHEDULE, clip=-1.0)


@pytest.mark.parametrize("make", [Heun, DPMSolver])
def test_of_several_mistakes_a_wrong_clip_is_the_first_that_is_told(make: type[Heun | DPMSolver]) -> None:
    with pytest.raises(ValueError, match="clip must be positive"):
        make(SCHEDULE, prediction="zz", clip=-1.0)
    with pytest.raises(ValueError, match="clip must be positive"):
        make(Schedule.from_alphas_cumprod([1.0, 0.5, 0.1]), timesteps=[2, 1, 0], clip=-1.0)


@pytest.mark.parametrize("function", [euler, euler_ancestral, heun], ids=lambda f: f.__name__)
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"steps": 0}, ValueError, "steps must be at least 1, got 0", id="no-steps"),
        pytest.param({"steps": 2.5}, TypeError, "steps must be an int, got 2.5", id="steps-fractional"),
        pytest.param({"steps": True}, TypeError, "steps must be an int, got True", id="steps-bool"),
        pytest.param({"steps": 1001, "timesteps": "leading"}, ValueError, r"\[1, 1000\]", id="steps-above-T"),
        pytest.param({"timesteps": "uniform"}, ValueError, "no spacing", id="unknown-spacing"),
        pytest.param(
            {"timesteps": [999.5, 3.0]}, ValueError, r"must lie in \[0, 999\], got 3.0 .. 999.5", id="outside"
        ),
        pytest.param({"timesteps": [5.5, 5.5]}, ValueError, "timestep 5.5 occurs twice", id="twice"),
        pytest.param({"timesteps": []}, ValueError, "non-empty list", id="no-times"),
        pytest.param({"timesteps": [math.nan]}, ValueError, "finite numbers", id="nan-time"),
        pytest.param({"timesteps": 50}, TypeError, "spacing's name or the times", id="timesteps-number"),
        pytest.param({"timesteps": ["a"]}, TypeError, "spacing's name or the times", id="timesteps-strings"),
        pytest.param({"prediction": "score"}, ValueError, "epsilon, v, x0", id="prediction"),
        pytest.param({"clip": math.nan}, ValueError, "clip", id="clip-nan"),
        pytest.param({"final_alpha_cumprod": 0.5}, ValueError, "final_alpha_cumprod", id="final-too-noisy"),
        pytest.param({"shift": 3.0}, ValueError, "shift is for prediction='flow' only, got 3.0", id="shift"),
        pytest.param({"shift": "3"}, TypeError, "shift must be a number", id="shift-string"),
        pytest.param({"schedule": 1000}, TypeError, "Schedule", id="schedule-type"),
        pytest.param({"prediction": "flow", "schedule": SCHEDULE}, ValueError, "neither schedule", id="flow-schedule"),
        pytest.param({"prediction": "flow", "final_alpha_cumprod": 0.9}, ValueError, "neither", id="flow-final"),
        pytest.param({"prediction": "flow", "shift": 0.0}, ValueError, "shift must be positive", id="flow-shift"),
        pytest.param(
            {"prediction": "flow", "timesteps": "leading"}, ValueError, "linspace, trailing", id="flow-leading"
        ),
        pytest.param({"prediction": "flow", "timesteps": [1001]}, ValueError, r"lie in \(0, 1000\]", id="flow-outside"),
        pytest.param({"prediction": "flow", "steps": 0}, ValueError, "steps must be at least 1", id="flow-no-steps"),
    ],
)
def test_bad_arguments_raise_before_the_model_is_called(
    function: Callable[..., Tensor], arguments: dict, error: type[Exception], message: str
) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model must not be called")

    with pytest.raises(error, match=message):
        function(model, (1, 3, 4), **arguments)
