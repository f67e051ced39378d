"""DDPM: tables and chains against improved-diffusion, chains against the live diffusers, the moments of samples."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import Schedule, Table, ops
from fastsample.samplers.ddpm import DDPM, ddpm
from fastsample.samplers.limits import DynamicThreshold
from support import diffusers_runs
from support.chains import CHAINS, golden_noise, learned_model, toy_model
from support.golden import golden

NAMES = [(chain.values[0], chain.values[1]) for chain in CHAINS]


def golden_table(name: str, timesteps: str, **arguments: Any) -> Table:
    return DDPM(Schedule.from_betas(golden(name)["betas"]), timesteps=timesteps, **arguments).table


# Tables


# Unclipped, as published.
@pytest.mark.filterwarnings("ignore:at t = 3999 x0 is")
@pytest.mark.parametrize(("name", "timesteps"), NAMES, ids=[name for name, _ in NAMES])
def test_golden_tables(name: str, timesteps: str) -> None:
    """improved-diffusion's own tables are float64: within 1e-12 of them, ascending there and descending here."""
    data = golden(name)
    table = golden_table(name, timesteps)
    np.testing.assert_array_equal(table.t[::-1], data["timesteps"])
    np.testing.assert_allclose(table.b[::-1], data["posterior_mean_coef1"], rtol=1e-12)
    np.testing.assert_allclose(table.a[::-1], data["posterior_mean_coef2"], rtol=1e-12)
    smallest, largest = data["posterior_log_variance_clipped"], np.log(data["spaced_betas"])
    np.testing.assert_allclose(2 * table.g0[::-1], smallest, rtol=1e-12)
    np.testing.assert_allclose(np.exp(2 * table.g0[-2::-1]), data["posterior_variance"][1:], rtol=1e-12)
    learned = golden_table(name, timesteps, variance="learned_range")
    np.testing.assert_allclose(2 * (learned.g0 - learned.g1)[::-1], smallest, rtol=1e-12)
    np.testing.assert_allclose(2 * (learned.g0 + learned.g1)[::-1], largest, rtol=1e-12)
    large = golden_table(name, timesteps, variance="fixed_large")
    np.testing.assert_allclose(2 * large.g0[::-1], [smallest[0], *largest[1:]], rtol=1e-12)


def test_the_rows_of_every_variance() -> None:
    schedule = Schedule.linear(100)
    for variance in ("fixed_small", "fixed_large", "learned", "learned_range"):
        table = DDPM(schedule, steps=10, variance=variance).table
        assert table.s.tolist() == [1.0] * 9 + [0.0], "s is 1 where noise is added"
        assert table.stochastic == (True,) * 9 + (False,)
        assert table.learned == (variance.startswith("learned"),) * 10
    learned = DDPM(schedule, steps=10, variance="learned").table
    assert (learned.g0 == 0).all() and (learned.g1 == 0.5).all()


def test_published_variances() -> None:
    """DDPMScheduler's own tests: variances at timesteps of the full process, printed with five digits."""
    table = DDPM(Schedule.linear()).table
    for t, variance in ((487, 0.00979), (999, 0.02)):
        assert math.exp(2 * table.g0[999 - t]) == pytest.approx(variance, abs=1e-5)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned", "learned_range"])
@pytest.mark.parametrize("timesteps", [[0], [999]], ids=["clean-end", "noisy-end"])
def test_one_step(backend: str, variance: str, timesteps: list[int]) -> None:
    """The only row is the last: the posterior given x0 is x0 itself, and its log variance beta's."""
    schedule = Schedule.linear()
    sampler = DDPM(schedule, timesteps=timesteps, variance=variance)
    x = ops.randn((2, 3, 4), seed=1)
    got = sampler(learned_model, x, backend=backend)
    abar = schedule.alphas_cumprod[timesteps[0]]
    x0 = (x.double() - math.sqrt(1 - abar) * toy_model(x.double(), torch.tensor(timesteps))) / math.sqrt(abar)
    assert (got - x0).abs().max() <= 1e-6 * x0.abs().max()
    if variance != "learned":
        assert sampler.table.g0[0] == pytest.approx(math.log(1 - abar) / 2, rel=1e-12)
        assert sampler.table.g1[0] == 0


def test_zero_terminal_snr() -> None:
    schedule = Schedule.scaled_linear().rescale_zero_terminal_snr()
    assert ddpm(toy_model, (1, 3, 4), schedule=schedule, steps=10, prediction="v").isfinite().all()
    with pytest.raises(ValueError, match="alpha bar is 0"):
        DDPM(schedule, steps=10)
    with pytest.raises(ValueError, match="alpha bar is 1: leave that timestep out"):
        DDPM(Schedule.from_alphas_cumprod([1.0, 0.5, 0.1]))


# Chains


# Unclipped, as published.
@pytest.mark.filterwarnings("ignore:at t = 3999 x0 is")
@pytest.mark.parametrize(("name", "timesteps", "seed"), CHAINS)
@pytest.mark.parametrize(
    ("variance", "clip"), [("fixed_small", 1.0), ("learned_range", 1.0), ("learned_range", None)], ids=str
)
def test_golden_chains(backend: str, name: str, timesteps: str, seed: int, variance: str, clip: float | None) -> None:
    """Within 1e-4 of the largest value: both sides round every one of up to 100 steps in float32."""
    data = golden(name)
    x = torch.from_numpy(data["x_T"])
    got = ddpm(
        toy_model if variance == "fixed_small" else learned_model,
        x,
        schedule=Schedule.from_betas(data["betas"]),
        timesteps=timesteps,
        variance=variance,
        clip=clip,
        noise=lambda k: golden_noise(seed, k + 1, x.shape),
        backend=backend,
    )
    want = data[f"ddpm_{variance.removesuffix('_range')}" + ("_clip" if clip else "")]
    assert np.abs(got.numpy() - want).max() <= 1e-4 * np.abs(want).max()


@functools.cache
def live_chain(variance: str, prediction: str, steps: int) -> Tensor:
    """What diffusers makes of the noise of seed 5, the same for every backend of ours."""
    diffusers = pytest.importorskip("diffusers")
    names = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
    scheduler = diffusers.DDPMScheduler(variance_type=variance, prediction_type=names[prediction])
    scheduler.set_timesteps(steps)
    return diffusers_runs.chain(scheduler, model_for(variance), ops.randn((2, 3, 8, 8), seed=5))


def model_for(variance: str) -> Callable[[Tensor, Tensor], Tensor]:
    return learned_model if variance == "learned_range" else toy_model


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_live_diffusers(backend: str, variance: str, prediction: str) -> None:
    """250 steps. diffusers' tables are float32, which costs 1 - alpha bar up to 1.7e-4 near t = 0."""
    want, model = live_chain(variance, prediction, 250), model_for(variance)
    x = ops.randn((2, 3, 8, 8), seed=5)
    got = ddpm(
        model,
        x,
        steps=250,
        timesteps="leading",
        variance=variance,
        prediction=prediction,
        clip=1.0,
        seed=5,
        backend=backend,
    )
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_live_diffusers_on_all_timesteps(variance: str) -> None:
    want = live_chain(variance, "epsilon", 1000)
    got = ddpm(model_for(variance), ops.randn((2, 3, 8, 8), seed=5), variance=variance, clip=1.0, seed=5)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_the_live_diffusers_with_thresholding(backend: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=3.0)
    scheduler.set_timesteps(50)
    x = ops.randn((2, 3, 8, 8), seed=5)
    want = diffusers_runs.chain(scheduler, toy_model, x)
    clip = DynamicThreshold(0.9, max=3.0)
    got = ddpm(toy_model, x, steps=50, timesteps="leading", clip=clip, seed=5, backend=backend)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_learned_log_variance(backend: str) -> None:
    """ "learned" has no working peer (diffusers takes the root of the raw output): a loop in float64."""
    schedule = Schedule.linear(100)

    def model(x: Tensor, t: Tensor) -> Tensor:
        return torch.cat((toy_model(x, t), -3 + torch.cos(1.7 * x)), dim=1)

    x = ops.randn((2, 3, 5), seed=7)
    state, times = x.double(), list(range(99, -1, -1))
    for k, t in enumerate(times):
        now, then = schedule.alphas_cumprod[t], schedule.alphas_cumprod[t - 1] if t else 1.0
        epsilon, v = model(state, torch.full((2,), t)).chunk(2, dim=1)
        x0 = (state - math.sqrt(1 - now) * epsilon) / math.sqrt(now)
        beta = 1 - now / then
        mean = (math.sqrt(then) * beta * x0 + math.sqrt(1 - beta) * (1 - then) * state) / (1 - now)
        state = mean + (torch.exp(v / 2) * diffusers_runs.step_noise(k, x.shape, 7).double() if t else 0)
    got = ddpm(model, x, schedule=schedule, variance="learned", seed=7, backend=backend)
    # 100 steps of a few float32 roundings each.
    assert (got - state).abs().max() <= 1e-5 * state.abs().max()


def test_samples_of_a_gaussian_have_its_moments() -> None:
    """Data N(0.5, 0.3^2), whose exact epsilon is known: all 1000 ancestral steps give it back.

    With n = 10000 the standard errors are 0.3 / sqrt(n) = 0.003 of the mean and 0.3 / sqrt(2 n) = 0.002 of the
    deviation; 1000 steps bias the latter by about 0.001 (fixed_large adds more noise than the posterior has).
    """
    schedule = Schedule.linear()
    abar = torch.from_numpy(schedule.alphas_cumprod.copy()).float()

    def model(x: Tensor, t: Tensor) -> Tensor:
        now = abar[t].view(-1, 1)
        return (1 - now).sqrt() * (x - now.sqrt() * 0.5) / (now * 0.3**2 + 1 - now)

    for variance in ("fixed_small", "fixed_large"):
        samples = ddpm(model, (2, 5000), schedule=schedule, variance=variance, seed=1)
        assert samples.mean().item() == pytest.approx(0.5, abs=0.012)
        assert samples.std().item() == pytest.approx(0.3, abs=0.009)


def test_a_correction_of_x0_comes_before_the_clip(backend: str) -> None:
    common: dict[str, Any] = dict(steps=20, clip=0.8, seed=2, backend=backend)
    plain = ddpm(toy_model, (2, 3, 5), **common)
    same = ddpm(toy_model, (2, 3, 5), correct_x0=lambda x0, t: x0.clone(), **common)
    # The correction costs a second pass, which rounds once more in each of 20 steps.
    assert (plain - same).abs().max() <= 1e-5
    assert (ddpm(toy_model, (2, 3, 5), correct_x0=lambda x0, t: 9 + 0 * x0, **common) == 0.8).all()


# The sampler


def test_steps_and_timesteps() -> None:
    schedule = Schedule.linear(60)
    assert DDPM(schedule).steps == 60 and DDPM(schedule) == DDPM(schedule, steps=60)
    assert DDPM(schedule).table.t.tolist() == list(range(59, -1, -1))
    spaced = DDPM(Schedule.linear(), steps=25).table.t
    assert spaced.tolist() == DDPM(Schedule.linear(), timesteps="25").table.t.tolist() and spaced[1] == 957
    assert DDPM(schedule, timesteps=[3, 50]).timesteps == (50, 3)


def test_the_function_is_the_sampler(backend: str) -> None:
    arguments: dict[str, Any] = dict(steps=7, variance="learned_range", clip=1.0)
    sampler = DDPM(Schedule.linear(), **arguments)
    one = sampler(learned_model, (2, 3, 5), seed=3, backend=backend)
    assert torch.equal(one, ddpm(learned_model, (2, 3, 5), seed=3, backend=backend, **arguments))
    assert torch.equal(one, [step.x for step in sampler.iterate(learned_model, (2, 3, 5), seed=3, backend=backend)][-1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"variance": "small"}, ValueError, "fixed_small, fixed_large.*got 'small'", id="variance"),
        pytest.param({"prediction": "eps"}, ValueError, "prediction must be one of", id="prediction"),
        pytest.param({"steps": 0}, ValueError, "steps", id="no-steps"),
        pytest.param({"steps": 1001}, ValueError, "steps", id="too-many"),
        pytest.param({"clip": -1.0}, ValueError, "clip must be positive", id="clip"),
        pytest.param({"schedule": "linear"}, TypeError, "Schedule", id="schedule"),
        pytest.param({"variance": "learned_range"}, ValueError, "twice|channels", id="no-variance-half"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ddpm(toy_model, (1, 3, 4), **arguments)


def test_the_schedule_must_be_one() -> None:
    with pytest.raises(TypeError, match=r"fastsample\.Schedule, got int"):
        DDPM(1000)  # type: ignore[arg-type]


def test_the_table_by_hand() -> None:
    """abar 0.2 -> 0.5 -> 1: beta = 0.6, beta_tilde = 0.6 * 0.5 / 0.8 = 0.375."""
    table = DDPM(Schedule.from_alphas_cumprod([0.5, 0.2]), prediction="x0").table
    np.testing.assert_allclose(table.a, [math.sqrt(0.4) * 0.5 / 0.8, 0.0], rtol=1e-15)
    np.testing.assert_allclose(table.b, [math.sqrt(0.5) * 0.6 / 0.8, 1.0], rtol=1e-15)
    np.testing.assert_allclose(table.g0, [math.log(0.375) / 2] * 2, rtol=1e-15)
    np.testing.assert_allclose(table.alpha, np.sqrt([0.2, 0.5, 1.0]))
    np.testing.assert_allclose(table.sigma, np.sqrt([0.8, 0.5, 0.0]))
