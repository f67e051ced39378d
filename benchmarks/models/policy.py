"""A small 1-D conditional U-Net that predicts the noise of action chunks, as robots' diffusion policies do."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

OBSERVATION = 32
WIDTHS = (64, 128)
CONDITION = 128


class ActionUNet(nn.Module):
    """epsilon of noisy chunks (B, horizon, actions), given timesteps (B,) and observations (B, OBSERVATION).

    Random weights: it stands for its time, about a millisecond on two cores, not for its actions.
    """

    def __init__(self, actions: int = 7) -> None:
        super().__init__()
        high, low = WIDTHS
        self.embed = nn.Sequential(nn.Linear(64 + OBSERVATION, CONDITION), nn.Mish(), nn.Linear(CONDITION, CONDITION))
        self.enter = nn.Conv1d(actions, high, 5, padding=2)
        self.down = Block(high, high)
        self.shrink = nn.Conv1d(high, low, 3, stride=2, padding=1)
        self.middle = Block(low, low)
        self.grow = nn.ConvTranspose1d(low, high, 4, stride=2, padding=1)
        self.up = Block(2 * high, high)
        self.leave = nn.Conv1d(high, actions, 1)

    def forward(self, x: Tensor, t: Tensor, observation: Tensor) -> Tensor:
        """epsilon, of x's shape."""
        frequency = torch.exp(torch.arange(32, device=t.device) * (-math.log(10000) / 31))
        angle = t[:, None] * frequency
        condition = self.embed(torch.cat((angle.sin(), angle.cos(), observation), dim=1))
        skip = self.down(self.enter(x.transpose(1, 2)), condition)
        h = self.grow(self.middle(self.shrink(skip), condition))
        return self.leave(self.up(torch.cat((h, skip), dim=1), condition)).transpose(1, 2).contiguous()


class Block(nn.Module):
    """Two convolutions around a residual; the condition scales and shifts between them (FiLM)."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Conv1d(channels_in, channels_out, 5, padding=2)
        self.film = nn.Linear(CONDITION, 2 * channels_out)
        self.second = nn.Conv1d(channels_out, channels_out, 5, padding=2)
        self.norms = nn.ModuleList(nn.GroupNorm(8, channels_out) for _ in range(2))
        self.residual = nn.Identity() if channels_in == channels_out else nn.Conv1d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, channels_in, L), condition (B, CONDITION) -> (B, channels_out, L)."""
        scale, shift = self.film(condition)[:, :, None].chunk(2, dim=1)
        h = functional.mish(self.norms[0](self.first(x)))
        h = self.second(h * (1 + scale) + shift)
        return functional.mish(self.norms[1](h)) + self.residual(x)
