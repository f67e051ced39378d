"""Memory of lora_linear: x in every layout, and outputs whose surroundings must stay as they were."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastsample.ops.lora import launch

_AROUND = 64  # elements on either side


def layouts(x: Tensor) -> dict[str, Tensor]:
    """Views with the values of the (24, K) x, or of its first rows, between NaN where there is room for it."""
    k = x.shape[1]
    wide = x.new_full((24, 3, k), math.nan)
    wide[:, 1] = x
    return {
        "1-D": x[0],
        "1-D strided": x.repeat_interleave(2, 1)[0, ::2],
        "rows of a wider tensor": wide[:, 1],
        "every other row": x[::2],
        "transposed": x.T.contiguous().T,
        "rows backwards": x.flip(0).flip(0),
        "expanded": x[:1].expand(24, k),
        "3-D": x.view(4, 6, k),
        "3-D with axes swapped": x.view(4, 6, k).transpose(0, 1),
        "3-D from channels first": x.view(4, 6, k).transpose(1, 2).contiguous().transpose(1, 2),
        "4-D": x.view(2, 3, 4, k),
        "4-D expanded": x[:4].view(1, 1, 4, k).expand(2, 3, 4, k),
        "negative bit": torch._neg_view(-x),
        "no rows": x[:0].view(2, 0, k),
        "no samples": x[:0].view(0, 2, k),
    }


LAYOUTS = tuple(layouts(torch.zeros(24, 1)))


class Margins:
    """Outputs that ops.lora.launch allocates lie inside memory of another value."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._memory: list[Tensor] = []
        monkeypatch.setattr(launch, "fresh", self._fresh)

    def _fresh(self, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
        self._memory.append(torch.full((shape.numel() + 2 * _AROUND,), 7.0, dtype=dtype, device=device))
        return self._memory[-1][_AROUND:-_AROUND].view(shape)

    @property
    def addresses(self) -> list[int]:
        """Of the outputs since the last check."""
        return [memory[_AROUND:].data_ptr() for memory in self._memory]

    def check(self, outputs: int) -> None:
        """That many were allocated since the last check, and nothing was written beside them."""
        assert len(self._memory) == outputs
        assert all((m[:_AROUND] == 7).all() and (m[-_AROUND:] == 7).all() for m in self._memory)
        self._memory.clear()
