"""One check: the call, the results that it must give, and how many roundings lie between.

An error is counted in unit roundoffs u (2^-24 in float32) of the sum of the sizes of the terms that were added up. Then
the number allowed is the number of roundings on the longest way from an operand to the result, whatever cancels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastsample.ops import randn
from fastsample.ops.backend import Backend
from fastsample.ops.noise import STEP

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
Shape = tuple[int, ...]
TINY: Shape = (1, 3)
ODD: Shape = (3, 5, 7)
TAIL: Shape = (2, 4, 33, 31)
LATENTS: Shape = (8, 4, 64, 64)
SEED = 7
Call = Callable[[], Sequence[Tensor]]
ELEMENT_WISE = frozenset({"reference", "cpu", "triton", "cuda"})
SINGLE = 2.0**-24  # the unit roundoff of float32
_SMALL = 512  # elements: what Triton's interpreter runs in less than seconds


class Wanted(NamedTuple):
    """One result: its value in float64, the size of its terms, and how many roundings may lie between."""

    value: Tensor
    size: Tensor
    roundings: float
    dtype: torch.dtype = torch.float32

    @property
    def unit(self) -> float:
        """The unit roundoff of what the result is stored in."""
        return torch.finfo(self.dtype).eps / 2

    @property
    def allowed(self) -> float:
        """In units: the roundings of float32, and the last one where the result is stored in half precision."""
        return self.roundings if self.dtype == torch.float32 else 1 + self.roundings * SINGLE / self.unit

    def error(self, result: Tensor) -> float:
        """The largest error in units; infinite where a value is missing or the dtype or shape is another."""
        if result.shape != self.value.shape or result.dtype != self.dtype:
            return float("inf")
        gap = (result.double().cpu() - self.value).abs()
        error = torch.where(gap == 0, 0.0, gap / self.size.clamp_min(torch.finfo(self.dtype).tiny) / self.unit)
        return float(error.nan_to_num(nan=float("inf")).max())


@dataclass(frozen=True)
class Case:
    """One check.

    Attributes:
        op, mode, dtype, shape: of the call; the dtype is that of the model's output, or of LoRA's weights.
        prepare: prepare(backend, device) returns the call.
        wanted: the results that the call must give.
        same_bits: whether the design promises the same bits from all compiled backends.
        backends: those that have this op.
        on_gpu: whether it runs on GPUs alone.
    """

    op: str
    mode: str
    dtype: torch.dtype
    shape: Shape
    prepare: Callable[[Backend, torch.device], Call]
    wanted: Sequence[Wanted]
    same_bits: bool = True
    backends: frozenset[str] = ELEMENT_WISE
    on_gpu: bool = False

    @property
    def small(self) -> bool:
        """Whether an interpreter can be waited for."""
        return math.prod(self.shape) <= _SMALL


def normals(shape: Shape, seed: int, index: int, row: int) -> Tensor:
    """The noise that a step of this row adds, by the reference backend."""
    return randn(shape, seed=seed, index=index, step=row, stream=STEP, backend="reference")
