"""Fresh memory starts as NaN, so that an output that is not written does not pass by luck."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor


def fill_with_nan(monkeypatch: pytest.MonkeyPatch, owner: Any, *names: str) -> None:
    """These functions or methods of `owner` return floating-point tensors full of NaN."""
    for name in names:
        monkeypatch.setattr(owner, name, _filling(getattr(owner, name)))


def _filling(allocate: Any) -> Any:
    def filled(*args: Any, **kwargs: Any) -> Tensor:
        tensor: Tensor = allocate(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

    return filled
