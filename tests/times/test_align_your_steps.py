"""Align Your Steps: the published timesteps, at the same noise levels of any schedule."""

from __future__ import annotations

import numpy as np
import pytest

import fastsample
from fastsample import DDIM, DDPM, DPMSolver, Euler, Schedule
from fastsample.times.align_your_steps import PUBLISHED, aligned_timesteps
from fastsample.times.levels import sigma_over_alpha

STABLE_DIFFUSION = Schedule.scaled_linear()


@pytest.mark.parametrize("name", PUBLISHED)
def test_ten_steps_of_stable_diffusion_are_the_published_ones(name: str) -> None:
    peer = pytest.importorskip("diffusers.schedulers").AysSchedules
    theirs = {"ays_sd15": "StableDiffusionTimesteps", "ays_sdxl": "StableDiffusionXLTimesteps"}[name]
    assert aligned_timesteps(STABLE_DIFFUSION, name).tolist() == list(peer[theirs])


@pytest.mark.parametrize("steps", [1, 4, 10, 25, 60])
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize(
    "schedule", [STABLE_DIFFUSION, Schedule.cosine(), Schedule.linear(4000)], ids=["scaled-linear", "cosine", "4000"]
)
def test_other_numbers_lie_between_the_published_levels(schedule: Schedule, name: str, steps: int) -> None:
    """Evenly in log sigma / alpha, as far as whole timesteps allow."""
    t = aligned_timesteps(schedule, name, steps)
    assert len(t) == steps and (np.diff(t) < 0).all()
    logs = np.log(sigma_over_alpha(STABLE_DIFFUSION)[[*PUBLISHED[name], 0]])
    wanted = np.interp(np.arange(steps) / steps, np.arange(11) / 10, logs)
    own = np.log(sigma_over_alpha(schedule))
    missed, spacing = np.abs(own[t] - wanted), np.abs(np.gradient(own))[t]
    assert (missed <= spacing).all()


def test_every_sampler_of_a_schedule_takes_them() -> None:
    want = aligned_timesteps(STABLE_DIFFUSION, "ays_sd15", 8).tolist()
    for sampler in (DDIM, DDPM, DPMSolver, Euler):
        assert sampler(STABLE_DIFFUSION, steps=8, timesteps="ays_sd15").table.times == tuple(want)
    levels = DPMSolver(STABLE_DIFFUSION, steps=8, timesteps="ays_sd15", order=3).table.levels
    assert levels[-1] == (1.0, 0.0)


def test_a_schedule_that_ends_in_pure_noise() -> None:
    t = aligned_timesteps(Schedule.linear().rescale_zero_terminal_snr(), "ays_sd15")
    assert t[0] < 999 and (np.diff(t) < 0).all()


def test_refused() -> None:
    with pytest.raises(ValueError, match="timesteps of a flow must be linspace, trailing or the times, got 'ays_sd15'"):
        Euler(steps=10, timesteps="ays_sd15", prediction="flow")
    with pytest.raises(ValueError, match="steps"):
        aligned_timesteps(STABLE_DIFFUSION, "ays_sd15", 1001)
    with pytest.raises(ValueError, match="timesteps"):
        fastsample.DDIM(STABLE_DIFFUSION, steps=10, timesteps="ays_sd3")
