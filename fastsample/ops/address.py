"""Where a tensor's values lie: what kernels are given, which know addresses alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def address(name: str, tensor: Tensor | None) -> int:
    """Where the tensor starts in memory; 0 for None, which an operand that is absent has, and for an empty tensor.

    Raises:
        TypeError: for a tensor without memory of its own (fake, meta, sparse, nested, functional, distributed ones, or
            one whose storage was freed), in which a kernel would read address 0.
    """
    if tensor is None:
        return 0
    try:
        found = tensor.data_ptr()
    except RuntimeError:
        found = 0
    if not found:
        check_dense(name, tensor)
    return found


def addresses(name: str, tensors: Sequence[Tensor]) -> list[int]:
    """`address` of each."""
    try:
        found = [one.data_ptr() for one in tensors]
    except RuntimeError:
        found = [0]
    return [address(name, one) for one in tensors] if 0 in found else found


def check_dense(name: str, tensor: Tensor) -> None:
    """Raises TypeError where the tensor's values do not lie in memory, at the places that its strides tell."""
    check_strided(name, tensor)
    if tensor.numel() and start_of(tensor) == 0:
        raise TypeError(
            f"{name} must be a tensor whose values lie in memory, got a {type(tensor).__name__} on {tensor.device} "
            "without any: is it fake, wrapped, or was its storage freed?"
        )


def check_strided(name: str, tensor: Tensor) -> None:
    """Raises TypeError for nested, sparse and quantized tensors and other layouts that only their own ops can read."""
    if tensor.is_nested or tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "nested" if tensor.is_nested else "quantized" if tensor.is_quantized else str(tensor.layout)
        raise TypeError(f"{name} must be a dense tensor, got one that is {kind.removeprefix('torch.').strip('_')}")


def check_readable(name: str, tensor: Tensor) -> None:
    """Raises TypeError for what torch's own ops would read at address 0: a tensor whose storage was freed."""
    check_strided(name, tensor)
    if torch.compiler.is_compiling():  # where nobody can ask
        return
    plain = (
        type(tensor) is Tensor and not tensor.is_meta and not torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )
    if plain and not tensor._is_zerotensor():
        check_dense(name, tensor)


def check_written(name: str, tensor: Tensor) -> None:
    """Raises where the tensor cannot be written in place, whose values are not known yet."""
    check_strided(name, tensor)
    check_apart(name, tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires gradients: it cannot be written in place")
    if torch.compiler.is_compiling():  # where nobody can ask
        return
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(f"{name} was made in torch.inference_mode: it cannot be written outside of it")


def check_apart(name: str, tensor: Tensor) -> None:
    """Raises ValueError where several of the tensor's elements share memory."""
    if tensor.is_contiguous():
        return
    axes = sorted((stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1)
    if axes and axes[0][0] == 0:
        raise ValueError(f"{name} is expanded: several of its elements share memory")
    reach = 0  # of all axes of shorter strides
    for stride, size in axes:
        if stride <= reach:
            break
        reach += (size - 1) * stride
    else:
        return
    if torch.compiler.is_compiling():  # where nobody can ask
        return
    places = np.zeros((), dtype=np.int64)
    for stride, size in axes:
        places = places[..., None] + np.arange(size) * stride
    if np.unique(places).size < places.size:
        raise ValueError(f"{name} overlaps itself: several of its elements share memory")


def start_of(tensor: Tensor) -> int:
    """Where the tensor starts; 0 where it has no memory of its own."""
    if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
        return 0
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0
