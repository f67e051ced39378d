"""What fastsample.from_diffusers says of unknown arguments, and what the samplers that it makes say of themselves."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest

import fastsample
from fastsample import LCM, TCD, Sampler
from fastsample.samplers.diffusers.door import KINDS

SOLVERS = [name for name in KINDS if not name.startswith(("DD", "CM", "LCM", "TCD"))]


def made(name: str, steps: int = 4, **options: Any) -> Sampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fastsample.from_diffusers(getattr(diffusers, name)(**options), steps=steps)


def times_of(name: str, steps: int) -> list[float]:
    scheduler = getattr(diffusers, name)()
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps.tolist()
    return [*times[:1], *times[1::2]] if "Heun" in name else times  # where it lists most of them twice


@pytest.mark.parametrize("name", KINDS)
def test_times_and_steps_are_the_schedulers(name: str) -> None:
    sampler = made(name)
    assert vars(sampler)["timesteps"] == tuple(times_of(name, 4)) and vars(sampler)["steps"] == 4
    assert vars(sampler)["scheduler"] == name


@pytest.mark.parametrize("name", KINDS)
def test_what_it_says_of_itself(name: str) -> None:
    sampler = made(name)
    listed = ", ".join(map(repr, times_of(name, 4)))
    prediction = "" if name.startswith("CM") else f", prediction='{'flow' if 'Flow' in name else 'epsilon'}'"
    if prediction:
        first, second = f"{type(sampler).__name__}(steps=4{prediction}, timesteps=({listed})", f") of {name}"
    else:
        first, second = f"{type(sampler).__name__}(steps=4, timesteps=({listed})", f") of {name}"
    assert repr(sampler).startswith(first) and repr(sampler).endswith(second)
    for again in (copy.copy(sampler), copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert repr(again) == repr(sampler) and again.table == sampler.table


def test_long_lists_are_cut_and_options_are_shown() -> None:
    sampler = made("DPMSolverMultistepScheduler", 20, algorithm_type="sde-dpmsolver++", solver_order=3)
    assert repr(sampler) == (
        "DPMSolverMultistep(steps=20, prediction='epsilon', timesteps=(999, 949, 899, ..., 50), order=3, "
        "algorithm_type='sde-dpmsolver++') of DPMSolverMultistepScheduler"
    )
    whole = fastsample.from_diffusers(diffusers.DDPMScheduler())
    assert repr(whole).endswith(
        "(steps=1000, prediction='epsilon', timesteps=(999, 998, 997, ..., 0)) of DDPMScheduler"
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_another_one_made_of_it_visits_the_same_times(name: str) -> None:
    sampler: Any = made(name)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the row at t")
        warnings.filterwarnings("error", message="x_T is drawn")
        again = dataclasses.replace(sampler)
    assert again == sampler and again.timesteps == sampler.timesteps
    assert np.array_equal(again.table.packed, sampler.table.packed)


def test_those_of_distilled_models_are_our_own() -> None:
    assert isinstance(made("LCMScheduler"), LCM) and isinstance(made("TCDScheduler"), TCD)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("num_inference_steps", "from_diffusers has no argument num_inference_steps; did you mean steps=?"),
        ("stepz", "from_diffusers has no argument stepz; did you mean steps=?"),
        ("device", "device belongs to the sampler's call, not here"),
        ("guidance", "guidance belongs to the sampler's call, not here"),
        ("model", "model belongs to the sampler's call, not here"),
        ("guidance_scale", "did you mean guidance= of the sampler's call?"),
        ("generator", "did you mean seed= or noise= of the sampler's call?"),
        ("latents", "did you mean x= of the sampler's call?"),
        ("clip", "clip is read off the scheduler: change it there, DDIMScheduler.from_config(scheduler.config, ...)"),
        ("prediction", "prediction is read off the scheduler"),
        ("timestep_spacing", "DDIMScheduler.from_config(scheduler.config, timestep_spacing=...)"),
        ("clip_sample", "DDIMScheduler.from_config(scheduler.config, clip_sample=...)"),
        ("mu", "DDIMScheduler.set_timesteps has no argument mu: it takes steps alone"),
        ("sigmas", "DDIMScheduler.set_timesteps has no argument sigmas: it takes steps alone"),
        ("colour", "from_diffusers has no argument colour: beside steps and eta there is what DDIMScheduler.set_times"),
    ],
)
def test_an_argument_that_it_lacks(argument: str, message: str) -> None:
    scheduler = diffusers.DDIMScheduler()
    with pytest.raises(TypeError, match=re.escape(message)):
        fastsample.from_diffusers(scheduler, **{"steps": 4, argument: 1.0})
    assert scheduler.num_inference_steps is None
