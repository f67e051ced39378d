"""Flow matching beside sampling: noise and velocity for training, inversion, interpolation and images as a start."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import (
    DDIM,
    Euler,
    EulerInverse,
    Schedule,
    add_noise,
    ddim_invert,
    euler,
    euler_invert,
    interpolate,
    ops,
    slerp,
    velocity,
)
from support.chains import toy_model

SHAPE = (4, 3, 5, 7)
TIMES = torch.tensor([0.0, 0.37, 612.5, 1000.0], dtype=torch.float64)
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x0, z = ops.randn((2, *SHAPE), seed=[3, 4]).to(dtype)
    return x0, z


# Noise and velocity


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_and_velocity_match_float64(dtype: torch.dtype) -> None:
    x0, z = inputs(dtype)
    s = TIMES.reshape(-1, 1, 1, 1) / 1000
    double, eps = (x0.double(), z.double()), torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for got, terms in (
        (add_noise(x0, TIMES, prediction="flow", noise=z), ((1 - s) * double[0], s * double[1])),
        (velocity(x0, z, TIMES, prediction="flow"), (-double[0], double[1])),
    ):
        want, size = terms[0] + terms[1], terms[0].abs() + terms[1].abs()
        assert got.dtype == dtype
        # Two coefficients, two products and a sum, half an eps each; then once to the dtype of the result.
        bound = 2.5 * eps * size + torch.finfo(dtype).eps / 2 * want.abs() + torch.finfo(dtype).tiny
        assert ((got.double() - want).abs() <= bound).all()


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_live_scale_noise(shift: float) -> None:
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(shift=shift)
    x0, z = inputs()
    for steps in (None, 28):  # as in training, and as in a pipeline
        if steps is not None:
            scheduler.set_timesteps(steps)
        t = scheduler.timesteps[[0, 5, 11, 27]]
        # Their float32 sigma is rounded a few times: 3e-7 of it, times numbers up to 4.
        torch.testing.assert_close(
            add_noise(x0, t, prediction="flow", noise=z), scheduler.scale_noise(x0, t, z), rtol=0, atol=3e-6
        )


@pytest.mark.parametrize(
    "t", [250, 250.0, np.float32(250), np.int64(250), torch.tensor(250), torch.full((4,), 250.0)], ids=repr
)
def test_times_are_numbers_or_one_per_sample(t: Any) -> None:
    x0, z = inputs(torch.float64)
    torch.testing.assert_close(add_noise(x0, t, prediction="flow", noise=z), 0.75 * x0 + 0.25 * z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32], ids=str)
def test_times_of_any_dtype_count_as_they_are(dtype: torch.dtype) -> None:
    x0, z = inputs()
    t = torch.tensor([1, 250, 612, 1000]).to(dtype)
    got = add_noise(x0, t, prediction="flow", noise=z)
    assert torch.equal(got, add_noise(x0, t.double(), prediction="flow", noise=z))


def test_the_ends_are_exact() -> None:
    x0, z = inputs()
    assert torch.equal(add_noise(x0, 0, prediction="flow", noise=z), x0)
    assert torch.equal(add_noise(x0, 1000, prediction="flow", noise=z), z)
    assert torch.equal(velocity(x0, z, 0, prediction="flow"), velocity(x0, z, 1000, prediction="flow"))


def test_a_seed_is_the_noise_of_a_sampler() -> None:
    x0, _ = inputs()
    noised = add_noise(x0, 1000, prediction="flow", seed=5)
    assert torch.equal(
        euler(toy_model, noised, steps=4, prediction="flow"),
        euler(toy_model, SHAPE, steps=4, prediction="flow", seed=5),
    )


def test_gradients() -> None:
    x0, z = (one[:, :, :2, :2].clone().requires_grad_() for one in inputs(torch.float64))
    assert torch.autograd.gradcheck(lambda a, b: add_noise(a, TIMES, prediction="flow", noise=b), (x0, z))
    assert torch.autograd.gradcheck(lambda a, b: velocity(a, b, TIMES, prediction="flow"), (x0, z))


def test_other_predictions_share_the_schedules_process() -> None:
    x0, z = inputs()
    for prediction in ("epsilon", "v", "x0"):
        got = add_noise(x0, 500, schedule=Schedule.linear(), prediction=prediction, noise=z)
        assert torch.equal(got, add_noise(x0, 500, schedule=Schedule.linear(), noise=z))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        pytest.param({"t": 1000.5}, ValueError, r"t .*\[0, 1000\], got 1000.5", id="t-high"),
        pytest.param({"t": torch.tensor([0.0, -1.0, 5.0, 1.0])}, ValueError, "t .*got -1", id="t-negative"),
        pytest.param({"t": float("nan")}, ValueError, "t .*got nan", id="t-nan"),
        pytest.param({"t": torch.zeros(3)}, ValueError, "t must be .*one per sample", id="t-count"),
        pytest.param({"t": torch.zeros(4, dtype=torch.bool)}, TypeError, "t must be a number", id="t-bool-tensor"),
        pytest.param({"t": True}, TypeError, "t must be a number", id="t-bool"),
        pytest.param({"t": "0.5"}, TypeError, "t must be a number", id="t-string"),
        pytest.param({"schedule": Schedule.linear()}, ValueError, "takes no schedule", id="schedule"),
        pytest.param({"prediction": "velocity"}, ValueError, "prediction must be", id="prediction"),
        pytest.param({"prediction": "v", "t": 5}, TypeError, "schedule must be", id="no-schedule"),
        pytest.param({"noise": torch.zeros(4, 3)}, ValueError, "noise must have", id="noise-shape"),
    ],
)
def test_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x0, z = inputs()
    good: dict[str, Any] = {"t": 5.0, "prediction": "flow", "noise": z}
    arguments = {**good, **change}
    with pytest.raises(error, match=message):
        add_noise(x0, **arguments)
    with pytest.raises(error, match=message):
        velocity(x0, arguments.pop("noise"), **arguments)


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_a_velocity_is_what_velocity_models_learn(prediction: str) -> None:
    x0, z = inputs()
    with pytest.raises(ValueError, match="prediction must be one of v, flow"):
        velocity(x0, z, 5, schedule=Schedule.linear(), prediction=prediction)


# Inversion

MEAN, DEVIATION = 0.4, 0.5


def gaussian_flow(x: Tensor, t: Tensor) -> Tensor:
    """The exact velocity E[z - x0 | x] of data N(MEAN, DEVIATION^2), whose ODE takes z to MEAN + DEVIATION z."""
    s = (t.double() / 1000).reshape(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    centred = x - (1 - s) * MEAN
    variance = ((1 - s) * DEVIATION) ** 2 + s**2
    return s * centred / variance - MEAN - (1 - s) * DEVIATION**2 * centred / variance


@pytest.mark.parametrize("convention", ["mirror", "improved"])
@pytest.mark.parametrize("timesteps", ["linspace", "trailing"])
def test_inversion_finds_the_noise_with_first_order(backend: str, timesteps: str, convention: str) -> None:
    z = ops.randn((2, 3, 5), seed=3)
    common: dict[str, Any] = dict(
        prediction="flow", shift=2.0, timesteps=timesteps, convention=convention, backend=backend
    )
    off = [
        float((euler_invert(gaussian_flow, MEAN + DEVIATION * z, steps=n, **common) - z).abs().max()) for n in (50, 100)
    ]
    # Of first order the error halves; the second order's share of it is some percent at 50 steps.
    assert off[1] < 0.05 and 1.8 < off[0] / off[1] < 2.2


@pytest.mark.parametrize("timesteps", ["linspace", "trailing", [900.0, 500.0, 30.5]], ids=str)
def test_the_round_trip_is_of_first_order(timesteps: Any) -> None:
    x0 = ops.randn((2, 3, 5), seed=3)
    common: dict[str, Any] = dict(prediction="flow", shift=3.0, timesteps=timesteps)

    def trip(steps: int) -> float:
        noise = euler_invert(gaussian_flow, x0, steps=steps, **common)
        return float((euler(gaussian_flow, noise, steps=steps, **common) - x0).abs().max())

    if isinstance(timesteps, str):
        assert 1.7 < trip(100) / trip(200) < 2.3
    else:
        assert EulerInverse(**common).table.t.tolist() == [30.5, 500.0, 900.0]


@pytest.mark.parametrize("convention", ["mirror", "improved"])
def test_inversion_in_float64(convention: str) -> None:
    """x' = x + (s' - s) m, with m at t' or at t: seven steps of float64 arithmetic on numbers of order 1."""
    x0 = ops.randn((2, 3, 5), seed=3).double()
    common: dict[str, Any] = dict(prediction="flow", steps=7, shift=3.0)
    s = [0.0, *(Euler(**common).table.sigma[:-1][::-1])]  # type: ignore[index]
    x = x0
    for k in range(7):
        x = x + (s[k + 1] - s[k]) * toy_model(x, torch.tensor(1000 * s[k + (convention == "mirror")]))
    got = euler_invert(toy_model, x0, convention=convention, model_dtype=torch.float64, **common)
    # The model is told float32 times.
    assert (got - x).abs().max() <= 1e-6 * x.abs().max()


def test_the_live_scheduler_with_inverted_sigmas() -> None:
    """FlowMatchEulerDiscreteScheduler(invert_sigmas=True), Mochi's: from 0 to 1 with the model where x is."""
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 12, 12))
    x0 = x = ops.randn((2, 3, 5), seed=3)
    for t in scheduler.timesteps:
        x = scheduler.step(toy_model(x, t.expand(2)), t, x).prev_sample
    sampler = EulerInverse(prediction="flow", steps=12, timesteps="trailing", convention="improved")
    np.testing.assert_allclose(sampler.table.t, scheduler.timesteps, rtol=0, atol=3e-4)
    assert (sampler(toy_model, x0) - x).abs().max() <= 1e-4 * x.abs().max()


def test_euler_inversion_on_a_schedule_is_that_of_ddim() -> None:
    x0 = ops.randn((2, 3, 5), seed=3)
    for convention in ("mirror", "improved"):
        common: dict[str, Any] = dict(timesteps=[900, 500, 20], convention=convention, clip=1.0)
        assert torch.equal(euler_invert(toy_model, x0, **common), ddim_invert(toy_model, x0, **common))
    karras = EulerInverse(Schedule.linear(), steps=5, timesteps="karras").table.t
    assert np.array_equal(karras, Euler(Schedule.linear(), steps=5, timesteps="karras").table.t[::-1])


def test_inversion_under_guidance_and_from_a_start() -> None:
    x0 = ops.randn((2, 3, 5), seed=3)
    common: dict[str, Any] = dict(steps=6, prediction="flow")
    states = [step.x.clone() for step in EulerInverse(**common).iterate(toy_model, x0)]
    assert torch.equal(euler_invert(toy_model, states[2], start_step=3, **common), states[-1])
    clipped = euler_invert(toy_model, x0, clip=0.3, **common)
    assert clipped.isfinite().all() and not torch.equal(clipped, states[-1])


@pytest.mark.parametrize(
    ("x0", "arguments", "error", "message"),
    [
        pytest.param((1, 3, 4), {}, TypeError, "x0 must be a tensor.*got tuple", id="shape"),
        pytest.param(torch.zeros(1, 3), {"strength": 0.5}, ValueError, "strength adds noise", id="strength"),
        pytest.param(torch.zeros(1, 3), {"convention": "ddim"}, ValueError, "mirror, improved, got", id="convention"),
        pytest.param(torch.zeros(1, 3), {"schedule": Schedule.linear()}, ValueError, "takes neither", id="schedule"),
        pytest.param(torch.zeros(1, 3), {"shift": 0.0}, ValueError, "shift must be", id="shift"),
        pytest.param(torch.zeros(1, 3), {"timesteps": "leading"}, ValueError, "timesteps of a flow", id="timesteps"),
    ],
)
def test_bad_arguments_of_inversion(x0: Any, arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        euler_invert(toy_model, x0, prediction="flow", **arguments)


def test_ddim_inversion_names_the_one_for_flows() -> None:
    with pytest.raises(ValueError, match=r"prediction='flow'.*fastsample\.euler_invert"):
        ddim_invert(toy_model, torch.zeros(1, 3), prediction="flow")


# Interpolation


def test_interpolation_between_flow_samples(backend: str) -> None:
    a, b = ops.randn((2, 3, 5, 4), seed=[1, 2]).split(1)
    sampler = Euler(prediction="flow", steps=5, shift=3.0)
    got = interpolate(gaussian_flow, a, b, 3, sampler=sampler, backend=backend)
    half = slerp(a, b, [0.0, 0.5, 1.0])
    torch.testing.assert_close(got, sampler(gaussian_flow, half, backend=backend))
    assert not torch.allclose(got, interpolate(gaussian_flow, a, b, 3, sampler=DDIM(Schedule.linear(), steps=5)))
