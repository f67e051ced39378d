"""The samples that a student learns from, where its method needs any."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from fastsample.distill.common import Common
from fastsample.distill.conditions import Conditions
from fastsample.storage.digests import bytes_of
from fastsample.train.data import ImageData
from fastsample.train.latents import LatentData, encoded

Data = Tensor | ImageData | LatentData


class Samples:
    """Samples as the teacher sees them, and the arguments that follow from them.

    Args:
        data: floating-point samples (N, ...), or images or latents with labels.
        common: the arguments of a distillation. An entry of `cond` belongs to a sample.

    Raises:
        TypeError, ValueError: data of another kind, empty, not finite, or not as many as there are conditions.

    Attributes:
        common: the same with the labels of images as cond["y"], where they have some and no cond is given.
        shape: of one sample.
        count: of samples.
    """

    def __init__(self, data: Data, common: Common) -> None:
        self.common: Common = {**common}
        autoencoder = common.get("autoencoder")
        if autoencoder is not None and isinstance(data, ImageData):
            data = encoded(data, autoencoder)
        self._images = data if isinstance(data, ImageData | LatentData) else None
        if isinstance(data, ImageData | LatentData):
            self.shape, self.count = data.shape, data.count
            if data.labels is not None and common.get("cond") is None:
                self.common["cond"] = {"y": data.labels}
        else:
            if not isinstance(data, Tensor) or not data.is_floating_point():
                kind = data.dtype if isinstance(data, Tensor) else type(data).__name__
                raise TypeError(f"data must be a floating-point tensor or images of fastsample.train, got {kind}")
            if data.ndim < 2 or len(data) == 0:
                raise ValueError(f"data must be samples (N, ...), N at least 1, got shape {tuple(data.shape)}")
            if not torch.isfinite(data).all():
                raise ValueError("data must be finite")
            self._tensor = data.detach().float()
            self.shape, self.count = tuple(data.shape[1:]), len(data)

    def check(self, conditions: Conditions) -> None:
        """Raises ValueError unless these have an entry for each sample, or the same for all."""
        if conditions.count not in (1, self.count):
            raise ValueError(f"cond must have an entry for each of {self.count} samples, got {conditions.count}")

    def at(self, index: Tensor) -> Tensor:
        """These samples, float32 on the CPU or where they were given."""
        if self._images is not None:
            return self._images.scaled(index.cpu())
        return self._tensor[index.to(self._tensor.device)]

    def digest(self) -> str:
        """A hash of all samples."""
        if self._images is not None:
            return self._images.digest()
        return hashlib.sha256(bytes_of(self._tensor)).hexdigest()
