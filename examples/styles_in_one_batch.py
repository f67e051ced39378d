"""A style for each image of one batch: LoRAs are attached once, and an index tells which one a sample gets.

For a real model attach your style files to `pipe.unet`. Under classifier-free guidance both halves are one batch:
give `torch.cat([index, index])`.
"""

import torch

import fastsample
from fastsample import lora

model = fastsample.zoo.digits()
leaning = fastsample.zoo.LORAS["leaning"]  # trained on digits that lean to the left
lora.attach(model, leaning, name="left")
lora.attach(model, leaning, name="right", scale=-0.5)
lora.set_adapters(model, {"left": 1.0, "right": 1.0})  # their order is what the index counts

none, left, right = -1, 0, 1
lora.set_adapter_index(model, torch.tensor([none] * 10 + [left] * 10 + [right] * 10))
digits = fastsample.ddim(
    model,
    (30, 1, 28, 28),
    steps=10,
    clip=1.0,
    seed=list(range(10)) * 3,  # the same noise for each style
    model_kwargs={"y": torch.arange(10).repeat(3)},
)
fastsample.save_grid(digits, "styles_in_one_batch.png", columns=10)
