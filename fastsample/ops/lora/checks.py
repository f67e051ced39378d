"""The checks of lora_linear's arguments, made before it computes anything."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.checks import not_a_tensor
from fastsample.ops.address import check_strided
from fastsample.ops.lora.adapters import PackedAdapters
from fastsample.ops.lora.weights import PackedLinear


def check_operands(
    x: Tensor, packed: PackedLinear, adapters: PackedAdapters | None, adapter_index: Tensor | None
) -> None:
    """Raises unless x, the packed linears, the adapters and the index fit together."""
    if not isinstance(x, Tensor):
        raise not_a_tensor("x", x)
    check_strided("x", x)
    if not isinstance(packed, PackedLinear):
        raise TypeError(f"packed must be what pack_linear returns, got {type(packed).__name__}")
    if not isinstance(adapters, PackedAdapters | None):
        raise TypeError(f"adapters must be what pack_adapters returns or None, got {type(adapters).__name__}")
    if x.ndim < 1 or x.shape[-1] != packed.in_features:
        raise ValueError(f"x must have {packed.in_features} features in its last axis, got shape {tuple(x.shape)}")
    if x.dtype != packed.dtype:
        raise TypeError(f"x is {x.dtype}, the weights are {packed.dtype}")
    if x.device != packed.device:
        raise ValueError(f"x lies on {x.device}, the weights on {packed.device}")
    if adapters is not None and not adapters.belongs_to(packed):
        raise ValueError("adapters were packed for other linears than these")
    count = 0 if adapters is None else len(adapters.ranks)
    if adapter_index is None:
        if count > 1:
            raise ValueError(f"there are {count} groups of adapters: adapter_index says which one a sample gets")
        return
    if adapters is None:
        raise ValueError("adapter_index needs adapters")
    if not isinstance(adapter_index, Tensor):
        raise not_a_tensor("adapter_index", adapter_index)
    if adapter_index.dtype != torch.int64:
        raise TypeError(f"adapter_index must be int64, got {adapter_index.dtype}")
    if x.ndim < 2 or adapter_index.shape != x.shape[:1]:
        raise ValueError(
            f"adapter_index must hold one index per sample of x, whose shape is {tuple(x.shape)}; got shape "
            f"{tuple(adapter_index.shape)}"
        )
    if adapter_index.device != x.device:
        raise ValueError(f"adapter_index lies on {adapter_index.device}, x on {x.device}")


def check_range(adapter_index: Tensor, groups: int) -> None:
    """Raises IndexError unless every entry is a group or -1."""
    wrong = (adapter_index < -1) | (adapter_index >= groups)
    if wrong.any():
        sample = int(wrong.nonzero()[0])
        group = int(adapter_index[sample])
        raise IndexError(f"adapter_index[{sample}] is {group}: there are {groups} groups of adapters, and -1 is none")
