"""What the tests of the Triton kernels share: small launches, and memory around outputs that must stay as it was."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fastsample.kernels import blocks
from support.devices import DEVICE

_AROUND = 7  # elements, so that outputs are not aligned either


class Framed:
    """NaN-filled memory for an output inside memory of another value."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> None:
        count = torch.Size(shape).numel()
        self._memory = torch.full((count + 2 * _AROUND,), 77.0, dtype=dtype, device=DEVICE)
        self.output = self._memory[_AROUND:-_AROUND].view(shape).fill_(float("nan"))

    def written(self) -> Tensor:
        """The output, on the CPU; nothing else may have changed."""
        around = torch.cat([self._memory[:_AROUND], self._memory[-_AROUND:]])
        assert (around == 77).all(), "written beside the output"
        return self.output.cpu()


def small_launches(monkeypatch: pytest.MonkeyPatch, *modules: object) -> None:
    """Tiles of 128 elements, two a program, and a grid whose second axis has 2 programs at most."""

    def division(batch: int, size: int, largest: int = 0) -> blocks.Blocks:
        grid = -(-size // 256), min(batch, 2), -(-batch // 2)
        return blocks.Blocks(batch, size, grid, parts=2, quads=32, aligned=size % 4 == 0, num_warps=1)

    for module in modules:
        monkeypatch.setattr(module, "blocks_of", division)
