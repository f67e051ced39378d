"""Which modules a low-rank pair can be for, and the shapes that its factors take there."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def size_of(module: Any) -> tuple[int, ...] | None:
    """(out, in) of a linear, (out, in, *kernel) of a convolution, None of anything else, transposed ones too.

    Attributes tell, not types: a module that replaced a linear or a convolution has the attributes of that one.
    """
    if isinstance(module, nn.Linear) or (hasattr(module, "in_features") and hasattr(module, "out_features")):
        return int(module.out_features), int(module.in_features)
    # The kernel first: diffusers' models warn where their channels are asked for.
    plain = hasattr(module, "kernel_size") and not getattr(module, "transposed", False)
    if plain and hasattr(module, "in_channels") and hasattr(module, "out_channels"):
        return int(module.out_channels), int(module.in_channels), *module.kernel_size
    return None


def unfit(module: nn.Module, name: str) -> str | None:
    """Why no pair fits the module, whatever its factors are."""
    if size_of(module) is None:
        return f"{name} is a {type(module).__name__}, neither a linear nor a plain convolution"
    # MultiheadAttention reads the weight of this linear itself: an adapted layer in its place would never be called.
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{name} belongs to a MultiheadAttention, which does not call it"
    return None


def shaped(down: Tensor, up: Tensor, size: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """The factors with the axes of a layer of this size: a linear's are those of a convolution without a kernel."""
    kernel = size[2:]
    if down.ndim == len(size) or any(length != 1 for length in (*kernel, *down.shape[2:])):
        return down, up
    return down.reshape(*down.shape[:2], *kernel), up.reshape(*up.shape[:2], *kernel)
