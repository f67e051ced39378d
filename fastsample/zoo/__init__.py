"""Small trained models for trying out samplers."""

from __future__ import annotations

from pathlib import Path

from fastsample.zoo.store import load, save
from fastsample.zoo.unet import UNet, UNetConfig

__all__ = ["UNet", "UNetConfig", "digits", "load", "save"]

_DIGITS = Path(__file__).with_name("digits.safetensors")


def digits() -> UNet:
    """The bundled model of handwritten digits: 1 x 28 x 28, ten classes, cosine schedule of 1000 timesteps.

    It predicts epsilon and a learned variance; class 10 stands for "any digit". The last timesteps of a cosine schedule
    are next to pure noise. A sampler that is told to start there needs clip=1.0, and `heun` also timesteps="karras".

    Raises:
        FileNotFoundError: the weights are not installed.
    """
    if not _DIGITS.is_file():
        raise FileNotFoundError(f"the bundled digits model is missing: {_DIGITS} (reinstall fastsample)")
    return load(_DIGITS)
