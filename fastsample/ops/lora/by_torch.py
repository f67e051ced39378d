"""lora_linear by torch's own products, for CPUs on which these are faster than every kernel of ours.

PEFT's passes are more: it makes a tensor of the base product, one of the low-rank part, one of that times its scale and
one of the sum. Here the low-rank part is added once, where the base product lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LowRanks = tuple[Tensor, Sequence[Tensor], Tensor]  # A of all linears stacked, B of each, the scale of every rank


def multiply(
    x: Tensor,
    samples: int,
    weights: Tensor,
    bias: Tensor | None,
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    scale: Sequence[Tensor],
    ranks: Sequence[int],
    adapter_index: Tensor | None,
    outputs: Sequence[Tensor],
) -> None:
    """Writes the outputs of lora_linear.

    In half precision y is rounded once after the base product and once with the low-rank part, t once before and once
    after it is scaled, as when it is written by hand with torch.addmm.

    Args:
        x: (rows, K), the rows of a sample behind one another; its last axis is dense.
        samples: how many x has.
        weights: (N_i, K) of every linear, row by row.
        bias: of all linears, or None.
        down, up, scale, ranks: of each group, as in PackedAdapters.
        adapter_index: (samples,), each -1 or a group, or None: the one group, if any, serves all.
        outputs: (..., N_i) of each linear, contiguous.
    """
    flat = [y.view(-1, y.shape[-1]) for y in outputs]
    ns = [y.shape[1] for y in flat]
    biases = [None] * len(flat) if bias is None else bias.to(x.dtype).split(ns)
    even = _even(x)
    for y, weight, add in zip(flat, weights.view(-1, x.shape[1]).split(ns), biases, strict=True):
        weight = _even(weight)
        if add is None:
            torch.mm(even, weight.T, out=y)
        else:
            torch.addmm(add, even, weight.T, out=y)
    for g, (a, b, factor) in enumerate(zip(down, up, scale, strict=True)):
        own = ranks[g * len(ns) : (g + 1) * len(ns)]
        sizes = [n * rank for n, rank in zip(ns, own, strict=True)]
        ups = [part.view(n, rank) for part, n, rank in zip(b.split(sizes), ns, own, strict=True)]
        factors = a.view(-1, x.shape[1]), ups, factor
        if adapter_index is None:
            _add(x, factors, flat)
        elif len(members := (adapter_index == g).nonzero().flatten()):
            _add_to(members, x, samples, factors, flat)


def _add_to(members: Tensor, x: Tensor, samples: int, factors: LowRanks, outputs: Sequence[Tensor]) -> None:
    """To some of the samples."""
    first, last = int(members[0]), int(members[-1])
    neighbours = last - first + 1 == len(members)
    part = slice(first, last + 1) if neighbours else members  # a slice is no copy
    chosen = x.unflatten(0, (samples, -1))[part].flatten(0, 1)
    each = [y.view(samples, -1, y.shape[1]) for y in outputs]
    own = [y[part] for y in each]
    _add(chosen, factors, [y.view(-1, y.shape[-1]) for y in own])
    if not neighbours:
        for y, done in zip(each, own, strict=True):
            y[members] = done


def _add(x: Tensor, factors: LowRanks, outputs: Sequence[Tensor]) -> None:
    down, ups, scale = factors
    if not len(down):
        return
    t = x.new_empty(len(x), len(down))
    torch.mm(_even(x), _even(down).T, out=t)
    t *= scale
    for y, part, up in zip(outputs, t.split([up.shape[1] for up in ups], 1), ups, strict=True):
        if up.shape[1]:
            y.addmm_(_even(part), _even(up).T)


def _even(rows: Tensor) -> Tensor:
    """In 16 bits with a column of zeros where the number of columns is odd.

    torch 2.13's products on AMX multiply what lies behind a row of odd length by zero: NaN or inf there, in the next
    row or in nobody's memory, would make this row NaN.
    """
    odd = rows.dtype != torch.float32 and rows.shape[1] % 2
    return torch.nn.functional.pad(rows, (0, 1)) if odd else rows
