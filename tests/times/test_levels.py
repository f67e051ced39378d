"""Noise levels and the times between whole timesteps, against their formulas written a second time."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastsample import Schedule
from fastsample.times.continuous import karras_sigmas, spaced_levels
from fastsample.times.flow import flow_levels
from fastsample.times.levels import noise_levels
from fastsample.times.solver_timesteps import fractional_timesteps

SCHEDULE = Schedule.scaled_linear()


def test_noise_levels_follow_the_list_and_then_the_end() -> None:
    schedule, t = Schedule.linear(), np.array([900, 33, 2])
    for final in (1.0, float(schedule.alphas_cumprod[0]), float(schedule.alphas_cumprod[2])):
        alpha, sigma = noise_levels(schedule, t, final)
        alpha_bar = [*schedule.alphas_cumprod[t], final]
        np.testing.assert_allclose(alpha, [math.sqrt(value) for value in alpha_bar], rtol=1e-15)
        np.testing.assert_allclose(sigma, [math.sqrt(1 - value) for value in alpha_bar], rtol=1e-15)
    assert noise_levels(schedule, t)[0][-1] == 1.0


def test_fractional_times_interpolate_the_ratio() -> None:
    alpha, sigma = noise_levels(SCHEDULE, np.array([900.0, 500.25, 3.0]))
    a = SCHEDULE.alphas_cumprod
    ratio = np.sqrt((1 - a) / a)
    np.testing.assert_allclose(
        sigma / alpha, [ratio[900], 0.75 * ratio[500] + 0.25 * ratio[501], ratio[3], 0.0], rtol=1e-12
    )
    np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-15)


@pytest.mark.parametrize("steps", [1, 2, 9, 1500])
@pytest.mark.parametrize("spacing", ["karras", "log_snr"])
def test_spaced_levels(spacing: str, steps: int) -> None:
    a = SCHEDULE.alphas_cumprod
    highest, lowest = math.sqrt((1 - a[-1]) / a[-1]), math.sqrt((1 - a[0]) / a[0])
    i = np.arange(steps) / max(steps - 1, 1)
    if spacing == "karras":
        want = (highest ** (1 / 7) + i * (lowest ** (1 / 7) - highest ** (1 / 7))) ** 7
        np.testing.assert_allclose(karras_sigmas(highest, lowest, steps), want, rtol=1e-12)
    else:
        want = np.exp(math.log(highest) + i * (math.log(lowest) - math.log(highest)))
    t, alpha, sigma = spaced_levels(SCHEDULE, spacing, steps)
    # 1 - alpha bar has lost three digits where alpha bar is next to 1.
    np.testing.assert_allclose(sigma[:-1] / alpha[:-1], want, rtol=1e-12)
    assert (alpha[-1], sigma[-1]) == (1.0, 0.0)
    assert t[0] == 999.0 and (steps == 1 or (t[-1] < 1e-9 and (np.diff(t) < 0).all()))
    # At the end, the level of timestep 0 is not overshot by rounding.
    assert spaced_levels(SCHEDULE, spacing, steps, float(a[0]))[1][-1] == math.sqrt(a[0])


def test_flow_levels() -> None:
    for name, last in (("linspace", 0.001 * 3 / 1.002), ("trailing", 0.2)):
        t, alpha, sigma = flow_levels(name, 5, shift=3.0)
        plain = np.linspace(1, last, 5)
        np.testing.assert_allclose(sigma[:-1], 3 * plain / (1 + 2 * plain), rtol=1e-14)
        np.testing.assert_allclose(t, 1000 * sigma[:-1], rtol=1e-14)
        assert sigma[-1] == 0 and (alpha == 1 - sigma).all()
    assert flow_levels([250, 1000.0], 7, shift=3.0)[2].tolist() == [1.0, 0.25, 0.0]


def test_fractional_timesteps() -> None:
    assert fractional_timesteps(1000, "linspace", 3).tolist() == [999.0, 499.5, 0.0]
    assert fractional_timesteps(1000, "linspace", 1).tolist() == [999.0]
    assert fractional_timesteps(1000, "leading", 2).tolist() == [500, 0]
    assert fractional_timesteps(1000, "ddim25", 7).size == 25
