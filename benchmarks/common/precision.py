"""torch's switch for float32 products on CPUs: what they may be computed in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

CHOICES = ("ieee", "tf32", "bf16")
SWITCH = "torch.backends.mkldnn.matmul.fp32_precision"


def refusal(value: str) -> str:
    """Why this value cannot be set; empty where it can."""
    try:
        with switched(value):
            return ""
    except (AttributeError, RuntimeError) as error:
        return f"torch {torch.__version__} cannot set {SWITCH} to {value!r}: {error}"


@contextmanager
def switched(value: str | None) -> Iterator[None]:
    """Sets the switch, and sets it back; None leaves it as it is.

    Raises:
        AttributeError: where this torch has no such switch. RuntimeError: where the switch has no such value.
    """
    if value is None:
        yield
        return
    switch = _switch()
    before = switch.fp32_precision
    switch.fp32_precision = value
    try:
        yield
    finally:
        switch.fp32_precision = before


def is_strict() -> bool:
    """Whether float32 products are computed in float32; a torch without the switch computes them so."""
    try:
        return _switch().fp32_precision in ("none", "ieee")
    except AttributeError:
        return True


def _switch() -> Any:
    # Without the check, setting it where it is missing would add an attribute that nothing reads.
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(switch, "fp32_precision"):
        raise AttributeError(f"there is no {SWITCH}")
    return switch
