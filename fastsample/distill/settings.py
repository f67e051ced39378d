"""How a student is trained, whatever the method."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fastsample.checks import integer, one_of, real

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Settings:
    """What decides the outcome beside the method.

    Args:
        iterations: batches of every stage. Each is one optimizer step, or one per step of the student (trajectory).
        batch_size: samples of a batch, of each process.
        accumulate: parts that a batch is computed in, one after the other, where memory is short.
        lr: peak learning rate, reached after `warmup` optimizer steps, from where it falls to 0 linearly.
        weight_decay: of AdamW.
        ema_decay: of averaged weights, which are kept then; 0 keeps the last ones. Over few steps the falling learning
            rate averages already.
        precision: what the models compute in: "float32", or "bfloat16" by torch.autocast. Weights stay float32.
        seed: of every batch.

    Raises:
        ValueError, TypeError: a value out of its range, or of another type.
    """

    iterations: int = 1000
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 50
    weight_decay: float = 0.0
    ema_decay: float = 0.0
    precision: str = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        # As Python's own numbers, which checkpoints hold.
        for name in ("iterations", "batch_size", "accumulate"):
            object.__setattr__(self, name, integer(name, getattr(self, name), 1))
        object.__setattr__(self, "warmup", integer("warmup", self.warmup, 0))
        object.__setattr__(self, "seed", integer("seed", self.seed, 0, 2**64 - 1))
        for name in ("lr", "weight_decay", "ema_decay"):
            object.__setattr__(self, name, real(name, getattr(self, name)))
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate must divide batch_size = {self.batch_size}, got {self.accumulate}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive and finite, got {self.lr}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"weight_decay must not be negative, got {self.weight_decay}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must lie in [0, 1), got {self.ema_decay}")
        one_of("precision", self.precision, tuple(PRECISIONS))

    def lr_at(self, update: int, of: int) -> float:
        """The learning rate of an optimizer step, counted from 0, of so many in its stage."""
        rise = min((update + 1) / max(self.warmup, 1), 1.0)
        return self.lr * rise * (1 - update / of)
