"""The default spacing: where it starts on any schedule, and that its lists are sound and nest."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastsample
from fastsample import DDIM, DDPM, DDIMInverse, DPMSolver, Euler, EulerAncestral, EulerInverse, Heun, Schedule
from fastsample.times.automatic import MOST_GROWTH, MOST_RATIO, auto_timesteps, first_growth
from support.chains import toy_model

SIGMOID = Schedule.from_alphas_cumprod(1 / (1 + np.exp(np.linspace(-9, 13, 1000))))
SCHEDULES = {
    "cosine": Schedule.cosine(),
    "cosine-20": Schedule.cosine(20),
    "cosine-4000": Schedule.cosine(4000),
    "linear": Schedule.linear(),
    "linear-50": Schedule.linear(50, 0.002, 0.4),
    "stable-diffusion": Schedule.scaled_linear(),
    "zero-terminal-snr": Schedule.scaled_linear().rescale_zero_terminal_snr(),
    "sigmoid": SIGMOID,
    "clean-to-noise": Schedule.from_alphas_cumprod([1.0, 0.5, 0.0]),
    "one-timestep": Schedule.linear(1),
}


def ratio_at(schedule: Schedule, t: int) -> float:
    alpha_bar = float(schedule.alphas_cumprod[t])
    return float("inf") if alpha_bar == 0 else ((1 - alpha_bar) / alpha_bar) ** 0.5


# Where it starts


@pytest.mark.parametrize(
    ("name", "steps", "first"),
    [
        ("cosine", 1, 893),
        ("cosine", 2, 927),
        ("cosine", 4, 959),
        ("cosine", 8, 978),
        ("cosine", 20, 990),
        ("cosine", 50, 995),
        ("cosine", 1000, 999),
        ("linear", 4, 937),
        ("linear", 5, 999),
        ("linear", 50, 999),
        ("stable-diffusion", 1, 999),
        ("stable-diffusion", 4, 999),
        ("zero-terminal-snr", 4, 932),
        ("cosine-20", 4, 18),
        ("cosine-20", 20, 19),
        ("cosine-4000", 4, 3842),
    ],
)
def test_the_first_timestep_of_an_epsilon_model(name: str, steps: int, first: int) -> None:
    assert auto_timesteps(SCHEDULES[name], steps)[0] == first


@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_models_whose_error_shrinks_start_at_the_top(name: str, prediction: str) -> None:
    schedule = SCHEDULES[name]
    for steps in {1, min(2, schedule.T), schedule.T}:
        assert auto_timesteps(schedule, steps, prediction)[0] == schedule.T - 1


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_first_step_keeps_an_error_small_and_no_noisier_start_does(name: str) -> None:
    """The growth by an independent formula: two runs of the first step, whose outputs differ by e."""
    schedule = SCHEDULES[name]
    if ratio_at(schedule, schedule.T - 1) <= MOST_RATIO:
        assert all(auto_timesteps(schedule, steps)[0] == schedule.T - 1 for steps in range(1, min(schedule.T, 30) + 1))
        return
    for steps in range(1, min(schedule.T, 30) + 1):
        start = int(auto_timesteps(schedule, steps)[0])
        found = {t: grown(schedule, t, steps) for t in range(steps - 1, schedule.T)}
        if found[start] <= MOST_GROWTH:
            assert all(growth > MOST_GROWTH for t, growth in found.items() if t > start)
        else:
            assert found[start] == min(found.values())


def grown(schedule: Schedule, t: int, steps: int) -> float:
    exact = Fraction((steps - 1) * (t + 1), steps)
    following = round(exact) - 1
    a, b = float(schedule.alphas_cumprod[t]), float(schedule.alphas_cumprod[following]) if following >= 0 else 1.0
    if a == 0:
        return float("inf")
    ends = [b**0.5 * (0 - (1 - a) ** 0.5 * epsilon) / a**0.5 + (1 - b) ** 0.5 * epsilon for epsilon in (0.0, 1.0)]
    return abs(ends[1] - ends[0])


def test_the_growth_is_what_the_table_of_ddim_does() -> None:
    for steps in (1, 2, 4, 50):
        t = auto_timesteps(Schedule.cosine(), steps)
        row = DDIM(Schedule.cosine(), timesteps=t).table
        want = abs(row.b[0] * row.q[0] + row.d[0])
        assert first_growth(Schedule.cosine(), t[:1], steps)[0] == pytest.approx(want, rel=1e-12)


# Its lists


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(SCHEDULES)), part=st.floats(0, 1), prediction=st.sampled_from(["epsilon", "v", "x0"])
)
def test_exactly_so_many_descending_timesteps(name: str, part: float, prediction: str) -> None:
    schedule = SCHEDULES[name]
    steps = 1 + round(part * (schedule.T - 1))
    t = auto_timesteps(schedule, steps, prediction)
    assert t.dtype == np.int64 and t.shape == (steps,)
    assert (np.diff(t) < 0).all() and t[-1] >= 0 and t[0] < schedule.T


@settings(max_examples=60, deadline=None)
@given(T=st.integers(1, 60), beta=st.floats(1e-4, 0.9), part=st.floats(0, 1))
def test_any_schedule(T: int, beta: float, part: float) -> None:
    schedule = Schedule.from_betas(np.full(T, beta))
    steps = 1 + round(part * (T - 1))
    t = auto_timesteps(schedule, steps)
    assert len(t) == steps and (np.diff(t) < 0).all() and t[-1] >= 0 and t[0] < T


@pytest.mark.parametrize("name", SCHEDULES)
def test_all_steps_are_all_timesteps(name: str) -> None:
    T = SCHEDULES[name].T
    for prediction in ("epsilon", "v"):
        assert auto_timesteps(SCHEDULES[name], T, prediction).tolist() == [*range(T)][::-1]


@pytest.mark.parametrize("name", ["stable-diffusion", "linear", "zero-terminal-snr"])
def test_lists_from_one_start_nest(name: str) -> None:
    for steps in range(1, 501):
        coarse, fine = (auto_timesteps(SCHEDULES[name], n, "v") for n in (steps, 2 * steps))
        assert coarse.tolist() == fine[::2].tolist()


def test_where_the_top_is_the_start_it_is_trailing() -> None:
    for steps in (1, 2, 3, 4, 10, 20, 25, 50, 1000):
        want = fastsample.spaced_timesteps(1000, "trailing", steps)
        assert auto_timesteps(Schedule.scaled_linear(), steps).tolist() == want.tolist()


# What samplers make of it


@pytest.mark.parametrize("sampler", [DDIM, DDIMInverse, DPMSolver, Euler, EulerAncestral, EulerInverse, Heun])
def test_it_is_the_default(sampler: Any) -> None:
    made = sampler(Schedule.cosine(), steps=4, clip=1.0)
    assert made.timesteps == "auto" and made.steps == 4
    assert sorted({*made.table.times}) == [239, 479, 719, 959]
    # Heun's corrector multiplies errors in x0 too.
    of_v = sampler(Schedule.cosine(), steps=4, prediction="v", clip=1.0)
    assert max(of_v.table.times) == (959 if sampler is Heun else 999)


def test_samplers_of_other_methods_take_it_by_name() -> None:
    assert DDPM(Schedule.cosine(), steps=4, timesteps="auto").table.times == (959, 719, 479, 239)
    assert fastsample.LCM(Schedule.scaled_linear(), steps=4, timesteps="auto").table.times == (999, 749, 499, 249)


def test_of_a_flow_it_is_linspace() -> None:
    for shift in (1.0, 3.0):
        named = Euler(prediction="flow", steps=5, shift=shift, timesteps="linspace")
        assert Euler(prediction="flow", steps=5, shift=shift).table.times == named.table.times


def test_encoder_and_decoder_agree() -> None:
    assert DDIMInverse(Schedule.cosine(), steps=7).table.times == DDIM(Schedule.cosine(), steps=7).table.times[::-1]


def test_zero_terminal_snr_needs_no_other_spacing() -> None:
    """Of an epsilon model the last timestep is left out, of a v model it is the start."""
    schedule = SCHEDULES["zero-terminal-snr"]
    for prediction, first in (("epsilon", 978), ("v", 999)):
        sampler = DDIM(schedule, steps=10, prediction=prediction)
        assert sampler.table.times[0] == first
        assert sampler(toy_model, torch.zeros(1, 2)).isfinite().all()


@pytest.mark.parametrize(
    ("steps", "error", "message"),
    [
        pytest.param(0, ValueError, "steps must be at least 1, got 0", id="none"),
        pytest.param(1001, ValueError, r"steps must lie in \[1, 1000\]", id="above-T"),
        pytest.param(2.5, TypeError, "steps must be an int", id="fractional"),
        pytest.param(None, ValueError, "timesteps='auto' needs steps=", id="missing"),
    ],
)
def test_refused(steps: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        DDIM(Schedule.cosine(), steps=steps)
    with pytest.raises(error, match=message):
        auto_timesteps(Schedule.cosine(), steps)


def test_spaced_timesteps_knows_no_schedule() -> None:
    with pytest.raises(ValueError, match="timesteps='auto' is no spacing"):
        fastsample.spaced_timesteps(1000, "auto", 4)
