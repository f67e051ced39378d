"""Who watches an op beside its caller: derivatives, vmap and recorders, which do not see what a kernel does."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transformed() -> bool:
    """Whether torch.func, forward-mode derivatives or torch.jit.trace are at work, which follow torch's own ops alone.

    What they follow may come in anywhere, a model's parameters included: whoever cannot see all operands asks this.
    """
    return (
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._get_tracing_state() is not None
    )


def followed(operand: object) -> bool:
    """Whether one of these transforms follows this operand; to be asked where `transformed`."""
    if not isinstance(operand, Tensor):
        return isinstance(operand, list | tuple) and any(followed(one) for one in operand)
    if torch._C._get_tracing_state() is not None or torch._C._functorch.is_functorch_wrapped_tensor(operand):
        return True
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(operand).tangent is not None


def recording() -> bool:
    """Whether make_fx, fake tensors or another mode see every op: registered ones they record, kernels they miss."""
    return torch._C._len_torch_dispatch_stack() > 0 and not torch.compiler.is_compiling()
