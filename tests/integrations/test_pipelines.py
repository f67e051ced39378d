"""Pipelines of texts make the same images with a drop-in scheduler in the place of diffusers'."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from support.pipeline_pairs import (
    SCHEDULERS,
    Run,
    check_pair,
    conditioned,
    draws,
    embeds,
    of_images,
    picture,
    run,
    with_scheduler,
)

FLOWS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shifted": {"shift": 3.0},
    "karras": {"use_karras_sigmas": True},
    "dynamic": {"use_dynamic_shifting": True},
    "terminal": {"shift_terminal": 0.1},
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


@pytest.mark.parametrize("name", SCHEDULERS)
def test_stable_diffusion_xl_with_rescaled_guidance(name: str) -> None:
    check_pair(with_scheduler("sdxl", name), lambda pipe: run(pipe, 5, guidance_rescale=0.5))


@pytest.mark.parametrize("strength", [0.3, 1.0])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_image_to_image(name: str, strength: float) -> None:
    pipe = of_images(diffusers.StableDiffusionImg2ImgPipeline, with_scheduler("sd", name))
    check_pair(pipe, lambda pipe: run(pipe, 5, samples=2, image=picture(2), strength=strength))


@pytest.mark.parametrize("name", SCHEDULERS)
def test_inpainting(name: str) -> None:
    pipe = of_images(diffusers.StableDiffusionInpaintPipeline, with_scheduler("sd", name))
    given = {"image": picture(), "mask_image": mask(), "strength": 0.8, "height": 8, "width": 8}
    check_pair(pipe, lambda pipe: run(pipe, 5, **given))


@pytest.mark.parametrize("name", SCHEDULERS)
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


@pytest.mark.parametrize("name", ["ddpm", "lcm", "dpm++2m", "euler"])
def test_timesteps_of_ones_own(name: str) -> None:
    check_pair(with_scheduler("sd", name), lambda pipe: run(pipe, None, timesteps=[960, 700, 240, 20]))


@pytest.mark.parametrize(
    "kind", [diffusers.StableDiffusion3Img2ImgPipeline, diffusers.FluxImg2ImgPipeline], ids=["sd3", "flux"]
)
def test_image_to_image_by_flows(kind: Any) -> None:
    pipe = of_images(kind, of_flow("sd3" if "Diffusion3" in kind.__name__ else "flux", "shifted"))
    check_pair(pipe, lambda pipe: run(pipe, 5, image=picture(), strength=0.6, height=8, width=8))


def test_a_flow_with_noise_draws_it_from_torch() -> None:
    """These pipelines give their generator to no step."""

    def seeded(pipe: Any) -> Run:
        torch.manual_seed(3)
        return run(pipe, 4)

    pipe = conditioned("sd3")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    with torch.random.fork_rng(devices=[]):
        check_pair(pipe, seeded)


@pytest.mark.parametrize("kind", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
def test_solvers_of_flows(kind: str) -> None:
    pipe = conditioned("sd3")
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    pipe.scheduler = getattr(diffusers, kind)(**options)
    check_pair(pipe, lambda pipe: run(pipe, 5))
