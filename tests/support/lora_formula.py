"""Problems for lora_linear, what they come to in float64, and what torch's own arithmetic loses on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from fastsample.ops.lora.adapters import Group, LowRank, PackedAdapters, pack_adapters
from fastsample.ops.lora.weights import PackedLinear, pack_linear

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# torch's loss is measured on as many rows as make its largest error more than chance, whatever the case has.
MEASURED = 128


@dataclass(frozen=True, eq=False)
class Problem:
    """Linears of one input and, in each group, one adapter or None for each of them."""

    x: Tensor
    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    groups: tuple[Group, ...]

    def packed(self) -> PackedLinear:
        return pack_linear(self.weights, self.biases)

    def packs(self) -> tuple[PackedLinear, PackedAdapters | None]:
        packed = self.packed()
        return packed, pack_adapters(packed, self.groups) if self.groups else None


@cache
def problem(
    rows: int, k: int, ns: tuple[int, ...], ranks: tuple[int | None, ...], dtype: torch.dtype, seed: int = 0
) -> Problem:
    """Normal x and weights, results of order 1; every other linear has a bias; one group per rank, None: no adapters.

    Ranks differ between the linears of a group, and some linears have no adapter.
    """
    made = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=made)).to(dtype)

    def adapter(n: int, r: int) -> LowRank:
        # 0.7 is in no binary format; the first factor is one number, others one per rank.
        scale = torch.tensor(0.7) if r == ranks[0] else torch.linspace(0.4, 0.9, r)
        return LowRank(normal(r, k, scale=k**-0.5), normal(n, r, scale=r**-0.5), scale)

    return Problem(
        normal(rows, k),
        tuple(normal(n, k, scale=k**-0.5) for n in ns),
        tuple(normal(n) if i % 2 == 0 else None for i, n in enumerate(ns)),
        tuple(
            tuple(None if (i + g) % 3 == 2 else adapter(n, r + 2 * i) for i, n in enumerate(ns))
            for g, r in enumerate(ranks)
            if r is not None
        ),
    )


def exact(p: Problem, x: Tensor, group: int = 0) -> list[Tensor]:
    """y_i in float64 with this group's adapters; -1: with none."""
    found = []
    for i, (weight, bias) in enumerate(zip(p.weights, p.biases, strict=True)):
        y = functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        one = p.groups[group][i] if p.groups and group >= 0 else None
        if one is not None:
            y += (x.double() @ one.down.double().T * one.scale.double()) @ one.up.double().T
        found.append(y)
    return found


def by_hand(p: Problem, x: Tensor, group: int = 0) -> list[Tensor]:
    """The same as one writes it in torch: the linear, the product with A, addmm with B.

    All in products of 64 columns or more, columns repeated: with a few torch computes dot products, whose many short
    sums are more exact than those of the products that layers are made of. And all in sums of an even number of terms,
    a 0 added: torch's sums of an odd number of 16-bit terms may take in what lies behind a row.
    """
    found = []
    for i, (weight, bias) in enumerate(zip(p.weights, p.biases, strict=True)):
        n, one = len(weight), p.groups[group][i] if p.groups and group >= 0 else None
        y = functional.linear(_even(x), _wide(weight), None if bias is None else _wide(bias[:, None])[:, 0])
        if one is not None:
            t = _even((_even(x) @ _wide(one.down).T)[:, : len(one.down)])
            if one.scale.ndim:
                scale = functional.pad(one.scale, (0, t.shape[1] - len(one.scale)))
                y = torch.addmm(y, (t.float() * scale).to(t), _wide(one.up).T)
            else:
                y = torch.addmm(y, t, _wide(one.up).T, alpha=one.scale.item())
        found.append(y[:, :n])
    return found


def _wide(weight: Tensor) -> Tensor:
    """Its rows repeated to an even number of 64 or more."""
    return _even(weight.repeat(2 * -(-32 // len(weight)), 1))


def _even(rows: Tensor) -> Tensor:
    return functional.pad(rows, (0, rows.shape[1] % 2))


def assert_as_good_as_torch(got: Sequence[Tensor], p: Problem, rows: int, group: int = 0) -> None:
    """Largest and root mean square error at most 2 times torch's, plus one rounding of the result.

    torch's error is that of `by_hand` in the same dtype on all of p.x, of which `got` saw the first `rows` rows. One
    rounding changes a value by at most eps/2 of itself: that is left where torch happens to be exact, as with K = 1.
    A root mean square of a handful of values is chance, so it is asked for from 64 values up.
    """
    for y, want, theirs in zip(got, exact(p, p.x, group), by_hand(p, p.x, group), strict=True):
        assert y.dtype == p.x.dtype and y.shape == (rows, want.shape[1])
        lost, error = (theirs.double() - want).abs(), (y.double() - want[:rows]).abs()
        rounding = torch.finfo(y.dtype).eps / 2
        if error.numel():
            assert error.max() <= 2 * lost.max() + rounding * want.abs().max()
        if error.numel() >= 64:
            assert _rms(error) <= 2 * _rms(lost) + rounding * _rms(want)


def assert_same(got: Sequence[Tensor], want: Sequence[Tensor], backend: str) -> None:
    """The same bits from the kernels, which sum a row's products in one order wherever the row lies and whoever is
    beside it; from torch, which does not, values within some roundings of the largest.
    """
    for y, other in zip(got, want, strict=True):
        if backend == "cpu":
            assert torch.equal(y, other)
        else:
            largest = other.abs().max().item() if other.numel() else 0.0
            torch.testing.assert_close(y, other, rtol=0, atol=8 * torch.finfo(y.dtype).eps * largest)


def _rms(values: Tensor) -> Tensor:
    return values.square().mean().sqrt()
