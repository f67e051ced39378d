"""Values of samples, in a shape that meets the samples themselves."""

from __future__ import annotations

from torch import Tensor


def per_sample(values: Tensor, x: Tensor) -> Tensor:
    """One value for each sample of x: shape (B, 1, ..., 1) of as many axes as x (B, ...). B may be 1.

    Example:
        >>> import torch
        >>> per_sample(torch.tensor([1.0, 2.0]), torch.ones(2, 3)) * torch.ones(2, 3)
        tensor([[1., 1., 1.],
                [2., 2., 2.]])
    """
    return values.reshape(-1, *(1,) * (x.ndim - 1))
