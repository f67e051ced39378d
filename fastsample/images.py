"""Samples as pictures."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.checks import check_floating


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes: (x + 1) 127.5, clamped to [0, 255] and rounded to the nearest, halves up.

    NaN becomes 0. Computed in float32 (float64 for a float64 x), so that values within 1e-5 of a half may go either
    way.

    Args:
        x: (B, C, H, W), floating point, of any strides. Never modified.

    Returns:
        uint8 (B, H, W, C), contiguous: what matplotlib and video writers take, and Pillow for C = 3; where C = 1 Pillow
        wants the axis gone, Image.fromarray(images[0, ..., 0].numpy()).

    Raises:
        TypeError: for what is no floating-point tensor. ValueError: for one that is not 4-D.

    Example:
        >>> to_uint8(torch.tensor([-1.0, 0.0, 0.5, 7.0]).reshape(1, 1, 2, 2)).flatten().tolist()
        [0, 128, 191, 255]
    """
    check_floating("x", x)
    if x.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W), got shape {tuple(x.shape)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The conversion truncates: 127.5 and a half to round with.
    levels = x.detach().to(dtype).mul(127.5).add_(128).nan_to_num_(0).clamp_(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
