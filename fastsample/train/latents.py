"""Training data of a latent model: what an autoencoder makes of images."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

from fastsample.train.data import ImageData
from fastsample.zoo.autoencoder import Autoencoder

_BATCH = 250


@dataclass(frozen=True)
class LatentData:
    """Latents float32 (N, C, H, W) and labels int64 (N,), 0 .. num_classes - 1, or None. Made by `encoded`."""

    latents: Tensor
    labels: Tensor | None = None

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self.latents)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one of them."""
        return tuple(self.latents.shape[1:])

    @property
    def num_classes(self) -> int:
        """One more than the largest label; 0 without labels."""
        return 0 if self.labels is None else int(self.labels.max()) + 1

    def scaled(self, index: Tensor) -> Tensor:
        """The latents at index."""
        return self.latents[index]

    def digest(self) -> str:
        """SHA-256 of latents and labels, to tell data sets apart."""
        sha = hashlib.sha256(self.latents.contiguous().numpy().tobytes())
        if self.labels is not None:
            sha.update(self.labels.contiguous().numpy().tobytes())
        return sha.hexdigest()


@torch.no_grad()
def encoded(data: ImageData, autoencoder: Autoencoder) -> LatentData:
    """The latents of images, with their labels.

    Raises:
        ValueError: the autoencoder is for images of another shape.
    """
    device = autoencoder.mean.device
    parts = [
        autoencoder.encode(data.scaled(index).to(device)).cpu().contiguous()
        for index in torch.arange(data.count).split(_BATCH)
    ]
    return LatentData(torch.cat(parts), data.labels)
