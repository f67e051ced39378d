"""`torchrun -m support.two_processes FOLDER`: runs whose batches are shared; one process has twice the batch."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import torch

from fastsample.train import AutoencoderSettings, FinetuneSettings, ImageData, finetune, report, train_autoencoder
from support.distillation import SMALL, run, unet

RUNS = ("lcm_lora", "guided", "finetune", "autoencoder")
GENERATOR = torch.Generator().manual_seed(0)
DATA = ImageData(torch.randint(0, 256, (8, 3, 9, 6), dtype=torch.uint8, generator=GENERATOR), torch.arange(8) % 3)
SQUARES = ImageData(torch.randint(0, 256, (8, 3, 8, 8), dtype=torch.uint8, generator=GENERATOR))


def main(folder: Path) -> None:
    """Makes FOLDER/run for each of them, and the first numbers of an autoencoder's statistics by process."""
    torch.set_num_threads(1)
    report._plot = lambda *arguments: None  # which takes longer than all else
    size = 4 // int(os.environ.get("WORLD_SIZE", "1"))
    # At the usual 1e-2 Adam would let the rounding of sums grow with every step.
    settings = replace(SMALL, batch_size=size, lr=1e-3)
    for name in ("lcm_lora", "guided"):
        options = {"target_decay": 0.9} if name == "lcm_lora" else {}
        run(name, unet(), folder / name, settings=settings, **options)
    tuning = FinetuneSettings(steps=6, batch_size=size, warmup=2)
    finetune(unet(), DATA, folder / "finetune", rank=2, held_out=DATA, settings=tuning, progress=False)
    shape = AutoencoderSettings(steps=6, batch_size=size, warmup=2, width=8, latent_channels=2)
    autoencoder = train_autoencoder(SQUARES, folder / "autoencoder", shape, progress=False)
    rank = os.environ.get("RANK", "0")
    torch.save(autoencoder.std.flatten(), folder / f"std-{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
