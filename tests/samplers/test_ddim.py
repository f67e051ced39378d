"""DDIM: chains against improved-diffusion and diffusers, noise, and bad arguments."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import DDIM, Schedule, ddim, ops
from support.chains import CHAINS, diffusers_dummies, golden_noise, toy_model
from support.golden import golden


@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(("name", "timesteps", "seed"), CHAINS)
def test_golden_chains(backend: str, name: str, timesteps: str, seed: int, eta: float, clip: float | None) -> None:
    """Within 1e-4 of the largest value: both sides round every one of up to 100 steps in float32."""
    data = golden(name)
    x = torch.from_numpy(data["x_T"])
    got = ddim(
        toy_model,
        x,
        schedule=Schedule.from_betas(data["betas"]),
        timesteps=timesteps,
        eta=eta,
        clip=clip,
        noise=lambda k: golden_noise(seed, k + 1, x.shape),
        backend=backend,
    )
    want = data[f"ddim_eta{eta}" + ("_clip" if clip else "")]
    assert np.abs(got.numpy() - want).max() <= 1e-4 * np.abs(want).max()


@pytest.mark.parametrize(
    ("arguments", "beta_start", "total", "mean"),
    [
        pytest.param({}, 1e-4, 172.0067, 0.223967, id="no-noise"),
        pytest.param({"prediction": "v"}, 1e-4, 52.5302, 0.0684, id="v"),
        pytest.param({}, 0.01, 149.8295, 0.1951, id="alpha-to-one"),
        pytest.param({"final_alpha_cumprod": 0.99}, 0.01, 149.0784, 0.1941, id="alpha-not-to-one"),
    ],
)
def test_diffusers_full_loops(backend: str, arguments: dict, beta_start: float, total: float, mean: float) -> None:
    """The sums that diffusers' own DDIM tests hold, with their tolerances."""
    x, model = diffusers_dummies()
    schedule = Schedule.linear(beta_start=beta_start)
    got = ddim(
        model,
        x,
        schedule=schedule,
        steps=10,
        timesteps="leading",
        clip=1.0,
        rederive_epsilon=False,
        backend=backend,
        **arguments,
    )
    assert abs(got.abs().sum().item() - total) < 1e-2
    assert abs(got.abs().mean().item() - mean) < 1e-3


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
@pytest.mark.parametrize("clip", [None, 0.7], ids=["free", "clip"])
@pytest.mark.parametrize("rederive", [True, False], ids=["rederived", "kept"])
def test_matches_a_float64_loop(backend: str, prediction: str, clip: float | None, rederive: bool) -> None:
    """Against the textbook loop in float64, for every prediction; 20 float32 steps lose less than 1e-4."""
    schedule, steps, eta = Schedule.cosine(100), 20, 0.4
    x = ops.randn((2, 3, 5), seed=1)
    noise = [ops.randn(x.shape, seed=1, step=k, stream=1) for k in range(steps)]

    state = x.double()
    times = np.arange(steps)[::-1] * 5
    for k, t in enumerate(times):
        a = schedule.alphas_cumprod[t]
        b = schedule.alphas_cumprod[times[k + 1]] if k + 1 < steps else 1.0
        m = toy_model(state, torch.full((2,), int(t)))
        root, spread = math.sqrt(a), math.sqrt(1 - a)
        if prediction == "epsilon":
            epsilon, x0 = m, (state - spread * m) / root
        elif prediction == "v":
            epsilon, x0 = root * m + spread * state, root * state - spread * m
        else:
            epsilon, x0 = (state - root * m) / spread, m
        if clip:
            x0 = x0.clamp(-clip, clip)
            if rederive:
                epsilon = (state - root * x0) / spread
        sigma = eta * math.sqrt((1 - b) / (1 - a) * (1 - a / b))
        state = math.sqrt(b) * x0 + math.sqrt(1 - b - sigma**2) * epsilon + sigma * noise[k].double()

    got = ddim(
        toy_model,
        x,
        schedule=schedule,
        steps=steps,
        timesteps="leading",
        eta=eta,
        prediction=prediction,
        clip=clip,
        rederive_epsilon=rederive,
        noise=lambda k: noise[k],
        backend=backend,
    )
    assert (got - state).abs().max() <= 1e-4 * state.abs().max()


@pytest.mark.parametrize("shape", [(3, 2, 5), (1, 16, 7), (4, 3, 33, 31)], ids=str)
@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
def test_noise_inside_the_step_equals_noise_given(backend: str, shape: tuple[int, ...], clip: float | None) -> None:
    common = dict(steps=12, eta=1.0, clip=clip, backend=backend)
    inside = ddim(toy_model, shape, seed=77, **common)
    given = ddim(
        toy_model,
        ops.randn(shape, seed=77, backend=backend),
        noise=lambda k: ops.randn(shape, seed=77, step=k, stream=1, backend=backend),
        **common,
    )
    assert torch.equal(inside, given)


def test_a_sample_does_not_depend_on_its_batch(backend: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        return x * 0.5  # exact, so the model adds no rounding of its own

    together = ddim(model, (5, 3, 7), steps=8, eta=0.8, seed=10, backend=backend)
    alone = [ddim(model, (1, 3, 7), steps=8, eta=0.8, seed=10, index=i, backend=backend) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_every_backend_gives_the_same_picture(backend: str) -> None:
    got = ddim(toy_model, (2, 3, 9), steps=20, eta=1.0, seed=3, backend=backend)
    want = ddim(toy_model, (2, 3, 9), steps=20, eta=1.0, seed=3, backend="reference")
    assert (got - want).abs().max() < 1e-5 * want.abs().max()


def test_zero_terminal_snr(backend: str) -> None:
    """alpha bar 0 at the first timestep: v and x0 models work, with noise too."""
    schedule = Schedule.scaled_linear().rescale_zero_terminal_snr()
    for prediction in ("v", "x0"):
        for eta in (0.0, 1.0):
            got = ddim(
                toy_model,
                (1, 3, 4),
                schedule=schedule,
                steps=10,
                timesteps="trailing",
                prediction=prediction,
                eta=eta,
                backend=backend,
            )
            assert got.isfinite().all()


def test_one_step_and_all_steps(backend: str) -> None:
    assert ddim(toy_model, (1, 2), steps=1, backend=backend).isfinite().all()
    assert ddim(toy_model, (1, 2), steps=1000, eta=1.0, backend=backend).isfinite().all()


def test_sampler_is_immutable_and_reusable() -> None:
    sampler = DDIM(Schedule.linear(), steps=5, eta=0.5)
    with pytest.raises(AttributeError):
        sampler.eta = 1.0  # type: ignore[misc]
    first = sampler(toy_model, (2, 3), seed=4)
    assert torch.equal(first, sampler(toy_model, (2, 3), seed=4))
    assert torch.equal(first, ddim(toy_model, (2, 3), steps=5, eta=0.5, seed=4))
    listed = DDIM(Schedule.linear(), timesteps=iter([9, 5]))
    assert listed.timesteps == (9, 5) and hash(listed) == hash(DDIM(Schedule.linear(), timesteps=[5, 9]))
    with pytest.raises(TypeError, match="Schedule"):
        DDIM(1000)  # type: ignore[arg-type]
    assert "steps=5" in repr(sampler) and sampler == DDIM(Schedule.linear(), steps=5, eta=0.5)


NAN_BETAS = np.full(10, np.nan)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"steps": 1001}, ValueError, r"\[1, 1000\]", id="steps-above-T"),
        pytest.param({"steps": 0}, ValueError, "steps", id="no-steps"),
        pytest.param({"timesteps": "ddim64"}, ValueError, "ddim63.*ddim67|ddim67.*ddim63", id="ddim64"),
        pytest.param({"timesteps": "uniform"}, ValueError, "no spacing", id="unknown-spacing"),
        pytest.param({"eta": 3.0}, ValueError, "largest valid eta", id="eta-too-large"),
        pytest.param({"eta": -0.1}, ValueError, "eta", id="eta-negative"),
        pytest.param({"eta": math.nan}, ValueError, "eta", id="eta-nan"),
        pytest.param({"eta": "1"}, TypeError, "eta must be a number", id="eta-string"),
        pytest.param({"clip": (1, -1)}, ValueError, "low <= high", id="clip-pair"),
        pytest.param({"timesteps": 50}, TypeError, "timesteps", id="timesteps-number"),
        pytest.param({"seed": "abc"}, TypeError, "seed", id="seed-string"),
        pytest.param({"prediction": "score"}, ValueError, "epsilon, v, x0", id="prediction"),
        pytest.param({"clip": 0.0}, ValueError, "clip", id="clip-zero"),
        pytest.param({"clip": math.nan}, ValueError, "clip", id="clip-nan"),
        pytest.param({"final_alpha_cumprod": 0.5}, ValueError, "final_alpha_cumprod", id="final-too-noisy"),
        pytest.param({"final_alpha_cumprod": 1.5}, ValueError, "final_alpha_cumprod", id="final-above-1"),
        pytest.param({"schedule": "linear"}, TypeError, "Schedule", id="schedule-type"),
        pytest.param(
            {"schedule": Schedule.linear().rescale_zero_terminal_snr(), "timesteps": [999, 0]},
            ValueError,
            "alpha bar is 0",
            id="epsilon-at-zero-snr",
        ),
    ],
)
def test_bad_arguments_raise_before_the_model_is_called(arguments: dict, error: type[Exception], message: str) -> None:
    def model(x: Tensor, t: Tensor) -> Tensor:
        raise AssertionError("the model must not be called")

    with pytest.raises(error, match=message):
        ddim(model, (1, 3, 4), **arguments)
