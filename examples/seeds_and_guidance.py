"""A seed and a guidance scale for each sample of one batch, as a server has them from different requests.

A sample is the one that its seed gives alone. For a real model `cond` and `uncond` hold the embeddings of the prompts
and of the empty one, a row for each sample.
"""

import torch

import fastsample

model = fastsample.zoo.digits()
seeds, scales = [11, 12, 12, 13], [1.5, 1.0, 4.0, 2.0]
classes, any_digit = torch.tensor([2, 5, 5, 8]), torch.full((4,), 10)

digits = fastsample.ddim(
    model,
    (4, 1, 28, 28),
    steps=20,
    clip=1.0,
    seed=seeds,
    guidance=scales,
    cond={"y": classes},
    uncond={"y": any_digit},
)
fastsample.save_grid(digits, "seeds_and_guidance.png", columns=4)
