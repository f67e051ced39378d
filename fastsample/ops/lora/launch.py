"""lora_linear on the kernel that reads the weights' layout."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.ops.address import address, addresses
from fastsample.ops.backend import cpu_module
from fastsample.ops.lora.by_torch import multiply
from fastsample.ops.lora.checks import check_range
from fastsample.ops.lora.layout import ROWS, TORCH, products_of_parts
from fastsample.ops.lora.operands import Operands
from fastsample.ops.memory import fresh


def launch_linears(
    x: Tensor,
    weights: Tensor,
    bias: Tensor | None,
    out_features: Sequence[int],
    down: Sequence[Tensor],
    up: Sequence[Tensor],
    scale: Sequence[Tensor],
    ranks: Sequence[int],
    adapter_index: Tensor | None,
    layout: int,
) -> list[Tensor]:
    """The outputs of lora_linear, whose arguments fit together.

    They are flat, since a registered op's arguments are: the fields of PackedLinear and PackedAdapters, and the index.

    Raises:
        IndexError: for an index that is neither -1 nor a group. TypeError: for tensors without memory.
    """
    shape = x.shape
    features = shape[-1]
    x = x.resolve_neg()
    if x.is_contiguous():
        count, stride = x.numel() // features, features
    else:
        x = x.reshape(-1, features)
        x = x if x.stride(1) == 1 else x.contiguous()
        count, stride = x.shape[0], x.stride(0)
    leading = shape[:-1]
    outputs = [fresh(torch.Size((*leading, n)), x.dtype, x.device) for n in out_features]
    samples = 1 if adapter_index is None else shape[0]
    index = None if adapter_index is None else adapter_index.contiguous()
    if layout in (ROWS, TORCH):
        address("x", x)  # torch's own error would not name it
        rows = x.as_strided((count, features), (stride, 1))
        operands = Operands(rows, samples, weights, bias, out_features, down, up, scale, ranks, index, outputs)
        if layout == TORCH:
            if index is not None:
                check_range(index, len(down))
            multiply(operands)
            return outputs
        from fastsample.kernels.lora.launch import launch

        launch(*operands)
        return outputs
    cpu_module().lora_linear(
        address("x", x),
        samples,
        count // samples if samples else 0,
        stride,
        layout,
        products_of_parts(),
        features,
        address("packed", weights),
        out_features,
        address("packed", bias),
        addresses("adapters", down),
        addresses("adapters", up),
        addresses("adapters", scale),
        ranks,
        address("adapter_index", index),
        [y.data_ptr() for y in outputs],
        torch.get_num_threads(),
    )
    return outputs
