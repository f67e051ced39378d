"""The bounds of a table that limits each element of x0 by its own, as a step over samples of one shape reads them."""

from __future__ import annotations

import torch
from torch import Tensor

from fastsample.ops.tracing import constant_when_traced, outside
from fastsample.tables import Table


def box_of(table: Table, x: Tensor) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """(low, high) in the shape and dtype of one sample of x, on its device; made once. None without bounds.

    Raises:
        ValueError: where they do not broadcast to a sample.
    """
    if table.box is None:
        return None, None
    return _expanded(table, x.shape[1:], x.dtype, x.device)


@constant_when_traced
def _expanded(table: Table, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    assert table.box is not None
    own = table.box[0].shape
    trailing = shape[len(shape) - len(own) :]
    if len(own) > len(shape) or any(one not in (1, size) for one, size in zip(own, trailing, strict=True)):
        raise ValueError(f"clip=(low, high) of shape {own} does not broadcast to a sample of shape {tuple(shape)}")

    def make(table: Table) -> tuple[Tensor, Tensor]:
        assert table.box is not None
        with outside():
            low, high = (torch.from_numpy(one.copy()).to(device, dtype) for one in table.box)
            return low.expand(shape).contiguous(), high.expand(shape).contiguous()

    return table.derived(("box", shape, dtype, device), make)
