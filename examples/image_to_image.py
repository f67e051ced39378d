"""Image to image: noise is added to an image, and the last part of the steps makes another one of it.

`strength` says how large that part is, and so how far the result may go from the image: 1 is a whole run.
For a real model x is your image as the model's data are, [-1, 1] for pixels or the latents of a VAE.
"""

import torch

import fastsample

model = fastsample.zoo.digits()
classes = {"y": torch.arange(10)}
images = fastsample.unipc(model, (10, 1, 28, 28), steps=10, clip=1.0, seed=0, model_kwargs=classes)

rows = [images]
for strength in (0.3, 0.6, 0.9):
    varied = fastsample.ddim(model, images, steps=20, strength=strength, clip=1.0, seed=1, model_kwargs=classes)
    print(f"strength {strength}: moved by {(varied - images).square().mean().sqrt():.2f}")
    rows.append(varied)
fastsample.save_grid(torch.cat(rows), "image_to_image.png", columns=10)
