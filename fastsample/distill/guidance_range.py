"""Students for all weights of guidance in a range, which their network is told."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.checks import real
from fastsample.distill.common import Common

Range = tuple[float, float]


def take_range(common: Common) -> Range | None:
    """(least, most) where the guidance among these arguments is a range; `most` stands for it there from now on.

    Raises:
        ValueError, TypeError: it is neither a number nor a range.
    """
    guidance = common.get("guidance", 1.0)
    if not isinstance(guidance, tuple | list):
        return None
    common["guidance"] = (weights := _range(guidance))[1]
    return weights


def spread(shares: Tensor, weights: Range) -> Tensor:
    """The weights w at these shares of a range, 0 to 1, evenly spaced in log(1 + w - least); as the shares.

    What guidance adds to a prediction grows with w, and a step of 0.25 matters at 1 more than at 8.

    Example:
        >>> spread(torch.tensor([0.0, 1 / 3, 2 / 3, 1.0]), (1.0, 8.0))
        tensor([1., 2., 4., 8.])
    """
    least, most = weights
    return least + torch.expm1(shares * math.log1p(most - least))


def _range(guidance: Sequence[float]) -> Range:
    if len(guidance) != 2:
        raise ValueError(f"guidance must be a number or (least, most), got {guidance!r}")
    least, most = (real("guidance", end) for end in guidance)
    if not -math.inf < least < most < math.inf or most == 1:
        raise ValueError(
            f"guidance must be (least, most) with least < most, both finite, and most not 1; got {guidance!r}"
        )
    return least, most
