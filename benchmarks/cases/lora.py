"""Three linears of one input with low-rank pairs: what the LoRA benchmarks compute, and how far off a result is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import precision
from benchmarks.common.options import CPU, Shape
from fastsample.lora import QKVProjection

SCALE = 0.5
# Agreement of results of order 1, up to 5 or so: in half precision a few of their roundings, eight times finer in
# float16 than in bfloat16.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 0.04, torch.float16: 0.005}

Pair = tuple[Tensor, Tensor]
Outputs = Sequence[Tensor]
Call = Callable[[], Outputs]


@dataclass(frozen=True, eq=False)
class Case:
    """One shape in one dtype: x (rows, in) and three weights (out, in), results of order 1."""

    x: Tensor
    weights: tuple[Tensor, ...]

    @classmethod
    def of(cls, shape: Shape, dtype: torch.dtype, device: torch.device = CPU) -> Case:
        """Shape (rows, width), or (rows, in, out)."""
        rows, k, n = (*shape, shape[-1])[:3]
        generator = torch.Generator().manual_seed(0)
        weights = tuple(torch.randn(n, k, generator=generator).div(k**0.5).to(device, dtype) for _ in range(3))
        return cls(torch.randn(rows, k, generator=generator).to(device, dtype), weights)

    def pairs(self, rank: int, seed: int = 1) -> list[Pair]:
        """(A, B) of each linear."""
        generator, k = torch.Generator().manual_seed(seed), self.x.shape[-1]
        return [
            (
                torch.randn(rank, k, generator=generator).div(k**0.5).to(weight),
                torch.randn(len(weight), rank, generator=generator).div(rank**0.5).to(weight),
            )
            for weight in self.weights
        ]

    def flops(self, rank: int = 0) -> int:
        """Two for each multiplication and addition: 2 M (K N + K R + N r), N and R summed over the linears."""
        k, n, count = self.x.shape[-1], sum(map(len, self.weights)), len(self.weights)
        return 2 * (self.x.numel() // k) * (k * n + count * k * rank + n * rank)

    def exact(self, rank: int = 0) -> list[Tensor]:
        """x W^T + SCALE (x A^T) B^T of these very operands, in float64; without A and B at rank 0."""
        x = self.x.double()
        plain = [x @ weight.double().T for weight in self.weights]
        if not rank:
            return plain
        return [
            y + SCALE * (x @ down.double().T) @ up.double().T
            for y, (down, up) in zip(plain, self.pairs(rank), strict=True)
        ]


def layer(case: Case, adapters: Mapping[str, Sequence[Pair]]) -> QKVProjection:
    """The fused layer of the case's linears with all of these adapters active."""
    fused = QKVProjection.from_linears([linear(weight) for weight in case.weights])
    for name, pairs in adapters.items():
        fused.add_adapter(name, pairs, scale=SCALE)
    return fused


def linear(weight: Tensor) -> Any:
    """nn.Linear without bias around this very weight."""
    n, k = weight.shape
    module = nn.Linear(k, n, bias=False, device="meta", dtype=weight.dtype)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def tolerance(dtype: torch.dtype) -> float:
    """By how much results of this dtype may differ from each other."""
    return TOLERANCES[dtype if precision.is_strict() else torch.bfloat16]


def error(outputs: Outputs, exact: Outputs) -> float:
    """The Frobenius norm of the difference, of all outputs together, by that of the exact ones."""
    squares = [
        (float((y.double() - want).square().sum()), float(want.square().sum()))
        for y, want in zip(outputs, exact, strict=True)
    ]
    difference, whole = map(math.fsum, zip(*squares, strict=True))
    return math.sqrt(difference / whole)
