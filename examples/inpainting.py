"""Inpainting by a mask: the upper halves of ten digits are kept, the lower halves are filled in.

For a real model: `known` is your image as the model's data are, [-1, 1] for pixels or the latents of a VAE,
and `mask` is 1 where it is to be filled in, of the same height and width.
"""

import torch

import fastsample

model = fastsample.zoo.digits()
classes = {"y": torch.arange(10)}
known = fastsample.unipc(model, (10, 1, 28, 28), steps=10, clip=1.0, seed=0, model_kwargs=classes)

mask = torch.zeros(28, 28)
mask[14:] = 1
filled = fastsample.ddim(model, known.shape, steps=20, seed=1, mask=mask, known=known, model_kwargs=classes)

assert torch.equal(filled[:, :, :14], known[:, :, :14])
fastsample.save_grid(torch.cat([known, filled]), "inpainting.png", columns=10)
