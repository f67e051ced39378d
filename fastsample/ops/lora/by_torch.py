"""lora_linear by torch's own products, for CPUs on which these are faster than every kernel of ours.

PEFT's passes are more: it makes a tensor of the base product, one of the low-rank part, one of that times its scale and
one of the sum. Here the low-rank part is added once, where the base product lies.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.ops.lora.operands import Operands

# The factors of a group: A of all linears stacked, B of each, the scale of every rank.
Factors = tuple[Tensor, Sequence[Tensor], Tensor]


def multiply(operands: Operands) -> None:
    """Writes the outputs of lora_linear; the index is known to hold groups and -1.

    In half precision y is rounded once after the base product and once with the low-rank part, t once before and once
    after it is scaled, as when it is written by hand with torch.addmm.
    """
    x, features, index = operands.x, operands.x.shape[1], operands.adapter_index
    outputs = [y.view(-1, y.shape[-1]) for y in operands.outputs]
    ns = [y.shape[1] for y in outputs]
    biases = [None] * len(outputs) if operands.bias is None else operands.bias.to(x.dtype).split(ns)
    padded = _padded(x)
    for y, weight, bias in zip(outputs, operands.weights.view(-1, features).split(ns), biases, strict=True):
        weight = _padded(weight)
        if bias is None:
            torch.mm(padded, weight.T, out=y)
        else:
            torch.addmm(bias, padded, weight.T, out=y)
    for g, (down, up, scale) in enumerate(zip(operands.down, operands.up, operands.scale, strict=True)):
        ranks = operands.ranks[g * len(ns) : (g + 1) * len(ns)]
        sizes = [n * rank for n, rank in zip(ns, ranks, strict=True)]
        ups = [part.view(n, rank) for part, n, rank in zip(up.split(sizes), ns, ranks, strict=True)]
        factors = down.view(-1, features), ups, scale
        if index is None:
            _add(x, factors, outputs)
        elif len(members := (index == g).nonzero().flatten()):
            _add_to(members, x, operands.samples, factors, outputs)


def _add_to(members: Tensor, x: Tensor, samples: int, factors: Factors, outputs: Sequence[Tensor]) -> None:
    """Adds the low-rank part to the outputs of the samples in `members`."""
    first, last = int(members[0]), int(members[-1])
    neighbours = last - first + 1 == len(members)
    part = slice(first, last + 1) if neighbours else members  # a slice is no copy
    their_x = x.unflatten(0, (samples, -1))[part].flatten(0, 1)
    by_sample = [y.view(samples, -1, y.shape[1]) for y in outputs]
    theirs = [y[part] for y in by_sample]
    _add(their_x, factors, [y.view(-1, y.shape[-1]) for y in theirs])
    if not neighbours:
        for y, sums in zip(by_sample, theirs, strict=True):
            y[members] = sums


def _add(x: Tensor, factors: Factors, outputs: Sequence[Tensor]) -> None:
    down, ups, scale = factors
    if not len(down):
        return
    t = x.new_empty(len(x), len(down))
    torch.mm(_padded(x), _padded(down).T, out=t)
    t *= scale
    for y, part, up in zip(outputs, t.split([up.shape[1] for up in ups], 1), ups, strict=True):
        if up.shape[1]:
            y.addmm_(_padded(part), _padded(up).T)


def _padded(rows: Tensor) -> Tensor:
    """The rows; in 16 bits with columns of zeros added where a product on AMX would read on behind a row.

    oneDNN cuts a row into equal pieces of at most 32 values and an even number of them. Where these are more than the
    row has, it multiplies what lies behind by zero: a NaN or inf there, in the next row or in unused memory, would make
    this row NaN. Up to 32 values an even number is safe, and any multiple of 32.
    """
    columns = rows.shape[1]
    missing = columns % 2 if columns <= 32 else -columns % 32
    return torch.nn.functional.pad(rows, (0, missing)) if missing and rows.dtype != torch.float32 else rows
