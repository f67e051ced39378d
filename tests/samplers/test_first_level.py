"""A run begins at the level of the noise that it draws: one step at the noisiest timestep, and a warning elsewhere."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import (
    DDIM,
    DDPM,
    LCM,
    TCD,
    Batcher,
    Consistency,
    DDIMInverse,
    DPMSolver,
    Euler,
    EulerAncestral,
    EulerInverse,
    Heun,
    Sampler,
    Schedule,
    Table,
    karras_sigmas,
    ops,
    solver_timesteps,
    spaced_timesteps,
)
from fastsample.loop.start import warn_of_far_noise

LINEAR, SCALED, COSINE = Schedule.linear(), Schedule.scaled_linear(), Schedule.cosine()
SHAPE = (2, 3, 4)
X = ops.randn(SHAPE, seed=3)


def model(x: Tensor, t: Tensor) -> Tensor:
    return 0.1 * x


# One step


ONE_STEP: dict[str, Callable[[Schedule], Sampler]] = {
    **{
        f"ddim-{name}": lambda s, name=name: DDIM(s, steps=1, timesteps=name)
        for name in ("leading", "trailing", "linspace", "quad", "respaced", "lcm")
    },
    "ddpm": lambda s: DDPM(s, steps=1),
    "ddpm-leading": lambda s: DDPM(s, steps=1, timesteps="leading", variance="learned_range"),
    "lcm": lambda s: LCM(s, steps=1),
    "lcm-leading": lambda s: LCM(s, steps=1, timesteps="leading"),
    "tcd-linspace": lambda s: TCD(s, steps=1, timesteps="linspace"),
    **{
        f"{solver.__name__}-{name}": lambda s, solver=solver, name=name: solver(s, steps=1, timesteps=name)
        for solver in (Euler, EulerAncestral, Heun, DPMSolver)
        for name in ("linspace", "leading", "trailing", "quad", "karras", "log_snr")
    },
    "ddim-invert": lambda s: DDIMInverse(s, steps=1),
    "euler-invert": lambda s: EulerInverse(s, steps=1),
}


@pytest.mark.filterwarnings("ignore:the row at t =")
@pytest.mark.parametrize("name", ONE_STEP)
def test_one_step_is_from_the_noisiest_timestep(name: str) -> None:
    for schedule in (SCALED, Schedule.linear(100)):
        sampler = ONE_STEP[name](schedule)
        assert sampler.table.t.tolist() == [schedule.T - 1]
        assert sampler.steps == 1  # type: ignore[attr-defined]
        x = X if "invert" in name else SHAPE
        assert [step.t for step in sampler.iterate(model_of(name), x, seed=3)] == [schedule.T - 1]


def model_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return (lambda x, t: torch.cat([0.1 * x] * 2, 1)) if name == "ddpm-leading" else model


def test_one_step_makes_a_sample_of_the_noise() -> None:
    a = SCALED.alphas_cumprod[-1]
    want = (X - np.sqrt(1 - a) * 0.1 * X) / np.sqrt(a)
    # A product, a difference and a quotient in float32, with coefficients of up to 15.
    torch.testing.assert_close(fastsample.ddim(model, SHAPE, steps=1, seed=3, schedule=SCALED), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", [Euler, Heun, DPMSolver])
@pytest.mark.parametrize("timesteps", ["linspace", "trailing"])
def test_one_step_of_a_flow_is_from_pure_noise(solver: Any, timesteps: str) -> None:
    for shift in (0.5, 1.0, 3.0):
        assert solver(prediction="flow", steps=1, timesteps=timesteps, shift=shift).table.t.tolist() == [1000.0]


@pytest.mark.parametrize("given", [[0], "1", [500]], ids=str)
def test_what_is_given_stays(given: Any) -> None:
    assert DDIM(SCALED, timesteps=given).table.t.tolist() == spaced_timesteps(1000, given).tolist()


def test_the_peers_lists_stay_theirs() -> None:
    assert spaced_timesteps(1000, "leading", 1).tolist() == [0]
    assert solver_timesteps(1000, "leading", 1, steps_offset=1).tolist() == [501]


# The warning

FAR: dict[str, tuple[Callable[[], Sampler], str]] = {
    "given": (lambda: DDIM(LINEAR, timesteps=[100, 50]), r"t = 100.*alpha = 0.946, sigma = 0.324"),
    "sections": (lambda: DDPM(LINEAR, timesteps="1"), r"t = 0\b.*alpha = 1, sigma = 0.01"),
    "lcm": (lambda: LCM(SCALED, timesteps=[259]), r"t = 259"),
    "tcd": (lambda: TCD(SCALED, timesteps=[259, 19]), r"t = 259"),
    "euler-fractional": (lambda: Euler(LINEAR, timesteps=[99.5, 9.25]), r"t = 99.5"),
    "euler-ancestral": (lambda: EulerAncestral(LINEAR, timesteps=[99.5, 9.25]), r"t = 99.5"),
    "heun": (lambda: Heun(LINEAR, timesteps=[100, 50]), r"t = 100"),
    "dpm-solver": (lambda: DPMSolver(LINEAR, timesteps=[100, 50]), r"t = 100"),
    "flow": (lambda: Euler(prediction="flow", timesteps=[400.0, 200.0]), r"t = 400.*alpha = 0.6, sigma = 0.4"),
    "consistency": (lambda: Consistency(sigmas=[0.8]), r"alpha = 1, sigma = 0.8"),
    "short-schedule": (lambda: DDIM(Schedule.linear(10), steps=5, timesteps="trailing"), r"t = 9"),
    "by-hand": (lambda: Sampler(Table([5], a=1.0, alpha=[0.8, 1.0], sigma=[0.6, 0.0])), r"t = 5.*alpha = 0.8"),
}


def caught(run: Callable[[], object]) -> list[warnings.WarningMessage]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        run()
    return [one for one in found if "x_T is drawn" in str(one.message)]


@pytest.mark.parametrize("name", FAR)
def test_noise_far_from_the_first_level_is_told_once(name: str) -> None:
    sampler, message = FAR[name][0](), FAR[name][1]
    x = X
    for run in (
        lambda: sampler(model, SHAPE),
        lambda: list(sampler.iterate(model, SHAPE)),
        lambda: sampler.iterate(model, SHAPE),
        lambda: Batcher(model, sampler, batch=2).submit((3, 4)).result(),
    ):
        (found,) = caught(run)
        assert re.search(message, str(found.message)) and "strength=" in str(found.message)
        assert found.category is UserWarning and found.filename == __file__
    # A tensor is taken for the state that belongs there.
    assert not caught(lambda: sampler(model, x))
    assert not caught(lambda: sampler(model, x, strength=1.0))


def test_functions_and_graphs_tell_it_at_the_callers_line() -> None:
    def graphed() -> None:
        with pytest.raises(ValueError, match="a graph needs a CUDA device"):
            fastsample.graph(DDIM(LINEAR, timesteps=[100, 50]), model, SHAPE, device="cpu")

    for run in (
        lambda: fastsample.ddim(model, SHAPE, timesteps=[100, 50]),
        lambda: fastsample.lcm(model, SHAPE, timesteps=[100, 50]),
        graphed,
    ):
        (found,) = caught(run)
        assert found.filename == __file__


def test_noise_of_another_deviation_is_told() -> None:
    table = Table([5], a=1.0, alpha=[1.0, 1.0], sigma=[80.0, 0.0])
    (found,) = caught(lambda: Sampler(table)(model, SHAPE))
    assert "init_noise_sigma=80" in str(found.message)
    assert not caught(lambda: Sampler(table.replace(init_noise_sigma=80.0))(model, SHAPE))


ORDINARY: dict[str, Callable[[], list[Sampler]]] = {
    "leading": lambda: [
        DDIM(s, steps=n) for s in (LINEAR, SCALED, COSINE) for n in (*range(2, 21), 334, 501, 700, 1000)
    ],
    "other-spacings": lambda: [
        DDIM(s, steps=n, timesteps=name)
        for s in (LINEAR, SCALED, COSINE)
        for name in ("trailing", "linspace", "quad", "respaced")
        for n in (1, 2, 3, 7, 20)
    ],
    "stable-diffusion": lambda: [
        sampler(SCALED, timesteps=spaced_timesteps(1000, steps=n, steps_offset=1))
        for sampler in (DDIM, Euler, EulerAncestral, Heun)
        for n in (2, 3, 4, 20, 30, 50)
    ],
    "solver-leading": lambda: [
        DPMSolver(s, timesteps=solver_timesteps(1000, "leading", n, steps_offset=1))
        for s in (LINEAR, SCALED, COSINE)
        for n in (1, 2, 3, 4, 20)
    ],
    "levels": lambda: [Euler(s, steps=n, timesteps="karras") for s in (LINEAR, SCALED) for n in (1, 2, 20)],
    "ddpm": lambda: [DDPM(LINEAR), DDPM(COSINE, steps=10), DDPM(LINEAR, timesteps="ddim25")],
    "few-steps": lambda: [sampler(SCALED, steps=n) for sampler in (LCM, TCD) for n in (1, 2, 4, 8)],
    "zero-terminal-snr": lambda: [
        DDIM(SCALED.rescale_zero_terminal_snr(), steps=n, timesteps="trailing", prediction="v") for n in (1, 20)
    ],
    "flow": lambda: [
        solver(steps=n, prediction="flow", shift=shift, timesteps=timesteps)
        for solver in (Euler, Heun, DPMSolver)
        for n in (1, 2, 28)
        for shift in (0.5, 1.0, 3.0)
        for timesteps in ("linspace", "trailing", [900.0, 500.0], [500, 100])
    ],
    "consistency": lambda: [Consistency(), Consistency(sigmas=karras_sigmas(80.0, 0.002, 40)[[0, 22]])],
    "other-lengths": lambda: [DDIM(Schedule.linear(T), steps=T, timesteps="trailing") for T in (100, 4000)],
    "without-levels": lambda: [Sampler(Table([5, 1], a=1.0)), Sampler(Table([1], a=1.0, init_noise_sigma=80.0))],
}


@pytest.mark.filterwarnings("ignore:the row at t =")
@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_starts_are_not_told(name: str) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="x_T is drawn")
        for sampler in ORDINARY[name]():
            warn_of_far_noise(sampler.table)


# The warning of a spacing that starts low

LOW: dict[str, Callable[[], Sampler]] = {
    "cosine-leading-4": lambda: DDIM(COSINE, steps=4, timesteps="leading"),
    "cosine-leading-2": lambda: DDIM(COSINE, steps=3, timesteps="leading", prediction="v"),
    "linear-leading-2": lambda: DDIM(LINEAR, steps=2, timesteps="leading"),
    "linear-quad": lambda: DDPM(COSINE, steps=10, timesteps="quad"),
    "stable-diffusion-leading-4": lambda: Euler(SCALED, timesteps=spaced_timesteps(1000, steps=4, steps_offset=1)),
    "solver-leading": lambda: DPMSolver(COSINE, steps=4, timesteps="leading"),
    "given": lambda: EulerAncestral(LINEAR, timesteps=[500.5, 100.5]),
}
HIGH: dict[str, Callable[[], list[Sampler]]] = {
    "auto": lambda: [
        sampler(s, steps=n, clip=1.0)
        for s in (LINEAR, SCALED, COSINE, Schedule.cosine(20), Schedule.cosine(4000), Schedule.linear(100))
        for sampler in (DDIM, DPMSolver, Euler)
        for n in (1, 2, 3, 4, 10, 20)
    ],
    "leading": lambda: [
        DDIM(s, steps=n, timesteps="leading") for s in (LINEAR, SCALED, COSINE) for n in (10, 20, 25, 50, 100, 1000)
    ],
    "stable-diffusion": lambda: [
        sampler(SCALED, timesteps=spaced_timesteps(1000, steps=n, steps_offset=1))
        for sampler in (DDIM, Euler, EulerAncestral, Heun)
        for n in (20, 30, 50)
    ],
    "solver-leading": lambda: [
        DPMSolver(s, timesteps=solver_timesteps(1000, "leading", n)) for s in (LINEAR, SCALED, COSINE) for n in (20, 25)
    ],
    "distilled": lambda: [sampler(SCALED, steps=n) for sampler in (LCM, TCD) for n in (1, 2, 4, 8)],
    "a-schedule-that-ends-there": lambda: [DDIM(Schedule.linear(100), steps=n, timesteps="leading") for n in (20, 100)],
    "flow": lambda: [Euler(steps=4, prediction="flow", timesteps=[900.0, 500.0]), Heun(steps=2, prediction="flow")],
}


def warned(run: Callable[[], object]) -> list[warnings.WarningMessage]:
    return [one for one in caught(run) if "whose share of the sample it lacks" in str(one.message)]


@pytest.mark.parametrize("name", LOW)
def test_a_spacing_that_starts_low_is_told_where_noise_is_drawn(name: str) -> None:
    sampler = LOW[name]()
    for run in (
        lambda: sampler(model, SHAPE),
        lambda: sampler.iterate(model, SHAPE),
        lambda: sampler.prepare(model, SHAPE),
        lambda: Batcher(model, sampler, batch=2),
    ):
        (found,) = warned(run)
        assert found.category is UserWarning and found.filename == __file__
        for part in (f"t = {sampler.table.times[0]:g}", f"alpha = {sampler.table.alpha[0]:.3g}", "timesteps='auto'"):  # type: ignore[index]
            assert part in str(found.message)
    assert not warned(lambda: sampler(model, X)), "a tensor is taken for the state that belongs there"
    assert not warned(lambda: sampler(model, X, strength=0.9))
    assert not warned(lambda: sampler(model, X, start_step=1))


def test_functions_tell_it_in_every_call() -> None:
    for _ in range(2):
        (found,) = warned(lambda: fastsample.ddim(model, SHAPE, steps=4, timesteps="leading", schedule=COSINE))
        assert found.filename == __file__


@pytest.mark.filterwarnings("ignore:the row at t =")
@pytest.mark.parametrize("name", HIGH)
def test_usual_spacings_are_not_told(name: str) -> None:
    for sampler in HIGH[name]():
        assert sampler._low_start is None


def test_inversion_starts_from_what_it_is_given() -> None:
    assert not caught(lambda: fastsample.ddim_invert(model, X, steps=5))
    assert not caught(lambda: fastsample.euler_invert(model, X, steps=5, prediction="flow"))
