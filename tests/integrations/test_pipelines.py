"""Pipelines of texts make the same images with a drop-in scheduler in the place of diffusers'."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from support.pipeline_pairs import (
    ONE_OF_EACH,
    OTHER,
    SCHEDULERS,
    Run,
    check_pair,
    conditioned,
    draws,
    drop_in,
    embeds,
    of_images,
    picture,
    run,
    with_scheduler,
)

# Pipelines of Stable Diffusion say so of a DDPMScheduler that clips.
pytestmark = pytest.mark.filterwarnings("ignore:The configuration file of this scheduler:FutureWarning")
FLOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shifted": {"shift": 3.0},
    "karras": {"use_karras_sigmas": True},
    "dynamic": {"use_dynamic_shifting": True},
    "terminal": {"shift_terminal": 0.1},
}

IMAGE_TO_IMAGE = {
    "sd": diffusers.StableDiffusionImg2ImgPipeline,
    "sdxl": diffusers.StableDiffusionXLImg2ImgPipeline,
    "sd3": diffusers.StableDiffusion3Img2ImgPipeline,
    "flux": diffusers.FluxImg2ImgPipeline,
}
INPAINTING = {
    "sd": diffusers.StableDiffusionInpaintPipeline,
    "sdxl": diffusers.StableDiffusionXLInpaintPipeline,
    "flux": diffusers.FluxInpaintPipeline,
}


def mask() -> torch.Tensor:
    left = torch.zeros(1, 1, 8, 8)
    left[..., :4] = 1
    return left


def of_flow(kind: str, name: str) -> Any:
    pipeline = conditioned(kind)
    pipeline.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(**FLOWS[name])
    return pipeline


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion(name: str) -> None:
    check_pair(with_scheduler("sd", name), lambda pipe: run(pipe, 5, samples=2, guidance_scale=5.0))


def test_each_scheduler_makes_an_image_of_its_own() -> None:
    """So that an image which is the same says which steps were taken."""
    images = {}
    for name in SCHEDULERS:
        pipe = with_scheduler("sd", name)
        pipe.scheduler = drop_in(pipe.scheduler)
        images[name] = run(pipe, 5).image
    near = [names for names in combinations(images, 2) if np.abs(images[names[0]] - images[names[1]]).max() <= OTHER]
    assert not near


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_stable_diffusion_xl_with_rescaled_guidance(name: str) -> None:
    check_pair(with_scheduler("sdxl", name), lambda pipe: run(pipe, 5, guidance_rescale=0.5))


@pytest.mark.parametrize(
    ("kind", "name", "strength"),
    [
        *(("sd", name, 0.7) for name in SCHEDULERS),
        *(("sd", name, strength) for name in ("ddim", "lcm", "dpm++3m", "euler") for strength in (0.3, 1.0)),
        *(("sdxl", name, 0.6) for name in ONE_OF_EACH),
    ],
)
def test_image_to_image(kind: str, name: str, strength: float) -> None:
    pipe = of_images(IMAGE_TO_IMAGE[kind], with_scheduler(kind, name))
    check_pair(pipe, lambda pipe: run(pipe, 5, samples=2, image=picture(2), strength=strength))


@pytest.mark.parametrize(("kind", "name"), [*product(["sd", "sdxl"], ONE_OF_EACH)])
def test_inpainting(kind: str, name: str) -> None:
    pipe = of_images(INPAINTING[kind], with_scheduler(kind, name))
    given = {"image": picture(), "mask_image": mask(), "strength": 0.8, "height": 8, "width": 8}
    check_pair(pipe, lambda pipe: run(pipe, 5, **given))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_two_pipelines_share_the_steps_of_stable_diffusion_xl(name: str) -> None:
    def halves(pipe: Any) -> Run:
        given = {"num_inference_steps": 5, "output_type": "latent", "height": 8, "width": 8}
        first = pipe(**embeds(pipe), **given, denoising_end=0.5, generator=draws()).images
        refiner = of_images(diffusers.StableDiffusionXLImg2ImgPipeline, pipe)
        out = run(refiner, 5, image=first, denoising_start=0.5)
        return Run(out.image, [first, *out.states])

    check_pair(with_scheduler("sdxl", name), halves)


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_flows(kind: str, name: str) -> None:
    check_pair(of_flow(kind, name), lambda pipe: run(pipe, 4, samples=2))


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_sigmas_of_ones_own(kind: str) -> None:
    check_pair(of_flow(kind, "shifted"), lambda pipe: run(pipe, 4, sigmas=[1.0, 0.9, 0.4, 0.1]))


@pytest.mark.parametrize(
    ("kind", "name"), [*(("sd", name) for name in ("ddpm", "lcm", "tcd", "dpm++2m")), ("sdxl", "euler")]
)
def test_timesteps_of_ones_own(kind: str, name: str) -> None:
    check_pair(with_scheduler(kind, name), lambda pipe: run(pipe, None, timesteps=[960, 700, 240, 20]))


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_sigmas_of_ones_own_for_euler(kind: str) -> None:
    check_pair(with_scheduler(kind, "euler"), lambda pipe: run(pipe, None, sigmas=[14.0, 3.5, 1.25, 0.1]))


@pytest.mark.parametrize(("name", "given"), [("ddim", "timesteps"), ("unipc", "timesteps"), ("dpm++2m", "sigmas")])
def test_timesteps_where_diffusers_takes_none(name: str, given: str) -> None:
    pipe = with_scheduler("sd", name)
    for scheduler in (pipe.scheduler, drop_in(pipe.scheduler)):
        pipe.scheduler = scheduler
        with pytest.raises(ValueError, match="does not support custom"):
            run(pipe, None, **{given: [900, 500]})


@pytest.mark.parametrize("kind", ["sd3", "flux"])
def test_image_to_image_by_flows(kind: str) -> None:
    pipe = of_images(IMAGE_TO_IMAGE[kind], of_flow(kind, "shifted"))
    check_pair(pipe, lambda pipe: run(pipe, 5, image=picture(), strength=0.6, height=8, width=8))


def test_inpainting_by_a_flow() -> None:
    pipe = of_images(INPAINTING["flux"], of_flow("flux", "shifted"))
    given = {"image": picture(), "mask_image": mask(), "strength": 0.6, "height": 8, "width": 8}
    check_pair(pipe, lambda pipe: run(pipe, 5, **given))


def test_a_flow_with_noise_draws_it_from_torch() -> None:
    """These pipelines give their generator to no step."""

    def seeded(pipe: Any) -> Run:
        torch.manual_seed(3)
        return run(pipe, 4)

    pipe = conditioned("sd3")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with torch.random.fork_rng(devices=[]):
        check_pair(pipe, seeded)


SOLVERS_OF_FLOWS = ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"]


def solver_of_a_flow(name: str) -> Any:
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return getattr(diffusers, name)(**options)


@pytest.mark.parametrize("name", SOLVERS_OF_FLOWS)
def test_solvers_of_flows(name: str) -> None:
    pipe = conditioned("sd3")
    pipe.scheduler = solver_of_a_flow(name)
    check_pair(pipe, lambda pipe: run(pipe, 5))


@pytest.mark.parametrize("name", [*SOLVERS_OF_FLOWS, "FlowMatchEulerDiscreteScheduler"])
def test_videos(name: str) -> None:
    pipe = conditioned("wan")
    if name in SOLVERS_OF_FLOWS:
        pipe.scheduler = solver_of_a_flow(name)
    found = check_pair(pipe, lambda pipe: run(pipe, 5, height=16, width=16, num_frames=5))
    assert found.states[0].shape == (1, 16, 2, 2, 2) and found.image.shape == (1, 5, 16, 16, 3)
