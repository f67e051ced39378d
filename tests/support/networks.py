"""A network of layers in dtypes that a test chooses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

BF16 = torch.bfloat16


class Net(nn.Module):
    """Convolutions in one dtype and whatever else in others; refuses an input of another dtype, as torch does."""

    def __init__(self, dtype: torch.dtype = BF16, **islands: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, island in islands.items():
            setattr(self, name, island)
        self.conv = nn.Conv2d(4, 4, 1).to(dtype)
        self.seen: list[torch.dtype] = []
        self.eval()

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append(x.dtype)
        return 0.1 * self.conv(x)
