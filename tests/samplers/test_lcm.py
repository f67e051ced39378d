"""LCM: diffusers' published sum, whole chains against its live scheduler, and the embedding of the guidance scale."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import Schedule, ops
from fastsample.samplers.guidance_embedding import guidance_scale_embedding
from fastsample.samplers.lcm import LCM, lcm
from fastsample.samplers.limits import DynamicThreshold
from support import diffusers_runs
from support.chains import diffusers_dummies, toy_model

SCHEDULE = Schedule.scaled_linear()
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "x0": "sample"}
CLIPS: dict[str, tuple[Any, dict[str, Any]]] = {
    "free": (None, {}),
    "clip": (0.8, {"clip_sample": True, "clip_sample_range": 0.8}),
    "threshold": (
        DynamicThreshold(0.9, max=3.0),
        {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 3.0},
    ),
}


def test_published_one_step(backend: str) -> None:
    """test_scheduler_lcm.py, with its tolerances."""
    x, model = diffusers_dummies()
    got = lcm(model, x, schedule=SCHEDULE, steps=1, backend=backend)
    assert abs(got.abs().sum().item() - 18.7097) < 1e-3
    assert abs(got.abs().mean().item() - 0.0244) < 1e-3


@pytest.mark.parametrize("steps", [1, 4, 50])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_live_diffusers(backend: str, prediction: str, clip: str, steps: int) -> None:
    """Whole chains: the float32 tables of diffusers cost 1e-6, which 50 steps do not add up to 1e-4."""
    diffusers = pytest.importorskip("diffusers")
    ours, theirs = CLIPS[clip]
    scheduler = diffusers.LCMScheduler(prediction_type=PREDICTIONS[prediction], **theirs)
    scheduler.set_timesteps(steps)
    x = ops.randn((2, 3, 8, 8), seed=5)
    want = diffusers_runs.chain(scheduler, toy_model, x)
    got = lcm(toy_model, x, schedule=SCHEDULE, steps=steps, prediction=prediction, clip=ours, seed=5, backend=backend)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


def test_the_live_diffusers_with_other_settings() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.LCMScheduler(timestep_scaling=0.001, beta_schedule="linear", original_inference_steps=20)
    scheduler.set_timesteps(timesteps=[899, 499, 49])
    x = ops.randn((2, 3, 8, 8), seed=5)
    want = diffusers_runs.chain(scheduler, toy_model, x)
    schedule = Schedule.linear(beta_start=0.00085, beta_end=0.012)
    got = lcm(toy_model, x, schedule=schedule, timesteps=[899, 499, 49], timestep_scaling=0.001, seed=5)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()
    scheduler.set_timesteps(6)
    assert LCM(schedule, steps=6, original_steps=20).table.t.tolist() == scheduler.timesteps.tolist()


def test_the_table_by_hand() -> None:
    """t = 3 with scaling 0.1 and sigma_data 0.4 is a 3-4-5 triangle: c_skip = 0.64, c_out = 0.6."""
    schedule = Schedule.from_alphas_cumprod([0.5, 0.4, 0.3, 0.2])
    table = LCM(schedule, timesteps=[3, 0], timestep_scaling=0.1, sigma_data=0.4, prediction="x0").table
    np.testing.assert_allclose(table.a, [math.sqrt(0.5) * 0.64, 1.0], rtol=1e-15)
    np.testing.assert_allclose(table.b, [math.sqrt(0.5) * 0.6, 0.0], rtol=1e-15)
    np.testing.assert_allclose(table.s, [math.sqrt(0.5), 0.0], rtol=1e-15)
    assert table.stochastic == (True, False), "no noise in the last row"


def test_the_function_is_the_sampler(backend: str) -> None:
    sampler = LCM(SCHEDULE, steps=3, clip=1.0)
    one = sampler(toy_model, (2, 3, 5), seed=3, backend=backend)
    assert torch.equal(one, lcm(toy_model, (2, 3, 5), schedule=SCHEDULE, steps=3, clip=1.0, seed=3, backend=backend))
    assert torch.equal(one, [step.x for step in sampler.iterate(toy_model, (2, 3, 5), seed=3, backend=backend)][-1])
    assert sampler.steps == 3 and sampler == LCM(SCHEDULE, steps=3, clip=1.0)


# The embedding of the guidance scale


class Guided:
    """Keeps the embedding that it is given."""

    config = SimpleNamespace(time_cond_proj_dim=16)

    def __call__(self, x: Tensor, t: Tensor, timestep_cond: Tensor, **others: Tensor) -> Tensor:
        self.seen, self.others = timestep_cond, others
        return toy_model(x, t) + timestep_cond.mean(1).view(-1, *[1] * (x.ndim - 1)).to(x.dtype)


@pytest.mark.parametrize("dim", [4, 256])
def test_the_embedding_is_that_of_diffusers(dim: int) -> None:
    """The same sines and cosines as its embedding of a timestep 1000 (w - 1)."""
    embeddings = pytest.importorskip("diffusers.models.embeddings")
    w = torch.tensor([1.0, 7.5, 8.0, 13.25])
    theirs = embeddings.get_timestep_embedding((w - 1) * 1000, dim, downscale_freq_shift=1)
    # Both in float32: an angle of up to 12250 is known to half a unit in the last place, 5e-4, times a few roundings.
    torch.testing.assert_close(guidance_scale_embedding(w, dim), theirs, rtol=0, atol=2e-3)


def test_the_embedding_by_hand() -> None:
    got = guidance_scale_embedding([1.0, 1.001], 6)
    assert got.dtype == torch.float32 and got.shape == (2, 6)
    assert got[0].tolist() == [0, 0, 0, 1, 1, 1], "w = 1 has no angle"
    frequencies = [1.0, 0.01, 0.0001]
    # 1.001 - 1 keeps four digits in float32.
    want = [math.sin(f) for f in frequencies] + [math.cos(f) for f in frequencies]
    np.testing.assert_allclose(got[1], want, atol=1e-4)
    assert torch.equal(guidance_scale_embedding(8, 6), guidance_scale_embedding(torch.tensor([8.0]), 6))


def test_the_model_is_told_the_guidance_scale(backend: str) -> None:
    model = Guided()
    common: dict[str, Any] = dict(schedule=SCHEDULE, seed=1, backend=backend)
    got = lcm(model, (3, 2, 4), guidance_embedding=8.0, model_kwargs={"y": torch.ones(3)}, **common)
    assert torch.equal(model.seen, guidance_scale_embedding(8.0, 16).expand(3, -1)) and set(model.others) == {"y"}
    each = lcm(model, (3, 2, 4), guidance_embedding=torch.tensor([8.0, 1.5, 3.0]), **common)
    assert torch.equal(model.seen, guidance_scale_embedding([8.0, 1.5, 3.0], 16))
    assert torch.equal(got[0], each[0]) and not torch.equal(got[1], each[1])
    x = ops.randn((3, 2, 4), seed=1)
    assert torch.equal(lcm(model, x, guidance_embedding=8.0, **common), got)
    *_, last = LCM(SCHEDULE).iterate(model, (3, 2, 4), guidance_embedding=8.0, seed=1, backend=backend)
    assert torch.equal(last.x, got)
    lcm(model, (3, 2, 4), guidance_embedding=8.0, model_dtype=torch.bfloat16, **common)
    assert model.seen.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        pytest.param({"steps": 51}, ValueError, "steps must not exceed original_steps=50", id="steps"),
        pytest.param({"original_steps": 2000}, ValueError, "original_steps must lie in", id="original-steps"),
        pytest.param({"timestep_scaling": 0.0}, ValueError, "timestep_scaling must be positive", id="scaling"),
        pytest.param({"sigma_data": math.nan}, ValueError, "sigma_data must be positive", id="sigma-data"),
        pytest.param({"sigma_data": "1"}, TypeError, "sigma_data must be a number", id="sigma-data-type"),
        pytest.param({"prediction": "eps"}, ValueError, "prediction must be one of", id="prediction"),
        pytest.param({"guidance_embedding": [8.0, 8.0]}, ValueError, "a number or 3", id="embedding-count"),
        pytest.param({"guidance_embedding": "8"}, TypeError, "guidance scale must be a number", id="embedding-type"),
        pytest.param({"guidance_embedding": torch.ones(3, 2)}, ValueError, r"shape \(3, 2\)", id="embedding-shape"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lcm(Guided(), (3, 2, 4), **arguments)


def test_bad_embeddings() -> None:
    with pytest.raises(ValueError, match=r"config\.time_cond_proj_dim"):
        lcm(toy_model, (3, 2, 4), guidance_embedding=8.0)
    for dim in (2, 7):
        with pytest.raises(ValueError, match=f"even and at least 4, got {dim}"):
            guidance_scale_embedding(8.0, dim)
