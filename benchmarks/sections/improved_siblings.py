"""What is read once a process: the sibling models that benchmarks.siblings has trained, and the digits."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import fastsample
from fastsample.train import ImageData, load_data

WEIGHTS, HELD_OUT = "model.safetensors", "mnist5k-held-out"


@dataclass(frozen=True)
class Sibling:
    """A model in the folder of its training."""

    folder: Path

    @property
    def name(self) -> str:
        """As in benchmarks.siblings."""
        return self.folder.name

    @property
    def digest(self) -> str:
        """The first letters of the SHA-256 of its weights."""
        return _digest(self.folder / WEIGHTS)

    def load(self) -> fastsample.zoo.UNet:
        """The model, once a process."""
        return _load(self.folder / WEIGHTS)


@cache
def digits(part: str = HELD_OUT) -> ImageData:
    """mnist5k or a part of it."""
    return load_data(part)


@cache
def _load(path: Path) -> fastsample.zoo.UNet:
    return fastsample.zoo.load(path)


@cache
def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]
