"""Linear layers with low-rank adapters: one pass for base product, shrink and expansion."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import Never

from fastsample.hints import answering, no_such_argument
from fastsample.ops.backend import Backend, choose
from fastsample.ops.lora import compiled as compiled  # registers the ops that recorders see
from fastsample.ops.lora.adapters import PackedAdapters
from fastsample.ops.lora.checks import check_operands
from fastsample.ops.lora.launch import launch_linears
from fastsample.ops.lora.layout import ROWS
from fastsample.ops.lora.reference import lora_linear_reference
from fastsample.ops.lora.weights import PackedLinear
from fastsample.ops.tracing import traced, transformed

__all__ = ["lora_linear", "lora_linear_reference"]


@answering
def lora_linear(
    x: Tensor,
    packed: PackedLinear,
    adapters: PackedAdapters | None = None,
    *,
    adapter_index: Tensor | None = None,
    backend: Backend | None = None,
    **unknown: Never,
) -> tuple[Tensor, ...]:
    """Several linears of one input, each with its low-rank adapter.

        y_i = x W_i^T + b_i + (x A_i^T * scale_i) B_i^T

    The shrink t = x A^T runs once for all linears, the expansion goes on where the base product's sum over K ends, on
    the same tile of y, and y is rounded once; all sums are float32. In half precision t (scale included) is rounded to
    x's dtype. Weights are packed once (pack_linear). A call costs 2 M (K N + K R + sum N_i r_i) FLOPs, N and R the sums
    of the N_i and of the ranks r_i, and reads x once.

    Args:
        x: (..., K) in the weights' dtype, on their device.
        packed: the linears.
        adapters: None for the linears alone.
        adapter_index: int64 (B,), B = x.shape[0]: which of the adapters' groups each sample gets, -1 none. Required
            where there are several groups, else the one group serves all samples.
        backend: see fastsample.backends(). Gradients (in x and in the adapters) go through the reference. On a GPU
            the first call of a shape tries a few kernels, so call once before a CUDA graph is captured.

    Returns:
        One tensor (..., N_i) per linear, of x's dtype.

    Raises:
        ValueError, TypeError: for shapes, dtypes and devices that do not fit. IndexError: for an index outside
            -1 .. groups - 1; where nobody looks at its values (on a GPU, which the CPU would have to wait for, in
            Triton, and in compiled code that goes through the reference) the sample's outputs are NaN instead.
            RuntimeError: for a factor that was written after it was packed.

    Example:
        >>> from fastsample.ops import LowRank, pack_adapters, pack_linear
        >>> packed = pack_linear([torch.eye(2)])
        >>> adapters = pack_adapters(packed, [[LowRank(torch.ones(1, 2), torch.ones(2, 1), torch.tensor(0.5))]])
        >>> lora_linear(torch.tensor([[1.0, 3.0]]), packed, adapters)
        (tensor([[3., 5.]]),)
    """
    if unknown:
        raise no_such_argument(lora_linear, unknown)
    check_operands(x, packed, adapters, adapter_index)
    compiling = torch.compiler.is_compiling()
    differentiable = (torch.is_grad_enabled() and _requires_grad(x, adapters, compiling)) or transformed()
    native, offers = bool(packed.offers) and not differentiable, packed.offers or ("cpu", "triton")
    why = "computes without gradients" if differentiable else "has no kernel for weights of this dtype on this device"
    chosen = choose(backend, x.device, native=native, offers=offers, op="lora_linear on these weights", why=why)
    if chosen == "reference":
        groups = () if adapters is None else adapters.groups
        return lora_linear_reference(x, packed.unpack(), packed.bias, groups, adapter_index)
    if adapters is not None and not compiling and adapters.changed():
        raise RuntimeError("a factor of adapters was written after it was packed: call adapters.update()")
    if chosen == "triton" and packed.layout != ROWS:  # interpreted, where copies cost nothing beside the rest
        packed = packed.by_rows()
        adapters = None if adapters is None else PackedAdapters(packed, adapters.groups)
    run = torch.ops.fastsample.lora_linear if traced(x) else launch_linears
    down, up, scale = ([], [], []) if adapters is None else (adapters.down, adapters.up, adapters.scale)
    ranks = () if adapters is None else adapters.flat_ranks
    layout = packed.layout
    return tuple(run(x, packed.data, packed.bias, packed.out_features, down, up, scale, ranks, adapter_index, layout))


def _requires_grad(x: Tensor, adapters: PackedAdapters | None, compiling: bool) -> bool:
    if x.requires_grad or adapters is None:
        return x.requires_grad
    return adapters.trainable if compiling else adapters.requires_grad()
