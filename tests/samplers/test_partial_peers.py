"""Runs from a clean sample against diffusers: each image-to-image pipeline's own rule and its live scheduler."""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import pytest
import torch
from torch import Tensor

from fastsample import (
    DDIM,
    DDPM,
    LCM,
    TCD,
    Consistency,
    DPMSolver,
    Euler,
    EulerAncestral,
    Heun,
    Sampler,
    Schedule,
    karras_sigmas,
    ops,
    solver_timesteps,
    spaced_timesteps,
)
from support.chains import toy_model

SCHEDULE = Schedule.scaled_linear()
FIRST = float(SCHEDULE.alphas_cumprod[0])
STABLE_DIFFUSION = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
SHAPE = (2, 3, 4, 4)
CLEAN = 0.5 * ops.randn(SHAPE, seed=77)
STEPS = [2, 3, 4, 5, 7, 10, 28, 50]
STRENGTHS = [0.02, 0.1, 0.2, 0.25, 0.29, 0.3, 0.5, 0.58, 0.6, 0.75, 0.8, 0.95, 0.999, 1.0]


PIPELINES = {
    "StableDiffusionImg2Img": "stable_diffusion/pipeline_stable_diffusion_img2img.py",
    "StableDiffusionXLImg2Img": "stable_diffusion_xl/pipeline_stable_diffusion_xl_img2img.py",
    "StableDiffusion3Img2Img": "stable_diffusion_3/pipeline_stable_diffusion_3_img2img.py",
    "FluxImg2Img": "flux/pipeline_flux_img2img.py",
}


@functools.cache
def get_timesteps(pipeline: str) -> Callable[..., tuple[Tensor, int]]:
    """The pipeline's own method, out of its installed source: to import all four takes ten seconds."""
    file = Path(pytest.importorskip("diffusers").__file__).parent / "pipelines" / PIPELINES[pipeline]
    tree = ast.parse(file.read_text())
    method = next(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == "get_timesteps")
    found: dict[str, Any] = {}
    exec(compile(ast.Module([method], []), str(file), "exec"), found)
    return found["get_timesteps"]


class Peer(NamedTuple):
    """A pipeline, its scheduler with these arguments, and the same in fastsample, for a number of steps."""

    pipeline: str
    scheduler: str
    arguments: dict[str, Any]
    ours: Callable[[int], Sampler]
    set_timesteps: Callable[[int], dict[str, Any]] = lambda steps: {"num_inference_steps": steps}
    stochastic: bool = False


def consistency_of(steps: int) -> Consistency:
    scheduler = importlib.import_module("diffusers").CMStochasticIterativeScheduler()
    scheduler.set_timesteps(steps)
    return Consistency(sigmas=scheduler.sigmas[:steps].tolist())


MU = 0.9
PEERS = {
    "ddim": Peer(
        "StableDiffusionImg2Img",
        "DDIMScheduler",
        dict(STABLE_DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
        lambda steps: DDIM(
            SCHEDULE, timesteps=spaced_timesteps(1000, steps=steps, steps_offset=1), final_alpha_cumprod=FIRST
        ),
    ),
    "ddpm": Peer(
        "StableDiffusionImg2Img",
        "DDPMScheduler",
        dict(STABLE_DIFFUSION, clip_sample=False),
        lambda steps: DDPM(SCHEDULE, steps=steps, timesteps="leading"),
        stochastic=True,
    ),
    "dpm_solver": Peer(
        "StableDiffusionXLImg2Img",
        "DPMSolverMultistepScheduler",
        dict(STABLE_DIFFUSION, timestep_spacing="leading", steps_offset=1),
        lambda steps: DPMSolver(SCHEDULE, timesteps=solver_timesteps(1000, "leading", steps, steps_offset=1)),
    ),
    "dpm_solver-karras": Peer(
        "StableDiffusionImg2Img",
        "DPMSolverMultistepScheduler",
        dict(STABLE_DIFFUSION, solver_order=3, use_karras_sigmas=True),
        lambda steps: DPMSolver(SCHEDULE, steps=steps, order=3, timesteps="karras"),
    ),
    "euler": Peer(
        "StableDiffusionXLImg2Img",
        "EulerDiscreteScheduler",
        dict(STABLE_DIFFUSION, timestep_spacing="leading", steps_offset=1),
        lambda steps: Euler(SCHEDULE, timesteps=spaced_timesteps(1000, steps=steps, steps_offset=1)),
    ),
    "euler-linspace": Peer(
        "StableDiffusionImg2Img",
        "EulerDiscreteScheduler",
        STABLE_DIFFUSION,
        lambda steps: Euler(SCHEDULE, steps=steps, timesteps="linspace"),
    ),
    "euler_ancestral": Peer(
        "StableDiffusionImg2Img",
        "EulerAncestralDiscreteScheduler",
        STABLE_DIFFUSION,
        lambda steps: EulerAncestral(SCHEDULE, steps=steps, timesteps="linspace"),
        stochastic=True,
    ),
    "heun": Peer(
        "StableDiffusionImg2Img",
        "HeunDiscreteScheduler",
        STABLE_DIFFUSION,
        lambda steps: Heun(SCHEDULE, steps=steps, timesteps="linspace"),
    ),
    "tcd": Peer(
        "StableDiffusionImg2Img",
        "TCDScheduler",
        {},
        lambda steps: TCD(SCHEDULE, steps=steps),
        stochastic=True,
    ),
    "lcm": Peer(
        "LatentConsistencyModelImg2Img",
        "LCMScheduler",
        {},
        lambda steps: LCM(SCHEDULE, steps=steps),
        stochastic=True,
    ),
    "lcm-given": Peer(
        "LatentConsistencyModelImg2Img",
        "LCMScheduler",
        {},
        lambda steps: LCM(SCHEDULE, timesteps=spaced_timesteps(1000, "lcm", steps)),
        lambda steps: {"timesteps": spaced_timesteps(1000, "lcm", steps).tolist()},
        stochastic=True,
    ),
    "consistency": Peer(
        "StableDiffusionImg2Img", "CMStochasticIterativeScheduler", {}, consistency_of, stochastic=True
    ),
    "flow-euler": Peer(
        "StableDiffusion3Img2Img",
        "FlowMatchEulerDiscreteScheduler",
        {"shift": 3.0},
        lambda steps: Euler(steps=steps, prediction="flow", shift=3.0),
    ),
    "flow-euler-flux": Peer(
        "FluxImg2Img",
        "FlowMatchEulerDiscreteScheduler",
        {"use_dynamic_shifting": True},
        lambda steps: Euler(steps=steps, timesteps="trailing", prediction="flow", shift=math.exp(MU)),
        lambda steps: {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": MU},
    ),
    "flow-heun": Peer(
        "StableDiffusion3Img2Img",
        "FlowMatchHeunDiscreteScheduler",
        {"shift": 3.0},
        lambda steps: Heun(steps=steps, prediction="flow", shift=3.0),
    ),
}


@functools.cache
def scheduler_of(name: str) -> Any:
    return getattr(pytest.importorskip("diffusers"), PEERS[name].scheduler)(**PEERS[name].arguments)


def peer_times(name: str, steps: int, strength: float) -> tuple[Any, Tensor]:
    """The scheduler and the times that the pipeline has it visit: none where it refuses."""
    peer, scheduler = PEERS[name], scheduler_of(name)
    if peer.pipeline == "LatentConsistencyModelImg2Img":
        try:
            scheduler.set_timesteps(**peer.set_timesteps(steps), strength=strength)
        except ValueError:
            return scheduler, torch.empty(0)
        return scheduler, scheduler.timesteps
    scheduler.set_timesteps(**peer.set_timesteps(steps))
    times, left = get_timesteps(peer.pipeline)(SimpleNamespace(scheduler=scheduler), steps, strength, "cpu")
    return scheduler, times if left >= 1 else torch.empty(0)


def peer_run(scheduler: Any, times: Tensor, z: Tensor, noise: Tensor) -> Tensor:
    """CLEAN, noised with z to the level of the first of these times and denoised; every row adds the same noise."""
    first = times[:1].repeat(len(CLEAN))
    flow = hasattr(scheduler, "scale_noise")
    x = scheduler.scale_noise(CLEAN, first, z) if flow else scheduler.add_noise(CLEAN, z, first)
    module = sys.modules[type(scheduler).__module__]
    with patch.object(module, "randn_tensor", lambda *_, **__: noise, create=True):
        for t in times:
            given = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(toy_model(given, t.expand(len(x))), t, x).prev_sample
    return x


def times_of(sampler: Sampler, strength: float) -> list[float]:
    return [step.t for step in sampler.iterate(toy_model, CLEAN, strength=strength)]


# The live consistency scheduler knows 40 timesteps.
GRID = [(name, steps) for name in PEERS for steps in STEPS if name != "consistency" or steps <= 40]


@pytest.mark.parametrize(("name", "steps"), GRID)
def test_the_times_are_those_of_the_pipeline(name: str, steps: int) -> None:
    sampler = PEERS[name].ours(steps)
    for strength in STRENGTHS:
        _, times = peer_times(name, steps, strength)
        if len(times) == 0:
            with pytest.raises(ValueError, match="strength"):
                sampler.iterate(toy_model, CLEAN, strength=strength)
            continue
        # Theirs are float32, rounded several times on the way to 1000 sigma; karras times are the interpolated ones.
        np.testing.assert_allclose(times_of(sampler, strength), times.numpy(), rtol=0, atol=1e-3, err_msg=f"{strength}")


# With given timesteps LCMScheduler takes the whole list for what it visits, and adds noise in the last step too.
@pytest.mark.parametrize("name", sorted({*PEERS} - {"lcm-given"}))
def test_whole_runs_are_those_of_the_pipeline(name: str) -> None:
    """From the same clean sample and noise, with one tensor as the noise of every row: so the level it is noised to is
    theirs too. Float32 tables and 28 rows: within 1e-4 of the largest value."""
    z, noise = ops.randn(SHAPE, seed=9), ops.randn(SHAPE, seed=10)
    for steps, strength in [(4, 0.5), (7, 0.3), (10, 0.58), (28, 0.6)]:
        scheduler, times = peer_times(name, steps, strength)
        x = peer_run(scheduler, times, z, noise)
        noised: dict[str, Any] = {"noise": lambda k: noise} if PEERS[name].stochastic else {}
        got = PEERS[name].ours(steps)(toy_model, CLEAN, strength=strength, seed=9, **noised)
        assert (got - x).abs().max() <= 1e-4 * x.abs().max(), (steps, strength)


# The two halves of a run that SDXL's base and refiner share


@pytest.mark.parametrize("name", ["ddim", "dpm_solver", "euler", "euler_ancestral", "heun"])
def test_start_step_is_where_a_refiner_starts(name: str) -> None:
    """denoising_start of StableDiffusionXLImg2ImgPipeline, by the expression in docs/from-diffusers.md."""
    scheduler = scheduler_of(name)
    for steps, share in itertools.product((5, 25, 40), (0.3, 0.5, 0.8, 0.9)):
        scheduler.set_timesteps(steps)
        get = get_timesteps("StableDiffusionXLImg2Img")
        times, left = get(SimpleNamespace(scheduler=scheduler), steps, 1.0, "cpu", denoising_start=share)
        if left == 0 or (name == "heun" and left < 2):
            continue
        sampler = PEERS[name].ours(steps)
        start = int((sampler.table.t >= round(1000 - share * 1000)).sum())
        start -= start % 2 if name == "heun" else 0
        seen = [step.t for step in sampler.iterate(toy_model, CLEAN, start_step=start)]
        np.testing.assert_allclose(seen, times.numpy(), rtol=0, atol=1e-3)


# Given timesteps that begin part-way

GIVEN = [601, 401, 201, 1]
PARTIAL: dict[str, tuple[dict[str, Any], Callable[[], Sampler]]] = {
    "ddpm": ({"timesteps": GIVEN}, lambda: DDPM(SCHEDULE, timesteps=GIVEN)),
    "dpm_solver": ({"timesteps": GIVEN}, lambda: DPMSolver(SCHEDULE, timesteps=GIVEN)),
    "euler": ({"timesteps": GIVEN}, lambda: Euler(SCHEDULE, timesteps=GIVEN)),
    "heun": ({"timesteps": GIVEN}, lambda: Heun(SCHEDULE, timesteps=GIVEN)),
    "lcm": ({"timesteps": GIVEN}, lambda: LCM(SCHEDULE, timesteps=GIVEN)),
    "tcd": ({"timesteps": GIVEN}, lambda: TCD(SCHEDULE, timesteps=GIVEN)),
    "consistency": ({"timesteps": [22, 5]}, lambda: Consistency(sigmas=karras_sigmas(80.0, 0.002, 40)[[5, 22]])),
    "flow-euler": (
        {"sigmas": [0.6, 0.3, 0.1]},
        lambda: Euler(prediction="flow", timesteps=[1000 * shifted(s) for s in (0.6, 0.3, 0.1)]),
    ),
}


def shifted(s: float) -> float:
    return 3 * s / (1 + 2 * s)


@pytest.mark.parametrize("name", PARTIAL)
def test_given_timesteps_begin_at_the_level_of_their_first(name: str) -> None:
    arguments, ours = PARTIAL[name]
    scheduler = scheduler_of(name)
    scheduler.set_timesteps(**arguments)
    z, noise = ops.randn(SHAPE, seed=9), ops.randn(SHAPE, seed=10)
    want = peer_run(scheduler, scheduler.timesteps, z, noise)
    noised: dict[str, Any] = {"noise": lambda k: noise} if PEERS[name].stochastic else {}
    got = ours()(toy_model, CLEAN, strength=1.0, seed=9, **noised)
    assert (got - want).abs().max() <= 1e-4 * want.abs().max()


# What a latent consistency model's strength means


@pytest.mark.parametrize(("strength", "first"), [(0.8, 799), (0.5, 499), (0.2, 199), (1.0, 999)])
def test_lcm_makes_all_its_steps(strength: float, first: int) -> None:
    times = times_of(LCM(SCHEDULE, steps=4), strength)
    assert len(times) == 4 and times[0] == first
    x = CLEAN.clone().requires_grad_()
    assert LCM(SCHEDULE, steps=4)(toy_model, x, strength=strength, seed=1).requires_grad


def test_lcm_tells_which_strength_has_too_few_timesteps() -> None:
    message = "strength=0.05 leaves 2 of original_steps=50 timesteps, fewer than steps=4"
    with pytest.raises(ValueError, match=message):
        LCM(SCHEDULE, steps=4).iterate(toy_model, CLEAN, strength=0.05)


def test_other_spacings_of_lcm_leave_steps_out() -> None:
    assert times_of(LCM(SCHEDULE, steps=4, timesteps="trailing"), 0.5) == [499, 249]
