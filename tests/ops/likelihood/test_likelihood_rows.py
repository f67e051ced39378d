"""Rows of ops.likelihood that no table has, where torch.compile or a recorder follow it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from fastsample import DDPM, Schedule
from fastsample.ops.likelihood import likelihood
from support.devices import DEVICE

pytest.importorskip("triton")

TABLE = DDPM(Schedule.cosine(20), variance="learned_range", clip=1.0).table


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rows_are_checked_in_compiled_code_and_for_recorders(compiler: Any, backend: str) -> None:
    table, device = TABLE, DEVICE if backend == "triton" else "cpu"
    x_start = torch.linspace(-1, 1, 20).reshape(2, 2, 5).to(device)
    out = torch.cat([x_start * 0.5, x_start * 0.1], dim=1)

    def of_row(row: int | Tensor) -> Tensor:
        return likelihood(x_start, x_start, out, table, row, backend=backend)

    def recorded(row: int | Tensor) -> Tensor:
        with FlopCounterMode(display=False):
            return of_row(row)

    for followed in (torch.compile(of_row, fullgraph=True, backend=compiler), recorded):
        for row in (-1, -20, torch.tensor([-1, 3])):
            assert torch.equal(followed(row), of_row(row))
        for bad in (20, -21, torch.tensor([0, 20])):
            with pytest.raises(ValueError, match="table of 20 rows"):
                followed(bad)
