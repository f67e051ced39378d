"""Consistency sampling: diffusers' published sum and whole chains against its live scheduler."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import ops
from fastsample.samplers.consistency import Consistency, consistency
from fastsample.times.continuous import karras_sigmas
from support import diffusers_runs
from support.chains import diffusers_dummies, toy_model


def test_published_one_step(backend: str) -> None:
    """test_scheduler_consistency_model.py, with its tolerances."""
    x, model = diffusers_dummies()
    got = consistency(model, x * 80, backend=backend)
    assert abs(got.abs().sum().item() - 192.7614) < 1e-2
    assert abs(got.abs().mean().item() - 0.2510) < 1e-3


@pytest.mark.parametrize("clip", [None, 1.0], ids=["free", "clip"])
@pytest.mark.parametrize(
    ("T", "indices"),
    [(40, [0]), (40, [0, 22]), (201, [0, 20, 106, 150]), (40, list(range(40)))],
    ids=["one", "two", "four", "all"],
)
def test_the_live_diffusers(backend: str, T: int, indices: list[int], clip: float | None) -> None:
    """Whole chains; its sigmas are float32 and its times float64, which moves toy_model's sin(0.013 t) by 1e-6."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.CMStochasticIterativeScheduler(num_train_timesteps=T, clip_denoised=clip is not None)
    scheduler.set_timesteps(timesteps=indices[::-1])
    x = ops.randn((2, 3, 8, 8), seed=5) * 80
    want = diffusers_runs.chain(scheduler, toy_model, x)
    sigmas = karras_sigmas(80.0, 0.002, T)[indices]
    got = consistency(toy_model, x, sigmas=sigmas, clip=clip, seed=5, backend=backend)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_published_scalings() -> None:
    """(c_skip, c_out) of consistency_models at sigma 80 and 0.002."""
    table = Consistency(sigmas=np.array([80.0, 0.002])).table
    np.testing.assert_allclose(table.p, [3.906e-5, 1.0], rtol=1e-3)
    np.testing.assert_allclose(table.q, [0.499978, 0.0], rtol=1e-6)
    np.testing.assert_allclose(table.e, 1 / np.sqrt([80.0**2 + 0.25, 0.002**2 + 0.25]), rtol=1e-15)
    assert table.t.dtype == np.float32
    np.testing.assert_allclose(table.t, [250 * math.log(80), 250 * math.log(0.002)], rtol=1e-7)
    assert table.init_noise_sigma == 80.0 and table.stochastic == (False, False)
    np.testing.assert_array_equal(table.alpha, 1.0)
    np.testing.assert_array_equal(table.sigma, [80.0, 0.002, 0.0])


def test_published_levels() -> None:
    """launch.sh samples ImageNet 64 at ts 0,22,39 of 40: sigma 80, 1.38237 and the end, 0.002."""
    np.testing.assert_allclose(karras_sigmas(80.0, 0.002, 40)[[0, 22, 39]], [80.0, 1.38237, 0.002], rtol=1e-5)
    table = Consistency(sigmas=karras_sigmas(80.0, 0.002, 40)[[0, 22]]).table
    np.testing.assert_allclose(table.s, [math.sqrt(1.38237**2 - 0.002**2), 0.0], rtol=1e-5)


def test_noise_is_drawn_at_the_first_level(backend: str) -> None:
    seen = []

    def model(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x.clone(), t.clone()))
        return x

    consistency(model, (2, 3, 5), sigmas=[3.0, 1.0], seed=4, backend=backend)
    x, t = seen[0]
    z = ops.randn((2, 3, 5), seed=4)
    assert (x - z * 3 / math.sqrt(9.25)).abs().max() <= 1e-6, "the model is given c_in x"
    assert t.dtype == torch.float32 and t.shape == (2,) and t[0].item() == pytest.approx(250 * math.log(3), rel=1e-6)


def test_a_consistency_function_is_met_exactly(backend: str) -> None:
    """A network that makes x0 exact for the one sample 0.25 gives it back from any number of steps."""
    sigmas = karras_sigmas(80.0, 0.002, 20)[[0, 5, 10]]
    table = Consistency(sigmas=sigmas).table
    times = {round(float(t), 2): k for k, t in enumerate(table.t)}

    def model(scaled: Tensor, t: Tensor) -> Tensor:
        k = times[round(t[0].item(), 2)]
        return (0.25 - table.p[k] * scaled / table.e[k]) / table.q[k]

    got = consistency(model, (2, 3, 5), sigmas=sigmas, backend=backend)
    # At sigma 80 the model's own rounding, 1e-7 of x / 80, is all there is.
    assert (got - 0.25).abs().max() <= 1e-6


def test_the_function_is_the_sampler(backend: str) -> None:
    sampler = Consistency(sigmas=iter([80.0, 2.0]), clip=None)
    assert sampler.sigmas == (80.0, 2.0) and hash(sampler) == hash(Consistency(sigmas=(80, 2), clip=None))
    one = sampler(toy_model, (2, 3, 5), seed=3, backend=backend)
    assert torch.equal(one, consistency(toy_model, (2, 3, 5), sigmas=[80, 2], clip=None, seed=3, backend=backend))
    assert consistency(toy_model, (2, 3, 5), backend=backend).abs().max() <= 1, "clipped by default"


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"sigmas": [1.0, 80.0]}, ValueError, "strictly descend", id="ascending"),
        pytest.param({"sigmas": [80.0, 80.0]}, ValueError, "strictly descend", id="repeated"),
        pytest.param({"sigmas": []}, ValueError, "strictly descend", id="none"),
        pytest.param({"sigmas": [80.0, 0.001]}, ValueError, "not fall below sigma_min=0.002", id="too-small"),
        pytest.param({"sigmas": [math.inf]}, ValueError, "strictly descend", id="infinite"),
        pytest.param({"sigmas": [math.nan]}, ValueError, "strictly descend", id="nan"),
        pytest.param({"sigmas": 80.0}, TypeError, "sigmas must be a list of numbers, got 80.0", id="number"),
        pytest.param({"sigma_min": 0.0}, ValueError, "sigma_min must be positive", id="sigma-min"),
        pytest.param({"sigma_data": -1.0}, ValueError, "sigma_data must be positive", id="sigma-data"),
        pytest.param({"clip": 0.0}, ValueError, "clip must be positive", id="clip"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        consistency(toy_model, (1, 3, 4), **arguments)
