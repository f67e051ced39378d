"""An LCM-LoRA makes four steps enough: the file is attached to the UNet, and the scheduler is that of LCMs.

For a real model take from_pretrained and the file of an LCM-LoRA, such as latent-consistency/lcm-lora-sdv1-5.
"""

import tiny
import torch

from fastsample import lora
from fastsample.integrations.diffusers import LCMScheduler

# pipe = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
pipe = tiny.stable_diffusion()
tiny.save_lora(pipe.unet, "pytorch_lora_weights.safetensors")

report = lora.attach(pipe.unet, "pytorch_lora_weights.safetensors")
print(f"{len(report.matched)} layers have the LoRA")
pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)

# A scale of 1 asks the UNet once a step. An LCM-LoRA needs little guidance: 1 to 2.
images = pipe(
    "a fox in the snow", num_inference_steps=4, guidance_scale=1.0, generator=torch.Generator().manual_seed(0)
).images
images[0].save("fox_in_4_steps.png")
