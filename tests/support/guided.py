"""A model with one condition, which the tests of guidance share."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample import ops

SHAPE = (3, 2, 5, 4)


COND = {"c": torch.tensor([0.4, -0.3, 0.2]).reshape(3, 1, 1, 1)}


UNCOND = {"c": torch.zeros(3, 1, 1, 1)}


X = ops.randn(SHAPE, seed=5)


def smooth(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    assert len(x) == len(t) == len(c)
    return 0.5 * torch.tanh(x) + c.to(x.dtype) * torch.cos(x)


def model(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
    """Outputs in 64ths below 1, which half precision holds exactly: small whole weights guide them without rounding."""
    return (64 * smooth(x, t, c)).round() / 64
