"""A small class-conditional U-Net that predicts epsilon and a learned variance."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsample.schedule import Schedule


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet; the defaults are those of the bundled digits model.

    channels, image_size: of the images, square; num_classes: 0 for unlabelled data; widths: channels at 1/2 and at
    1/4 of the resolution; embedding: width of the time and class embedding; groups, heads: of every GroupNorm and of
    the attention.

    Raises:
        ValueError: image_size is no multiple of 4, a width no multiple of groups or heads, or a size not positive.
    """

    channels: int = 1
    image_size: int = 28
    num_classes: int = 10
    widths: tuple[int, int] = (48, 96)
    embedding: int = 128
    groups: int = 8
    heads: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", tuple(self.widths))  # JSON hands over a list
        if len(self.widths) != 2:
            raise ValueError(f"widths must be two numbers, got {self.widths}")
        for name in ("channels", "image_size", "embedding", "groups", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {self.num_classes}")
        if self.image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {self.image_size}")
        if self.embedding % 4:
            raise ValueError(f"embedding must be a multiple of 4, got {self.embedding}")
        if any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(f"widths must be multiples of groups = {self.groups}, got {self.widths}")
        if self.widths[1] % self.heads:
            raise ValueError(f"widths[1] must be a multiple of heads = {self.heads}, got {self.widths[1]}")


class UNet(nn.Module):
    """Predicts [epsilon, v] of noisy images x_t, given the timestep and optionally a class.

    v in about [-1, 1] interpolates the log variance between its bounds (Nichol & Dhariwal 2021):
    log variance = frac log(beta_t) + (1 - frac) log(posterior variance_t) with frac = (v + 1) / 2.

    Two by two pixels are folded into channels, so that the costly convolutions run at half resolution.

    Attributes:
        config: its shape.
        schedule: the forward process it was trained for; t counts its timesteps.

    Example:
        >>> model = UNet(UNetConfig(), Schedule.cosine(1000))
        >>> model(torch.zeros(2, 1, 28, 28), torch.tensor([0, 999])).shape
        torch.Size([2, 2, 28, 28])
    """

    def __init__(self, config: UNetConfig, schedule: Schedule) -> None:
        super().__init__()
        self.config = config
        self.schedule = schedule
        high, low = config.widths
        embedding, groups = config.embedding, config.groups
        self.embed_time = nn.Sequential(
            nn.Linear(embedding // 2, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.embed_class = nn.Embedding(config.num_classes + 1, embedding)
        self.enter = nn.Conv2d(4 * config.channels, high, 3, padding=1)
        self.down = ResBlock(high, high, embedding, groups)
        self.shrink = nn.Conv2d(high, low, 3, stride=2, padding=1)
        self.middle_in = ResBlock(low, low, embedding, groups)
        self.attention = Attention(low, groups, config.heads)
        self.middle_out = ResBlock(low, low, embedding, groups)
        self.grow = nn.Conv2d(low, 4 * high, 1)
        self.up = ResBlock(2 * high, high, embedding, groups)
        self.norm = nn.GroupNorm(groups, high)
        self.leave = _zeroed(nn.Conv2d(high, 8 * config.channels, 3, padding=1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on CPUs

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """[epsilon, v] of x, shape (B, 2C, H, W).

        Args:
            x: noisy images, (B, C, H, W), floating.
            t: timesteps, (B,), integer or floating.
            y: class labels, int64 (B,), 0 .. num_classes - 1, or num_classes for none; None is none for all.

        Raises:
            ValueError: a shape that does not fit.
            TypeError: labels that are not int64.
        """
        size = self.config.image_size
        if x.shape[1:] != (self.config.channels, size, size):
            raise ValueError(f"x must be (B, {self.config.channels}, {size}, {size}), got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be ({x.shape[0]},), got {tuple(t.shape)}")
        if y is None:
            label = self.embed_class.weight[-1:]
        elif not isinstance(y, Tensor) or y.dtype != torch.int64:
            raise TypeError(f"y must be an int64 tensor, got {getattr(y, 'dtype', type(y).__name__)}")
        elif y.shape != t.shape:
            raise ValueError(f"y must be ({x.shape[0]},), got {tuple(y.shape)}")
        else:
            label = self.embed_class(y)
        waves = _sinusoids(t, self.config.embedding // 2).to(x.dtype)
        condition = functional.silu(self.embed_time(waves) + label)

        h = self.enter(functional.pixel_unshuffle(x, 2).contiguous(memory_format=torch.channels_last))
        skip = self.down(h, condition)
        h = self.middle_in(self.shrink(skip), condition)
        h = self.middle_out(self.attention(h), condition)
        h = functional.pixel_shuffle(self.grow(h), 2)
        h = self.up(torch.cat((h, skip), dim=1), condition)
        return functional.pixel_shuffle(self.leave(functional.silu(self.norm(h))), 2).contiguous()


class ResBlock(nn.Module):
    """Two 3x3 convolutions around a residual; the condition scales and shifts between them (FiLM)."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, groups: int) -> None:
        super().__init__()
        self.norm_in = nn.GroupNorm(groups, channels_in)
        self.conv_in = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.film = nn.Linear(embedding, 2 * channels_out)
        self.norm_out = nn.GroupNorm(groups, channels_out, affine=False)  # film scales and shifts already
        self.conv_out = _zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        same = channels_in == channels_out
        self.residual = nn.Identity() if same else nn.Conv2d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x (B, channels_in, H, W), condition (B, embedding) -> (B, channels_out, H, W)."""
        scale, shift = self.film(condition)[:, :, None, None].chunk(2, dim=1)
        h = self.conv_in(functional.silu(self.norm_in(x)))
        h = torch.addcmul(shift, self.norm_out(h), 1 + scale)
        return self.residual(x) + self.conv_out(functional.silu(h))


class Attention(nn.Module):
    """Residual self-attention over all positions."""

    def __init__(self, channels: int, groups: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = _zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> (B, C, H, W)."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        heads = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(*heads)
        mixed = self.out(mixed.transpose(1, 2).flatten(2))
        return x + mixed.transpose(1, 2).unflatten(2, x.shape[2:])


def _zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all weights 0: residual branches that begin as nothing train faster."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _sinusoids(t: Tensor, dim: int) -> Tensor:
    """cos and sin of t / 10000^(2i / dim), (B, dim) float32."""
    frequencies = torch.exp(torch.arange(dim // 2, dtype=torch.float32, device=t.device) * (-2 * math.log(10000) / dim))
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)
