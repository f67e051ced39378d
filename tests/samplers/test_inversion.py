"""DDIM inversion: improved-diffusion's and diffusers' encoders, and the way back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import Schedule, ddim, ops, zoo
from fastsample.samplers.inversion import DDIMInverse, ddim_invert
from support import diffusers_runs
from support.chains import CHAINS, diffusers_dummies, toy_model
from support.golden import golden

SCHEDULE = Schedule.linear()
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}


# Unclipped, as published.
@pytest.mark.filterwarnings("ignore:at t = 3999 x0 is")
@pytest.mark.parametrize(("name", "timesteps", "seed"), CHAINS)
def test_golden_chains(backend: str, name: str, timesteps: str, seed: int) -> None:
    """improved-diffusion's ddim_reverse_sample over all steps: within 1e-4 of the largest value, both in float32."""
    data = golden(name)
    got = ddim_invert(
        toy_model,
        torch.from_numpy(data["x0"]),
        convention="improved",
        schedule=Schedule.from_betas(data["betas"]),
        timesteps=timesteps,
        backend=backend,
    )
    want = data["ddim_reverse"]
    assert np.abs(got.numpy() - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    ("arguments", "beta_start", "total", "mean"),
    [
        pytest.param({}, 1e-4, 671.6816, 0.8746, id="no-noise"),
        pytest.param({"prediction": "v"}, 1e-4, 1394.2185, 1.8154, id="v"),
        pytest.param({}, 0.01, 539.9622, 0.7031, id="alpha-to-one"),
        pytest.param({"final_alpha_cumprod": 0.99}, 0.01, 542.6722, 0.7066, id="alpha-not-to-one"),
    ],
)
def test_published_full_loops(backend: str, arguments: dict, beta_start: float, total: float, mean: float) -> None:
    """The sums that diffusers' own DDIMInverse tests hold, with their tolerances."""
    x, model = diffusers_dummies()
    schedule = Schedule.linear(beta_start=beta_start)
    given = {"steps": 10, "timesteps": "leading", "clip": 1.0, **arguments}
    got = ddim_invert(model, x, schedule=schedule, backend=backend, **given)
    assert abs(got.abs().sum().item() - total) < 1e-2
    assert abs(got.abs().mean().item() - mean) < 1e-3


@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
@pytest.mark.parametrize(
    ("prediction", "to_one"),
    # An x0 model from clean data is refused, asserted on its own; diffusers divides by 0 there.
    [("epsilon", True), ("epsilon", False), ("v", True), ("v", False), ("x0", False)],
    ids=["epsilon-to-one", "epsilon", "v-to-one", "v", "x0"],
)
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 50), ("trailing", 20)], ids=["leading", "trailing"])
def test_the_live_diffusers(
    backend: str, spacing: str, steps: int, prediction: str, to_one: bool, clip: float | None
) -> None:
    """Whole chains, where T // N is the distance of neighbours."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMInverseScheduler(
        prediction_type=PREDICTIONS[prediction],
        clip_sample=clip is not None,
        set_alpha_to_one=to_one,
        timestep_spacing=spacing,
    )
    # Its float32 tables lose 1e-4 of sqrt(1 - alpha bar) near t = 0, by which an x0 model's epsilon is divided.
    scheduler.alphas_cumprod = torch.from_numpy(SCHEDULE.alphas_cumprod.copy())
    final = 1.0 if to_one else float(SCHEDULE.alphas_cumprod[0])
    scheduler.initial_alpha_cumprod = torch.tensor(final, dtype=torch.float64)
    scheduler.set_timesteps(steps)
    x = ops.randn((2, 3, 8, 8), seed=5)
    want = diffusers_runs.chain(scheduler, toy_model, x)
    got = ddim_invert(
        toy_model,
        x,
        steps=steps,
        timesteps=spacing,
        prediction=prediction,
        clip=clip,
        final_alpha_cumprod=final,
        backend=backend,
    )
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_the_levels() -> None:
    mirror = DDIMInverse(SCHEDULE, timesteps=[10, 500, 900]).table
    abar = SCHEDULE.alphas_cumprod[[10, 500, 900]]
    assert mirror.t.tolist() == [10, 500, 900] and mirror.alpha is not None and mirror.sigma is not None
    np.testing.assert_allclose(mirror.alpha, np.sqrt([1.0, *abar]), rtol=1e-15)
    np.testing.assert_allclose(mirror.sigma, np.sqrt([0.0, *(1 - abar)]), rtol=1e-15)
    improved = DDIMInverse(SCHEDULE, timesteps=[10, 500, 900], convention="improved").table
    assert improved.t.tolist() == [10, 500, 900] and improved.alpha is not None and improved.sigma is not None
    np.testing.assert_allclose(improved.alpha, np.sqrt([*abar, 0.0]), rtol=1e-15)
    np.testing.assert_allclose(improved.sigma, np.sqrt([*(1 - abar), 1.0]), rtol=1e-15)
    assert not any(mirror.stochastic + improved.stochastic)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_zero_terminal_snr(prediction: str) -> None:
    schedule = Schedule.scaled_linear().rescale_zero_terminal_snr()
    for convention, final in (("mirror", float(schedule.alphas_cumprod[0])), ("improved", 1.0)):
        table = DDIMInverse(
            schedule,
            steps=10,
            timesteps="trailing",
            prediction=prediction,
            convention=convention,
            final_alpha_cumprod=final,
        ).table
        assert np.isfinite(table.packed[:, :6]).all()


# The way back


def gaussian_model(x: Tensor, t: Tensor) -> Tensor:
    """The exact epsilon of data N(0.4, 0.5^2)."""
    abar = torch.from_numpy(SCHEDULE.alphas_cumprod.copy()).to(x.dtype)[t].view(-1, *[1] * (x.ndim - 1))
    return (1 - abar).sqrt() * (x - 0.4 * abar.sqrt()) / (0.25 * abar + 1 - abar)


def round_trip(model: Any, x0: Tensor, steps: int, convention: str = "mirror", **arguments: Any) -> float:
    noise = ddim_invert(model, x0, steps=steps, convention=convention, **arguments)
    return (ddim(model, noise, steps=steps, **arguments) - x0).abs().max().item()


def test_decoding_returns_with_first_order(backend: str) -> None:
    """Ten times the steps, about a tenth of the error."""
    x0 = 0.4 + 0.5 * ops.randn((2, 3, 8), seed=1)
    errors = [round_trip(gaussian_model, x0, steps, backend=backend) for steps in (10, 100, 1000)]
    assert errors[0] < 0.5 and errors[1] < 0.05 and errors[2] < 0.005, errors
    assert 5 < errors[0] / errors[1] < 20 and 5 < errors[1] / errors[2] < 20, errors


def test_the_other_convention_returns_too(backend: str) -> None:
    """Not as close: it takes the data for the level of t = 0, and its last row goes on to alpha bar 0."""
    x0 = 0.4 + 0.5 * ops.randn((2, 3, 8), seed=1)
    errors = [round_trip(gaussian_model, x0, steps, "improved", backend=backend) for steps in (10, 100, 1000)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.03, errors


def test_the_code_of_a_gaussian_is_its_standard_score() -> None:
    """The ODE of Gaussian data moves every value at a fixed score: x0 = 0.4 + 0.5 z comes from (nearly) z."""
    z = torch.linspace(-2, 2, 9).reshape(1, 9)
    noise = ddim_invert(gaussian_model, 0.4 + 0.5 * z, steps=1000)
    # First order in 1000 steps; alpha bar is 4e-5 at the end, which leaves 0.4 sqrt(4e-5) = 0.0025 of the mean.
    assert (noise - z).abs().max() < 0.01


@pytest.mark.parametrize("convention", ["mirror", "improved"])
def test_digits_return(convention: str) -> None:
    """The bundled model: images come back, if not by the noise they were made from, which a background of -1 hides."""
    model, three = zoo.digits(), {"model_kwargs": {"y": torch.tensor([3])}}
    # The nearer to pure noise the code lies, the less of it comes back.
    for timesteps, most in (("leading", 0.06), ("auto", 0.1)):
        common: dict[str, Any] = {"steps": 20, "timesteps": timesteps, **three}
        image = ddim(model, (1, 1, 28, 28), seed=2, **common)
        noise = ddim_invert(model, image, convention=convention, **common)
        error = (ddim(model, noise, **common) - image).abs().mean().item()
        assert error < most, "of a range of 2"


# The sampler


def test_the_function_is_the_sampler(backend: str) -> None:
    x0 = ops.randn((2, 3, 5), seed=3)
    sampler = DDIMInverse(SCHEDULE, steps=7)
    noise = sampler(toy_model, x0, backend=backend)
    assert torch.equal(noise, ddim_invert(toy_model, x0, steps=7, backend=backend))
    assert torch.equal(noise, [step.x for step in sampler.iterate(toy_model, x0, backend=backend)][-1])
    assert sampler.timesteps == "auto" and sampler == DDIMInverse(SCHEDULE, steps=7)


X0 = torch.zeros(1, 3, 4)


@pytest.mark.parametrize(
    ("x0", "arguments", "error", "message"),
    [
        pytest.param((1, 3, 4), {}, TypeError, "x0 must be a tensor.*got tuple", id="shape"),
        pytest.param(X0.int(), {}, TypeError, "floating-point", id="dtype"),
        pytest.param(X0, {"strength": 0.5}, ValueError, "strength adds noise", id="strength"),
        pytest.param(X0, {"convention": "ddim"}, ValueError, "mirror, improved, got 'ddim'", id="convention"),
        pytest.param(X0, {"prediction": "x0"}, ValueError, "final_alpha_cumprod=.*improved", id="x0-from-clean-data"),
        pytest.param(X0, {"prediction": "eps"}, ValueError, "prediction must be one of", id="prediction"),
        pytest.param(X0, {"final_alpha_cumprod": 0.5}, ValueError, "final_alpha_cumprod must lie", id="final"),
        pytest.param(X0, {"final_alpha_cumprod": None}, TypeError, "must be a number", id="final-type"),
        pytest.param(X0, {"clip": 0.0}, ValueError, "clip must be positive", id="clip"),
        pytest.param(X0, {"steps": 0}, ValueError, "steps", id="steps"),
    ],
)
def test_bad_arguments(x0: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ddim_invert(toy_model, x0, **arguments)
    if "strength" in arguments or not isinstance(x0, Tensor):
        with pytest.raises(error, match=message):
            DDIMInverse(SCHEDULE).iterate(toy_model, x0, **arguments)
