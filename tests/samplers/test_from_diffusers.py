"""Every line of the table in docs/from-diffusers.md against the live scheduler, and what it says of differences."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastsample
from fastsample import Schedule, ops, spaced_timesteps
from support import diffusers_runs
from support.chains import toy_model
from support.paths import ROOT

PAGE = (ROOT / "docs" / "from-diffusers.md").read_text()
LINES = re.findall(r"^\| `(\w+Scheduler\(.*?\))`.*? \| `(\w+\(.*\))` \|$", PAGE, flags=re.MULTILINE)
STEPS = 20
SHAPE = (2, 3, 8, 8)


def model_for(line: str) -> Callable[[Tensor, Tensor], Tensor]:
    if "learned_range" not in line:
        return toy_model
    return lambda x, t: torch.cat([toy_model(x, t), torch.sin(2 * x)], dim=1)


def made(scheduler: str) -> Any:
    """The scheduler that a cell names, at STEPS timesteps."""
    name = scheduler[: scheduler.index("(")]
    found = eval(scheduler, {name: getattr(pytest.importorskip("diffusers"), name)})
    found.set_timesteps(STEPS)
    return found


def schedule_of(scheduler: Any) -> Schedule:
    return Schedule.from_alphas_cumprod(scheduler.alphas_cumprod.numpy())


def called(cell: str, scheduler: Any, model: Any, x: Tensor) -> Tensor:
    """What a cell's call makes of the model and x, with the arguments that the page leaves out."""

    def run(name: str, **arguments: Any) -> Tensor:
        own: dict[str, Any] = {"seed": 5}
        if name != "consistency":
            own["steps"] = STEPS
            if arguments.get("prediction") != "flow":
                own["schedule"] = schedule_of(scheduler)
        return getattr(fastsample, name)(model, x, **own, **arguments)

    name, arguments = re.fullmatch(r"(\w+)(\(.*\))", cell).groups()  # type: ignore[union-attr]
    around = {**vars(fastsample), "scheduler": scheduler, "run": lambda **given: run(name, **given)}
    if hasattr(scheduler, "alphas_cumprod"):
        around["schedule"] = schedule_of(scheduler)
    return eval(f"run{arguments}", around)


def start_of(scheduler: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """(what the scheduler, what fastsample starts from): Euler's and Heun's state there is x / alpha."""
    name = type(scheduler).__name__
    if name == "CMStochasticIterativeScheduler":
        return 80 * x, 80 * x
    if name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler"):
        return x * (scheduler.sigmas[0] ** 2 + 1).sqrt(), x
    return x, x


def test_the_table_is_found() -> None:
    assert len(LINES) == len(re.findall(r"^\| `\w+Scheduler\(", PAGE, flags=re.MULTILINE)) >= 27


@pytest.mark.parametrize(("theirs", "ours"), LINES, ids=[theirs for theirs, _ in LINES])
def test_a_line_of_the_table(theirs: str, ours: str) -> None:
    scheduler, model = made(theirs), model_for(theirs)
    their_x, our_x = start_of(scheduler, ops.randn(SHAPE, seed=5))
    want = _chain(scheduler, model, their_x)
    assert (called(ours, scheduler, model, our_x) - want).abs().max() <= 1e-5 * want.abs().max()


def _chain(scheduler: Any, model: Any, x: Tensor) -> Tensor:
    if not hasattr(scheduler, "scale_model_input"):
        scheduler.scale_model_input = lambda x, t: x
    return diffusers_runs.chain(scheduler, model, x)


# Where the two differ


@pytest.mark.parametrize(("spacing", "steps", "off"), [("linspace", 20, 0.27), ("trailing", 7, 0.03)])
def test_ddim_goes_to_the_next_timestep_where_theirs_does_not(spacing: str, steps: int, off: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    x = ops.randn(SHAPE, seed=5)
    same_method = diffusers.DPMSolverMultistepScheduler(solver_order=1)
    same_method.set_timesteps(timesteps=spaced_timesteps(1000, spacing, steps).tolist())
    want = diffusers_runs.chain(same_method, toy_model, x)
    got = fastsample.ddim(toy_model, x, steps=steps, timesteps=spacing)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, clip_sample=False)
    scheduler.set_timesteps(steps)
    strayed = diffusers_runs.chain(scheduler, toy_model, x)
    # Two digits, as the page gives them.
    assert float((strayed - got).abs().max() / strayed.abs().max()) == pytest.approx(off, abs=0.005)


def test_where_spacings_divide_ddim_is_theirs() -> None:
    scheduler = made("DDIMScheduler(clip_sample=False, timestep_spacing='trailing')")
    x = ops.randn(SHAPE, seed=5)
    want = diffusers_runs.chain(scheduler, toy_model, x)
    got = fastsample.ddim(toy_model, x, steps=STEPS, timesteps="trailing")
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.mark.parametrize(
    ("variance", "noisy"), [("fixed_small", False), ("fixed_large", True), ("learned_range", True)]
)
def test_the_last_row_of_ddpm_is_without_noise(variance: str, noisy: bool) -> None:
    scheduler = made(f"DDPMScheduler(clip_sample=False, timestep_spacing='trailing', variance_type={variance!r})")
    x, model = ops.randn(SHAPE, seed=5), model_for(variance)
    want = diffusers_runs.chain(scheduler, model, x)
    got = fastsample.ddpm(model, x, steps=STEPS, timesteps="trailing", variance=variance, seed=5)
    assert ((got - want).abs().max() > 0.1) == noisy


def test_eulers_first_x() -> None:
    scheduler = made("EulerDiscreteScheduler(beta_schedule='scaled_linear', beta_start=0.00085, beta_end=0.012)")
    alpha = float((scheduler.sigmas[0] ** 2 + 1) ** -0.5)
    assert 1 - alpha * float(scheduler.init_noise_sigma) == pytest.approx(0.0023, abs=1e-4)
    assert fastsample.Euler(Schedule.scaled_linear(), steps=STEPS).table.init_noise_sigma == 1


# The recipes' own schedulers


def test_flux_recipe() -> None:
    """Its times, shift and the scheduler's configuration as in the pipeline."""
    scheduler = pytest.importorskip("diffusers").FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 28, 28), mu=mu)
    given: list[Tensor] = []

    def transformer(x: Tensor, t: Tensor) -> Tensor:
        given.append(t)
        return toy_model(x, 1000 * t)

    x = ops.randn((2, 16, 8), seed=5)
    want = _chain(scheduler, toy_model, x)
    got = fastsample.euler(
        lambda x, t: transformer(x, t / 1000),
        x,
        steps=28,
        prediction="flow",
        timesteps="trailing",
        shift=math.exp(mu),
    )
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    np.testing.assert_allclose([float(t[0]) for t in given], scheduler.timesteps / 1000, rtol=0, atol=1e-6)


def test_a_shared_run_is_the_whole_run() -> None:
    """The recipe for SDXL's base and refiner, with one model for both."""
    sampler = fastsample.Euler(Schedule.scaled_linear(), timesteps=spaced_timesteps(1000, steps=40, steps_offset=1))
    start = int((sampler.table.t >= round(1000 - 0.8 * 1000)).sum())
    assert start == 32
    before = next(step.x.clone() for step in sampler.iterate(toy_model, SHAPE, seed=3) if step.index == start - 1)
    whole = sampler(toy_model, SHAPE, seed=3)
    assert torch.equal(sampler(toy_model, before, start_step=start, seed=3), whole)
