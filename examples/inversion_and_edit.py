"""Editing by inversion: the noise that makes a digit makes another digit of the same hand, given another class.

For a real model `x0` is your image or its latents, and the classes are the prompts before and after and the empty one.
More steps bring the sample back more closely, and more guidance changes it more.
"""

import torch

import fastsample

model = fastsample.zoo.digits()
threes, eights, any_digit = ({"y": torch.full((8,), number)} for number in (3, 8, 10))
x0 = fastsample.unipc(model, (8, 1, 28, 28), steps=10, clip=1.0, seed=0, model_kwargs=threes)

# Below 900, since next to pure noise the model's errors weigh most.
timesteps = fastsample.spaced_timesteps(900, steps=30)
noise = fastsample.ddim_invert(model, x0, timesteps=timesteps, model_kwargs=threes)
again = fastsample.ddim(model, noise, timesteps=timesteps, model_kwargs=threes)
edited = fastsample.ddim(model, noise, timesteps=timesteps, clip=1.0, guidance=3.0, cond=eights, uncond=any_digit)

print(f"relative error of the way to noise and back: {(again - x0).norm() / x0.norm():.3f}")
fastsample.save_grid(torch.cat([x0, again, edited]), "inversion_and_edit.png", columns=8)
