"""Linear layers with low-rank adapters: one pass for base product, shrink and expansion."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastsample.ops.address import address, addresses, check_strided
from fastsample.ops.backend import choose, cpu_module
from fastsample.ops.lora.by_torch import multiply
from fastsample.ops.lora.pack import ROWS, TORCH, Group, PackedAdapters, PackedLinear
from fastsample.ops.memory import fresh
from fastsample.ops.tracing import traced, transformed


def lora_linear(
    x: Tensor,
    packed: PackedLinear,
    adapters: PackedAdapters | None = None,
    *,
    adapter_index: Tensor | None = None,
    backend: str | None = None,
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
    check(x, packed, adapters, adapter_index)
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
    run = torch.ops.fastsample.lora_linear if traced(x) else _lora_linear
    down, up, scale = ([], [], []) if adapters is None else (adapters.down, adapters.up, adapters.scale)
    ranks = () if adapters is None else adapters.flat_ranks
    layout = packed.layout
    return tuple(run(x, packed.data, packed.bias, packed.out_features, down, up, scale, ranks, adapter_index, layout))


def _requires_grad(x: Tensor, adapters: PackedAdapters | None, compiling: bool) -> bool:
    if x.requires_grad or adapters is None:
        return x.requires_grad
    return adapters.trainable if compiling else adapters.requires_grad()


def _lora_linear(
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
        if layout == TORCH:
            if index is not None:
                check_range(index, len(down))
            multiply(rows, samples, weights, bias, down, up, scale, ranks, index, outputs)
            return outputs
        from fastsample.kernels.lora_launch import launch

        launch(rows, samples, weights, bias, out_features, down, up, scale, ranks, index, outputs)
        return outputs
    cpu_module().lora_linear(
        address("x", x),
        samples,
        count // samples if samples else 0,
        stride,
        layout,
        _products(),
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


# torch's switch for its own float32 products, by how many products of bfloat16 parts stand for one.
_PRODUCTS = {"tf32": 3, "bf16": 1}


def _products() -> int:
    precision = getattr(torch.backends.mkldnn, "matmul", None)
    return _PRODUCTS.get(precision.fp32_precision, 6) if precision is not None else 6


_registered = torch.library.custom_op("fastsample::lora_linear", _lora_linear, mutates_args=())


@_registered.register_fake
def _shapes(x: Tensor, weights: Tensor, bias: Tensor | None, out_features: Sequence[int], *_: object) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], n)) for n in out_features]


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
        part = None if bias is None else bias[first : first + len(weight)].to(x.dtype)
        first += len(weight)
        y = _product(x, weight, part)
        for g, group in enumerate(groups):
            one = group[i]
            if one is None:
                continue
            t = torch.nn.functional.linear(x.to(exact), one.down.to(x).to(exact)) * one.scale.to(x.device, exact)
            delta = _product(t.to(x), one.up.to(x))
            if adapter_index is not None:
                chosen = (adapter_index == g).reshape(-1, *[1] * (x.ndim - 1))
                delta = torch.where(chosen, delta, 0)
            y = y + delta
        if adapter_index is not None and unchecked:
            known = (adapter_index >= -1) & (adapter_index < len(groups))
            y = torch.where(known.reshape(-1, *[1] * (x.ndim - 1)), y, torch.nan)
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
        return torch.nn.functional.linear(x.float(), weight.float(), wide).to(x.dtype)
    return torch.nn.functional.linear(x, weight, bias)


def check(x: Tensor, packed: PackedLinear, adapters: PackedAdapters | None, adapter_index: Tensor | None) -> None:
    """Raises unless these fit together."""
    if not isinstance(x, Tensor):
        raise TypeError(f"x must be a tensor, got {type(x).__name__}")
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
        raise TypeError(f"adapter_index must be a tensor, got {type(adapter_index).__name__}")
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
    """Raises IndexError unless all are groups or -1."""
    wrong = (adapter_index < -1) | (adapter_index >= groups)
    if wrong.any():
        sample = int(wrong.nonzero()[0])
        found = int(adapter_index[sample])
        raise IndexError(f"adapter_index[{sample}] is {found}: there are {groups} groups of adapters, and -1 is none")
