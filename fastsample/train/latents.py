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
    """Latents float32 (N, C, H, W) and labels int64 (N,), 0 .. num_classes - 1, or None. Made by `encoded`.

    Raises:
        TypeError, ValueError: tensors of other kinds, or not as many labels as latents.
    """

    latents: Tensor
    labels: Tensor | None = None

    def __post_init__(self) -> None:
        if self.latents.dtype != torch.float32 or self.latents.ndim != 4 or not len(self.latents):
            what = f"{self.latents.dtype} of shape {tuple(self.latents.shape)}"
            raise ValueError(f"latents must be float32 (N, C, H, W), N at least 1, got {what}")
        if self.labels is None:
            return
        if self.labels.dtype != torch.int64:
            raise TypeError(f"labels must be int64, got {self.labels.dtype}")
        if self.labels.shape != self.latents.shape[:1] or int(self.labels.min()) < 0:
            raise ValueError(f"labels must be {len(self.latents)}, none negative")

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
        autoencoder.encode(data.scaled(index).to(device)).cpu().float().contiguous()
        for index in torch.arange(data.count, device="cpu").split(_BATCH)
    ]
    return LatentData(torch.cat(parts), data.labels)
