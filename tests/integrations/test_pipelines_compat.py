"""Where drop-ins differ by design from diffusers, images do; with compat="diffusers" they are diffusers' again."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from support.pipeline_pairs import (
    SAME,
    Run,
    check_same,
    draws,
    drop_in,
    from_config,
    in_dtype,
    of_images,
    pair,
    picture,
    run,
    unconditional,
    with_scheduler,
)

NOT_FINITE = pytest.mark.filterwarnings("ignore:invalid value encountered in cast:RuntimeWarning")


@pytest.mark.parametrize(("spacing", "steps"), [("linspace", 4), ("trailing", 7)])
def test_ddim_steps_lead_to_the_next_timestep(spacing: str, steps: int) -> None:
    def made() -> Any:
        return with_scheduler("sd", "ddim", timestep_spacing=spacing)

    theirs, ours = pair(made(), lambda pipe: run(pipe, steps))
    apart = (ours.states[-1] - theirs.states[-1]).abs().max() / theirs.states[-1].abs().max()
    assert apart > 20 * SAME
    check_same(*pair(made(), lambda pipe: run(pipe, steps), compat="diffusers"))


def pixels(pipe: Any) -> Run:
    return Run(pipe(num_inference_steps=5, output_type="np", generator=draws()).images)


@NOT_FINITE
@pytest.mark.parametrize(("variance", "channels"), [("fixed_large_log", 3), ("learned", 6)])
def test_variances_that_are_the_root_of_a_negative_number(variance: str, channels: int) -> None:
    scheduler = diffusers.DDPMScheduler(variance_type=variance)
    pipe = unconditional(diffusers.DDPMPipeline, scheduler, out_channels=channels)
    theirs, ours = pair(pipe, pixels)
    assert np.isnan(theirs.image).any() and np.isfinite(ours.image).all() and ours.image.std() > 0.05
    pipe.scheduler = drop_in(scheduler, compat="diffusers")
    assert np.array_equal(np.isnan(pixels(pipe).image), np.isnan(theirs.image))


@NOT_FINITE
@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_epsilon_at_an_alpha_bar_of_0(name: str) -> None:
    given = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs, ours = pair(with_scheduler("sd", name, **given), run)
    assert np.isnan(theirs.image).all() and np.isfinite(ours.image).all()
    pipe = with_scheduler("sd", name, **given)
    pipe.scheduler = drop_in(pipe.scheduler, compat="diffusers")
    assert np.isnan(run(pipe).image).all()


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [
        ("ddim", 10, {"num_train_timesteps": 10, "steps_offset": 1}),
        ("dpm++2m", 10, {"use_beta_sigmas": True, "rescale_betas_zero_snr": True}),
        ("unipc", 10, {"use_beta_sigmas": True, "rescale_betas_zero_snr": True}),
    ],
    ids=["a timestep beyond the schedule", "a first timestep twice", "a first timestep twice in UniPC"],
)
def test_runs_that_diffusers_does_not_end(name: str, steps: int, options: dict[str, Any]) -> None:
    pipe = with_scheduler("sd", name, **options)
    for scheduler in (pipe.scheduler, drop_in(pipe.scheduler, compat="diffusers")):
        pipe.scheduler = scheduler
        with pytest.raises((IndexError, AssertionError, ValueError)):
            run(pipe, steps)
    pipe.scheduler = drop_in(from_config(pipe.scheduler.config, name), compat=None)
    found = run(pipe, steps)
    assert len(found.states) == steps and np.isfinite(found.image).all()


@pytest.mark.parametrize("name", ["ddim", "lcm"])
def test_noise_of_an_image_is_added_in_float32(name: str) -> None:
    """Of the alpha bars of the first timesteps bfloat16 leaves no noise."""
    given = {"steps": 10, "strength": 0.1, "image": picture().to(torch.bfloat16)}

    def made() -> Any:
        return of_images(diffusers.StableDiffusionImg2ImgPipeline, in_dtype(with_scheduler("sd", name), torch.bfloat16))

    theirs, ours = pair(made(), lambda pipe: run(pipe, **given))
    apart = (ours.states[0] - theirs.states[0]).abs().max() / theirs.states[0].abs().max()
    assert apart > 0.02
    _, same = pair(made(), lambda pipe: run(pipe, **given), compat="diffusers")
    assert (same.states[0] - theirs.states[0]).abs().max() <= 2**-7 * theirs.states[0].abs().max()
