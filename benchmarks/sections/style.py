"""A style that a number can tell: digits that lean to the left."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from fastsample.train import ImageData

SHEAR = -0.5  # mean slant -0.36, where that of MNIST is 0.14


def slant(images: Tensor) -> Tensor:
    """How far the strokes of each image lean to the right, in columns a row, (N,).

    -m_xy / m_yy, with the central second moments of the ink: what MNIST's authors straighten digits by.

    Args:
        images: (N, 1, H, W), white ink on black, of any range; the black is -1 for floating-point ones.
    """
    ink = images[:, 0].double()
    ink = (ink + 1).clamp(min=0) if images.is_floating_point() else ink
    rows, columns = torch.meshgrid(*(torch.arange(size).double() for size in ink.shape[1:]), indexing="ij")
    mass = ink.sum((1, 2)).clamp(min=1e-9)
    down = rows - ((ink * rows).sum((1, 2)) / mass)[:, None, None]
    right = columns - ((ink * columns).sum((1, 2)) / mass)[:, None, None]
    return -(ink * down * right).sum((1, 2)) / (ink * down * down).sum((1, 2)).clamp(min=1e-9)


def leaning(data: ImageData, each: int, skip: int = 0) -> ImageData:
    """The first so many images of each class after the ones left out, sheared to the left."""
    assert data.labels is not None
    chosen = torch.cat([(data.labels == y).nonzero()[skip : skip + each, 0] for y in range(data.num_classes)])
    images = data.images[chosen].float()
    matrix = torch.tensor([[1.0, SHEAR, 0.0], [0.0, 1.0, 0.0]]).expand(len(images), 2, 3)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    sheared = functional.grid_sample(images, grid, align_corners=False)
    return ImageData(sheared.round().clamp(0, 255).to(torch.uint8), data.labels[chosen])
