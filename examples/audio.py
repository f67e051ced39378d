"""Sound (B, C, L) by a model of waves that predicts v: diffusers' UNet1DModel of Dance Diffusion, and a .wav file.

For a real model take from_pretrained, as the comment says. Its time u goes from 0 to 1, where the noise levels are
cos(pi u / 2) and sin(pi u / 2); for a model with timesteps 0 to 999 leave `model` out and take its schedule.
"""

import math
import wave

import torch
from diffusers import UNet1DModel

import fastsample

# UNet1DModel.from_pretrained("harmonai/maestro-150k", subfolder="unet", time_embedding_dim=16)
unet = UNet1DModel(sample_size=1024, sample_rate=16000, extra_in_channels=16, block_out_channels=(8, 32, 32)).eval()
u = torch.arange(1, 1000, dtype=torch.float64) / 1000
schedule = fastsample.Schedule.from_alphas_cumprod((math.pi / 2 * u).cos().square())


def model(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    sample: torch.Tensor = unet(x, (t + 1) / 1000).sample
    return sample


shape = (1, unet.config.in_channels, unet.config.sample_size)
sound = fastsample.unipc(model, shape, schedule=schedule, prediction="v", steps=8, clip=1.0, seed=0)

with wave.open("sound.wav", "wb") as file:
    file.setnchannels(unet.config.in_channels)
    file.setsampwidth(2)
    file.setframerate(unet.config.sample_rate)
    file.writeframes((32767 * sound[0].T).to(torch.int16).numpy().tobytes())
