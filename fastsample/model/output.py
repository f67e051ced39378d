"""The tensor in what a model returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def unwrapped(output: Any) -> Any:
    """The tensor in an object with `.sample` (diffusers) or at the head of a tuple or list; anything else as it is."""
    inner = None if isinstance(output, Tensor) else getattr(output, "sample", None)
    if inner is None and isinstance(output, tuple | list) and output:
        inner = output[0]
    return inner if isinstance(inner, Tensor) else output


def tensor_of(output: Any) -> Tensor:
    """As `unwrapped`. Raises TypeError where no tensor is found."""
    inner = unwrapped(output)
    if not isinstance(inner, Tensor):
        raise TypeError(
            "the model must return a tensor, a tuple that starts with one, or an object with .sample; got "
            f"{type(inner).__name__}"
        )
    return inner


def check_batch(output: Tensor, x: Tensor) -> None:
    """Raises ValueError unless the output has x's batch."""
    if output.shape[:1] != x.shape[:1]:
        raise ValueError(
            "the model must return an output for every sample that it is given, with twice the batch under guidance: "
            f"{x.shape[0]} in this row, got shape {tuple(output.shape)}"
        )
