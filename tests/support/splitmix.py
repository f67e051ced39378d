"""A sample's Philox key in plain Python's integers: an independent statement."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

WRAP = 2**64


def mix(value: int) -> int:
    """splitmix64's finaliser (Steele, Lea & Flood 2014)."""
    value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 % WRAP
    value = (value ^ value >> 27) * 0x94D049BB133111EB % WRAP
    return value ^ value >> 31


def key(seed: int, place: int) -> int:
    return mix((mix(seed % WRAP) + place) % WRAP)


def signed(values: Iterable[int]) -> Tensor:
    """64-bit words as int64."""
    return torch.tensor([value - WRAP if value >= WRAP // 2 else value for value in values])
