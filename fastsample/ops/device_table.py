"""A table as GPU kernels and compiled code see it: one tensor, made once per device."""

from __future__ import annotations

from functools import lru_cache
from typing import Any
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from fastsample.ops.tracing import constant_when_traced, outside
from fastsample.tables import COLUMNS, ROW, Table

_DOUBLES = 2 * len(COLUMNS)  # floats that hold a row's float64 columns, bit for bit

# By the address of their tensors.
_tables: WeakValueDictionary[int, Table] = WeakValueDictionary()


@constant_when_traced  # Dynamo guards on which table it is
def encoded(table: Table, device: torch.device) -> Tensor:
    """All of the table as one float32 tensor: `packed`, which kernels read, then the bits of the float64 columns.

    Made at the first call for a device, which on a GPU waits for the upload.
    """

    def make(table: Table) -> Tensor:
        columns = np.stack([getattr(table, name) for name in COLUMNS], axis=1)
        whole = np.concatenate([table.packed.reshape(-1), columns.view(np.float32).reshape(-1)])
        with outside():
            tensor = torch.from_numpy(whole).to(device)
        if address := tensor.data_ptr():  # a meta tensor has none
            _tables[address] = table
        return tensor

    return table.derived(device, make)


def as_argument(table: Table, device: torch.device) -> Tensor:
    """`encoded` for a registered op, fake where other arguments are.

    Raises:
        ValueError: for a table with a box, which has no place in it.
    """
    if table.box is not None:
        raise ValueError("clip=(low, high) cannot be compiled or recorded: give one number for both")
    tensor = encoded(table, device)
    if torch.compiler.is_compiling() or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is None:
        return tensor
    lifted: Tensor = torch.ops.aten.lift_fresh_copy(tensor)
    return lifted


def packed_rows(table: Table, device: torch.device) -> Tensor:
    """`table.packed` on the device, shape (rows, 16)."""
    return encoded(table, device)[: table.packed.size].view(table.packed.shape)


def decoded(tensor: Tensor) -> Table:
    """The table that `encoded` made this tensor from; one with the same coefficients where that is gone."""
    known = _tables.get(tensor.data_ptr())
    if known is not None:
        own = encoded(known, tensor.device)
        # Another device may have the same address, and a table's memory may have been freed and be another's by now.
        if own.data_ptr() == tensor.data_ptr() and own.shape == tensor.shape:
            return known
    return _rebuilt(tensor.cpu().numpy().tobytes())


@lru_cache(maxsize=16)
def _rebuilt(content: bytes) -> Table:
    whole = np.frombuffer(content, np.float32)
    rows = len(whole) // (len(ROW) + _DOUBLES)
    doubles = whole[rows * len(ROW) :].view(np.float64).reshape(rows, len(COLUMNS))
    columns: dict[str, Any] = {name: doubles[:, i] for i, name in enumerate(COLUMNS)}
    return Table(np.zeros(rows, np.int64), **columns)
