"""A small class-conditional U-Net that predicts epsilon and a learned variance."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fastsample.broadcast import per_sample
from fastsample.checks import one_of
from fastsample.schedule import Schedule

UNetPrediction = Literal["epsilon", "v", "x0"]
PREDICTIONS: tuple[UNetPrediction, ...] = get_args(UNetPrediction)


Size = int | tuple[int, int]


@dataclass(frozen=True)
class UNetConfig:
    """Shape of a UNet; the defaults are that of the bundled digits model, but for its target.

    Args:
        channels, image_size: of the images; a size is that of a square or (height, width).
        num_classes: 0 for unlabelled data.
        widths: channels at each resolution, from fold pixels apart on; each resolution is half of the one before.
        embedding: width of the time and class embedding.
        groups, heads: of every GroupNorm and of the attention.
        fold: so many by so many pixels become channels at the entrance, so that the costly convolutions run at a lower
            resolution. Images that fold 2^(len(widths) - 1) does not divide are padded within the model.
        prediction: what the model returns: "epsilon", "v" or "x0".
        target: what its network itself gives, turned into the prediction; None is the prediction. A network that gives
            v and returns epsilon = sigma_t x + alpha_t v stays exact where x_t is next to pure noise: there its
            error in x0 is that of v, while that of a network which gives epsilon is amplified by sigma_t / alpha_t.
        learned_variance: whether it returns [prediction, v], or the prediction alone.
        told: names of further keywords of the model, each a number per sample, such as "guidance".

    Raises:
        ValueError: a width no multiple of groups, the last one none of heads, or a size not positive.
    """

    channels: int = 1
    image_size: Size = 28
    num_classes: int = 10
    widths: tuple[int, ...] = (48, 96)
    embedding: int = 128
    groups: int = 8
    heads: int = 4
    fold: int = 2
    prediction: UNetPrediction = "epsilon"
    target: UNetPrediction | None = None
    learned_variance: bool = True
    told: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("widths", "told"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # JSON hands over a list
        if not isinstance(self.image_size, int):
            object.__setattr__(self, "image_size", tuple(self.image_size))
        if not self.widths:
            raise ValueError("widths must not be empty")
        for name in ("channels", "embedding", "groups", "heads", "fold"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if len(self.size) != 2 or min(self.size) < 1:
            raise ValueError(f"image_size must be a positive number or two, got {self.image_size}")
        if self.num_classes < 0:
            raise ValueError(f"num_classes must be at least 0, got {self.num_classes}")
        if self.embedding % 4:
            raise ValueError(f"embedding must be a multiple of 4, got {self.embedding}")
        if any(width < 1 or width % self.groups for width in self.widths):
            raise ValueError(f"widths must be multiples of groups = {self.groups}, got {self.widths}")
        if self.widths[-1] % self.heads:
            raise ValueError(f"the last width must be a multiple of heads = {self.heads}, got {self.widths[-1]}")
        for name in ("prediction", "target"):
            value = getattr(self, name)
            if not (name == "target" and value is None):
                one_of(name, value, PREDICTIONS)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the images."""
        return (self.image_size, self.image_size) if isinstance(self.image_size, int) else self.image_size

    @classmethod
    def fitting(cls, channels: int, size: tuple[int, int], fold: int | None = None, **others: Any) -> UNetConfig:
        """The config whose depth and folding follow the size of the images, (height, width).

        Unless `fold` says otherwise, two by two pixels are folded up to 64 by 64, four by four above. Resolutions are
        halved down to 8 pixels or less, with 48, 96, 96, ... channels. Others are fields; widths that are given decide
        the depth.

        Example:
            >>> UNetConfig.fitting(3, (32, 32)).widths, UNetConfig.fitting(3, (128, 128)).fold
            ((48, 96), 4)
        """
        fold = fold or (2 if max(size) <= 64 else 4)
        halvings = max(1, math.ceil(math.log2(max(size) / fold / 8)))
        widths = (48, *(96,) * halvings)
        image_size = size[0] if size[0] == size[1] else size
        return cls(**{"channels": channels, "image_size": image_size, "fold": fold, "widths": widths} | others)


class UNet(nn.Module):
    """Predicts [epsilon, v] of noisy images x_t, given the timestep and optionally a class.

    v in about [-1, 1] interpolates the log variance between its bounds (Nichol & Dhariwal 2021):
    log variance = frac log(beta_t) + (1 - frac) log(posterior variance_t) with frac = (v + 1) / 2.
    As its config says, it may predict x0 or the other v (Salimans & Ho 2022) instead of epsilon, or no variance.

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
        if schedule.alphas_cumprod[-1] == 0 and config.target == "epsilon" != config.prediction:
            raise ValueError("target='epsilon' tells nothing where alpha bar is 0 (zero terminal SNR): take v or x0")
        self.config = config
        self.schedule = schedule
        widths, embedding, groups = config.widths, config.embedding, config.groups
        folded = config.fold**2 * config.channels
        self.embed_time = nn.Sequential(
            nn.Linear(embedding // 2, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
        )
        self.embed_class = nn.Embedding(config.num_classes + 1, embedding)
        self.embed_told = nn.ModuleDict()
        self.enter = nn.Conv2d(folded, widths[0], 3, padding=1)
        self.downs = nn.ModuleList(ResBlock(high, high, embedding, groups) for high in widths[:-1])
        self.shrinks = nn.ModuleList(nn.Conv2d(high, low, 3, stride=2, padding=1) for high, low in pairwise(widths))
        self.middle_in = ResBlock(widths[-1], widths[-1], embedding, groups)
        self.attention = Attention(widths[-1], groups, config.heads)
        self.middle_out = ResBlock(widths[-1], widths[-1], embedding, groups)
        self.grows = nn.ModuleList(nn.Conv2d(low, 4 * high, 1) for high, low in pairwise(widths))
        self.ups = nn.ModuleList(ResBlock(2 * high, high, embedding, groups) for high in widths[:-1])
        self.norm = nn.GroupNorm(groups, widths[0])
        outputs = 2 if config.learned_variance else 1
        self.leave = _zeroed(nn.Conv2d(widths[0], outputs * folded, 3, padding=1))
        self._ratios = _ratios(schedule, self.enter.weight.device)
        self.tell(*config.told)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a quarter faster on CPUs

    def _apply(self, *args: Any, **kwargs: Any) -> UNet:
        # The ratios are no buffer: `half` would take their digits, and one of 2e4 needs them. They only move.
        super()._apply(*args, **kwargs)
        self._ratios = _ratios(self.schedule, self.enter.weight.device)
        return self

    @property
    def prediction(self) -> UNetPrediction:
        """What it returns, as samplers name it."""
        return self.config.prediction

    @property
    def variance(self) -> Literal["learned_range", "fixed_small"]:
        """That of its steps, as DDPM names it."""
        return "learned_range" if self.config.learned_variance else "fixed_small"

    def tell(self, *names: str) -> None:
        """Adds keywords, each a number per sample, which the model returns the same for until it is trained further."""
        for name in names:
            layer = _zeroed(nn.Linear(self.config.embedding // 2, self.config.embedding))
            self.embed_told[name] = layer.to(self.enter.weight)
        self.config = replace(self.config, told=tuple(self.embed_told))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None, **told: Tensor) -> Tensor:
        """[epsilon, v] of x, shape (B, 2C, H, W), or what the config says.

        Args:
            x: noisy images, (B, C, H, W), floating.
            t: timesteps, (B,), integer or floating.
            y: class labels, int64 (B,), 0 .. num_classes - 1, or num_classes for none; None is none for all.
            **told: those of the config, floating (B,).

        Raises:
            ValueError: a shape that does not fit.
            TypeError: labels that are not int64, or other keywords than the config's.
        """
        config, (height, width) = self.config, self.config.size
        if x.shape[1:] != (config.channels, height, width):
            raise ValueError(f"x must be (B, {config.channels}, {height}, {width}), got {tuple(x.shape)}")
        if t.shape != x.shape[:1]:
            raise ValueError(f"t must be ({x.shape[0]},), got {tuple(t.shape)}")
        waves = _sinusoids(t, config.embedding // 2).to(x.dtype)
        condition = functional.silu(self.embed_time(waves) + self._label(y, t) + self._told(told, t, x.dtype))
        grid = config.fold * 2 ** (len(config.widths) - 1)
        bottom, right = -height % grid, -width % grid
        padded = functional.pad(x, (0, right, 0, bottom)) if bottom or right else x
        out = self._network(functional.pixel_unshuffle(padded, config.fold), condition)
        out = functional.pixel_shuffle(out, config.fold)[:, :, :height, :width].contiguous()
        return out if config.target in (None, config.prediction) else self._predicted(out, x, t)

    def _label(self, y: Tensor | None, t: Tensor) -> Tensor:
        if y is None:
            return self.embed_class.weight[-1:]
        if not isinstance(y, Tensor) or y.dtype != torch.int64:
            raise TypeError(f"y must be an int64 tensor, got {getattr(y, 'dtype', type(y).__name__)}")
        if y.shape != t.shape:
            raise ValueError(f"y must be ({t.shape[0]},), got {tuple(y.shape)}")
        label: Tensor = self.embed_class(y)
        return label

    def _told(self, told: Mapping[str, Tensor], t: Tensor, dtype: torch.dtype) -> Tensor | float:
        if told.keys() != self.embed_told.keys():
            wanted = ", ".join(self.embed_told) or "none"
            raise TypeError(f"further keywords must be {wanted}, got {', '.join(told) or 'none'}")
        parts: Tensor | float = 0.0
        for name, value in told.items():
            if value.shape != t.shape:
                raise ValueError(f"{name} must be ({t.shape[0]},), got {tuple(value.shape)}")
            # Whole numbers and halves apart, as the embedding of a guidance scale has it.
            waves = _sinusoids(1000 * value, self.config.embedding // 2).to(dtype)
            parts = parts + self.embed_told[name](waves)
        return parts

    def _network(self, folded: Tensor, condition: Tensor) -> Tensor:
        h = self.enter(folded.contiguous(memory_format=torch.channels_last))
        skips = []
        for down, shrink in zip(self.downs, self.shrinks, strict=True):
            skips.append(down(h, condition))
            h = shrink(skips[-1])
        h = self.middle_in(h, condition)
        h = self.middle_out(self.attention(h), condition)
        for up, grow in zip(reversed(self.ups), reversed(self.grows), strict=True):
            h = up(torch.cat((functional.pixel_shuffle(grow(h), 2), skips.pop()), dim=1), condition)
        leave: Tensor = self.leave(functional.silu(self.norm(h)))
        return leave

    def _predicted(self, out: Tensor, x: Tensor, t: Tensor) -> Tensor:
        """The network's output with its first half turned from the target into the prediction."""
        alpha, sigma = (per_sample(level, x) for level in self._levels(t))
        given, variance = out[:, : self.config.channels], out[:, self.config.channels :]
        # v = alpha epsilon - sigma x0 and x = alpha x0 + sigma epsilon, solved for what is not given.
        if self.config.target == "epsilon":
            epsilon, x0 = given, (x - sigma * given) / alpha
        elif self.config.target == "v":
            epsilon, x0 = sigma * x + alpha * given, alpha * x - sigma * given
        else:
            epsilon, x0 = (x - alpha * given) / sigma, given
        prediction = {"epsilon": epsilon, "v": alpha * epsilon - sigma * x0, "x0": x0}[self.config.prediction]
        return torch.cat((prediction.to(out.dtype), variance), dim=1)

    def _levels(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha and sigma at t in float32; between whole timesteps as samplers have them (times.levels)."""
        ratios, last = self._ratios, self.schedule.T - 1
        below = t.floor().clamp(0, last).long() if t.is_floating_point() else t.clamp(0, last)
        low, part = ratios[below], (t - below).float()
        # Written out, since lerp makes NaN of a ratio that is infinite.
        ratio = torch.where(part == 0, low, low + part * (ratios[(below + 1).clamp(max=last)] - low))
        return torch.rsqrt(1 + ratio.square()), torch.rsqrt(1 + ratio.square().reciprocal())


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


def _ratios(schedule: Schedule, device: torch.device) -> Tensor:
    """sigma / alpha at every timestep, (T,) float32."""
    with np.errstate(divide="ignore"):
        ratios = np.sqrt((1 - schedule.alphas_cumprod) / schedule.alphas_cumprod)
    return torch.from_numpy(ratios).to(device, torch.float32)


def _sinusoids(t: Tensor, dim: int) -> Tensor:
    """cos and sin of t / 10000^(2i / dim), (B, dim) float32."""
    frequencies = torch.exp(torch.arange(dim // 2, dtype=torch.float32, device=t.device) * (-2 * math.log(10000) / dim))
    angles = t.float()[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=1)
