"""Pipelines that ask more of schedulers than steps from noise: two of them, the way to noise, continuous times."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers

from support.pipeline_pairs import Run, check_pair, conditioned, draws, embeds, from_config, picture
from support.small_pipelines import quiet, unet

OF_LATENTS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def parts(scheduler: Any, **options: Any) -> dict[str, Any]:
    """Those of Stable Diffusion, whose network has these options where they are given."""
    found = {**conditioned("sd").components, "scheduler": scheduler}
    del found["image_encoder"]
    if options:
        torch.manual_seed(0)
        found["unet"] = unet(**options)
    return found


def prompts() -> dict[str, Any]:
    return embeds(conditioned("sd"))


@pytest.mark.parametrize("name", ["ddim", "dpm++2m", "euler", "euler-ancestral"])
def test_instructions(name: str) -> None:
    """Where the network sees more than the state, which alone is scaled."""
    given = parts(from_config(OF_LATENTS, name, clip_sample=False), in_channels=8)
    pipe = quiet(diffusers.StableDiffusionInstructPix2PixPipeline(**given, requires_safety_checker=False))

    def call(pipe: Any) -> Run:
        options = {"image": picture(), "num_inference_steps": 4, "output_type": "np", "generator": draws()}
        return Run(pipe(**prompts(), **options).images)

    check_pair(pipe, call)


@pytest.mark.filterwarnings("ignore:The configuration file of the vae:FutureWarning")
def test_upscaling_adds_the_noise_of_another_scheduler() -> None:
    given = parts(from_config(OF_LATENTS, "ddim", clip_sample=False), in_channels=7, num_class_embeds=1000)
    del given["safety_checker"], given["feature_extractor"]
    noising = diffusers.DDPMScheduler()
    pipe = quiet(diffusers.StableDiffusionUpscalePipeline(**given, low_res_scheduler=noising))

    def call(pipe: Any) -> Run:
        options = {"num_inference_steps": 4, "output_type": "np", "generator": draws()}
        return Run(pipe(**prompts(), image=picture(), noise_level=20, **options).images)

    check_pair(pipe, call, parts=["scheduler", "low_res_scheduler"])


@pytest.mark.parametrize("to_one", [True, False], ids=["from 1", "from the first alpha bar"])
def test_edits_of_what_was_taken_to_noise(to_one: bool) -> None:
    options = {**OF_LATENTS, "clip_sample": False, "steps_offset": 1, "set_alpha_to_one": to_one}
    inverse = diffusers.DDIMInverseScheduler(**options)
    given = {**parts(diffusers.DDIMScheduler(**options)), "inverse_scheduler": inverse}
    pipe = quiet(diffusers.StableDiffusionDiffEditPipeline(**given, requires_safety_checker=False))

    def call(pipe: Any) -> Run:
        shared = {**prompts(), "num_inference_steps": 5, "inpaint_strength": 0.8}
        noise = pipe.invert(**shared, image=picture(), generator=draws(), decode_latents=False).latents
        left = np.zeros((1, 8, 8), np.float32)
        left[..., :4] = 1
        edited = pipe(**shared, mask_image=left, image_latents=noise, generator=draws(), output_type="np")
        return Run(edited.images, [noise])

    check_pair(pipe, call, parts=["scheduler", "inverse_scheduler"])


def stable_video() -> Any:
    """Of the shape of Stable Video Diffusion, with its scheduler of continuous times."""
    torch.manual_seed(0)
    network = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=8,
        block_out_channels=(32,),
        layers_per_block=1,
        num_attention_heads=(2,),
        down_block_types=("CrossAttnDownBlockSpatioTemporal",),
        up_block_types=("UpBlockSpatioTemporal",),
        cross_attention_dim=16,
        projection_class_embeddings_input_dim=24,
        addition_time_embed_dim=8,
    )
    decoder = diffusers.AutoencoderKLTemporalDecoder(block_out_channels=(32,), down_block_types=("DownEncoderBlock2D",))
    sees = transformers.CLIPVisionConfig(
        hidden_size=16,
        projection_dim=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=16,
        intermediate_size=16,
        patch_size=8,
    )
    scheduler = diffusers.EulerDiscreteScheduler(
        **OF_LATENTS,
        prediction_type="v_prediction",
        timestep_type="continuous",
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    return quiet(
        diffusers.StableVideoDiffusionPipeline(
            vae=decoder.eval(),
            image_encoder=transformers.CLIPVisionModelWithProjection(sees).eval(),
            unet=network.eval(),
            scheduler=scheduler,
            feature_extractor=transformers.CLIPImageProcessor(size=16, crop_size=16),
        )
    )


def test_videos_of_a_picture() -> None:
    def call(pipe: Any) -> Run:
        states = []

        def keep(pipe: Any, step: int, t: Any, seen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            states.append(seen["latents"].clone())
            return seen

        given = {"image": torch.rand(1, 3, 16, 16, generator=draws(2)), "height": 16, "width": 16, "num_frames": 2}
        options = {"num_inference_steps": 4, "output_type": "np", "generator": draws()}
        return Run(np.asarray(pipe(**given, **options, callback_on_step_end=keep).frames), states)

    assert len(check_pair(stable_video(), call).states) == 4
