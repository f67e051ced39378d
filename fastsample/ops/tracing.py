"""Whether torch.compile, derivatives, vmap or a recorder follow an op; none of them sees what a kernel does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

_F = TypeVar("_F", bound=Callable[..., object])


def traced(*tensors: Tensor) -> bool:
    """Whether torch.compile, make_fx, torch.func and the like want to see the registered op, not a kernel's call."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    # What is made in their reach is a wrapper, whose memory a kernel cannot write.
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return True
    for tensor in tensors:
        if type(tensor) is not Tensor and type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
            return True
    return False


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


def differentiable(*operands: object) -> bool:
    """Whether derivatives of any kind go through any of these, or vmap does: only the reference serves them."""
    if torch.is_grad_enabled():
        for one in operands:
            if isinstance(one, Tensor) and one.requires_grad:
                return True
    return transformed() and any(followed(one) for one in operands)


def no_compiled_gradients(op: str) -> None:
    """Raises where torch.compile asks for gradients of an op that has none there."""
    if torch.compiler.is_compiling():
        raise ValueError(f"compiled, {op} has no gradients: call it under torch.no_grad() or detach its arguments")


def constant_when_traced(function: _F) -> _F:
    """What torch.compiler.assume_constant_result does, whose import takes seconds: Dynamo does not look inside."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@contextmanager
def outside() -> Iterator[None]:
    """For what is kept for later callers: an ordinary tensor, whatever its first user's modes and transforms are."""
    with torch.inference_mode(False), _disable_current_modes(), temporarily_clear_interpreter_stack():
        tracing = torch._C._get_tracing_state()
        if tracing is None:
            yield
            return
        torch._C._set_tracing_state(None)  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch._C._set_tracing_state(tracing)  # type: ignore[attr-defined]
