"""Text to image by a pipeline of diffusers, with fastsample's step in its scheduler's place.

The images are those of diffusers' scheduler, from the same generator.
For a real model take from_pretrained, as the comment says, and leave out width and height.
"""

import tiny
import torch

from fastsample.integrations.diffusers import DDIMScheduler

# pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
pipe = tiny.stable_diffusion()
pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)

images = pipe(
    "a fox in the snow",
    negative_prompt="blurry",
    num_inference_steps=20,
    guidance_scale=7.5,
    generator=torch.Generator().manual_seed(0),
).images
images[0].save("fox.png")
