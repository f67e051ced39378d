"""lora_linear in plain torch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from fastsample.broadcast import per_sample
from fastsample.ops.lora.adapters import Group
from fastsample.ops.lora.checks import check_range


def lora_linear_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None = None,
    groups: Sequence[Group] = (),
    adapter_index: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """lora_linear in plain torch: the specification, and what gradients go through. Any device and floating dtype.

    Args as lora_linear's, the weights unpacked and their biases behind one another. In half precision base product
    (bias included), t (scale included), low-rank part and their sum are each summed in float32 and rounded to x's
    dtype; the kernels round t and y alone. No row of the result, and none of the gradient in x, depends on what lies
    beside that row in memory.
    """
    unchecked = adapter_index is not None and (torch.compiler.is_compiling() or not adapter_index.is_cpu)
    if adapter_index is not None and not unchecked:
        check_range(adapter_index, len(groups))
    exact = torch.promote_types(x.dtype, torch.float32)
    outputs = []
    first = 0
    for i, weight in enumerate(weights):
        own_bias = None if bias is None else bias[first : first + len(weight)].to(x.dtype)
        first += len(weight)
        y = _product(x, weight, own_bias)
        for g, group in enumerate(groups):
            low_rank = group[i]
            if low_rank is None:
                continue
            t = functional.linear(x.to(exact), low_rank.down.to(x).to(exact)) * low_rank.scale.to(x.device, exact)
            delta = _product(t.to(x), low_rank.up.to(x))
            if adapter_index is not None:
                delta = torch.where(per_sample(adapter_index == g, x), delta, 0)
            y = y + delta
        if adapter_index is not None and unchecked:
            known = (adapter_index >= -1) & (adapter_index < len(groups))
            y = torch.where(per_sample(known, x), y, torch.nan)
        outputs.append(y)
    return tuple(outputs)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, summed in float32 or better and rounded to x's dtype.

    torch's own where that is sound, since training costs what its products cost. On a CPU with AMX torch 2.13 sums an
    odd number of bfloat16 products in pairs and takes for the last one's partner 0 times what lies behind the row: NaN,
    if that is NaN or infinite. Sums run over K, in the gradient of x over N, in that of the weight over the rows. And
    float16 on a CPU without its arithmetic takes torch up to 70 times as long as float32 does.
    """
    counts = *weight.shape, x.numel() // x.shape[-1] if weight.requires_grad else 0
    odd = x.dtype == torch.bfloat16 and any(count % 2 for count in counts)
    if x.is_cpu and (odd or x.dtype == torch.float16):
        wide = None if bias is None else bias.float()
        return functional.linear(x.float(), weight.float(), wide).to(x.dtype)
    return functional.linear(x, weight, bias)
