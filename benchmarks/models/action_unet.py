"""The 1-D conditional U-Net of Diffusion Policy (Chi et al. 2023, arXiv:2303.04137) in its published size."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

HORIZON, ACTIONS, OBSERVATION = 16, 7, 2 * 23  # two steps of a state
WIDTHS, KERNEL, GROUPS, TIME = (256, 512, 1024), 5, 8, 256


class ActionUNet(nn.Module):
    """epsilon of noisy chunks (B, horizon, ACTIONS), given timesteps () or (B,) and observations (B, OBSERVATION).

    Args:
        widths: channels at each resolution; the published ones make 66 million parameters.
    """

    def __init__(self, widths: Sequence[int] = WIDTHS) -> None:
        super().__init__()
        condition = TIME + OBSERVATION
        self.embed = nn.Sequential(nn.Linear(TIME, 4 * TIME), nn.Mish(), nn.Linear(4 * TIME, TIME))
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.smaller, self.larger = nn.ModuleList(), nn.ModuleList()
        for before, after in zip((ACTIONS, *widths[:-1]), widths, strict=True):
            last = after == widths[-1]
            self.down.append(Pair(before, after, condition))
            self.smaller.append(nn.Identity() if last else nn.Conv1d(after, after, 3, stride=2, padding=1))
        self.middle = Pair(widths[-1], widths[-1], condition)
        for after, before in zip(widths[-2::-1], widths[:0:-1], strict=True):
            self.up.append(Pair(2 * before, after, condition))
            self.larger.append(nn.ConvTranspose1d(after, after, 4, stride=2, padding=1))
        self.leave = nn.Sequential(_convolved(widths[0], widths[0]), nn.Conv1d(widths[0], ACTIONS, 1))

    def forward(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        """epsilon, of x's shape."""
        frequency = torch.exp(torch.arange(TIME // 2, device=x.device) * (-math.log(10000) / (TIME // 2 - 1)))
        angle = t.to(x.device).expand(len(x))[:, None] * frequency
        time = self.embed(torch.cat((angle.sin(), angle.cos()), dim=1))
        condition = torch.cat((time, observation), dim=1)
        h, skips = x.transpose(1, 2), []
        for pair, smaller in zip(self.down, self.smaller, strict=True):
            skips.append(pair(h, condition))
            h = smaller(skips[-1])
        h = self.middle(h, condition)
        for pair, larger in zip(self.up, self.larger, strict=True):
            h = larger(pair(torch.cat((h, skips.pop()), dim=1), condition))
        epsilon: Tensor = self.leave(h)
        return epsilon.transpose(1, 2).contiguous()


class Block(nn.Module):
    """Two convolutions around a residual; the condition scales and shifts what is between them (FiLM)."""

    def __init__(self, before: int, after: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = _convolved(before, after), _convolved(after, after)
        self.film = nn.Linear(condition, 2 * after)
        self.residual = nn.Identity() if before == after else nn.Conv1d(before, after, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, before, L), condition (B, condition) -> (B, after, L)."""
        scale, shift = self.film(functional.mish(condition))[:, :, None].chunk(2, dim=1)
        moved: Tensor = self.second(scale * self.first(x) + shift) + self.residual(x)
        return moved


class Pair(nn.Module):
    """Two blocks of one resolution."""

    def __init__(self, before: int, after: int, condition: int) -> None:
        super().__init__()
        self.first, self.second = Block(before, after, condition), Block(after, after, condition)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, before, L), condition (B, condition) -> (B, after, L)."""
        out: Tensor = self.second(self.first(x, condition), condition)
        return out


def _convolved(before: int, after: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(before, after, KERNEL, padding=KERNEL // 2), nn.GroupNorm(GROUPS, after), nn.Mish())
