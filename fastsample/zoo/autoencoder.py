"""A small autoencoder of images, between whose latents and pixels a latent model goes back and forth."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shape of an Autoencoder; the defaults are that of the bundled one.

    Args:
        channels, image_size: of the images, which are square; the size is a multiple of 4.
        latent_channels: of the latents, which have a quarter of the size.
        width: channels at half the size; twice as many at a quarter.
        groups: of every GroupNorm.

    Raises:
        ValueError: a number that is not positive, a size that 4 does not divide, or a width that groups does not.
    """

    channels: int = 1
    image_size: int = 28
    latent_channels: int = 4
    width: int = 32
    groups: int = 8

    def __post_init__(self) -> None:
        for name in ("channels", "image_size", "latent_channels", "width", "groups"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.image_size % 4:
            raise ValueError(f"image_size must be a multiple of 4, got {self.image_size}")
        if self.width % self.groups:
            raise ValueError(f"width must be a multiple of groups = {self.groups}, got {self.width}")

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image."""
        return (self.channels, self.image_size, self.image_size)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Of one sample's latents."""
        return (self.latent_channels, self.image_size // 4, self.image_size // 4)


class Autoencoder(nn.Module):
    """Images to latents of zero mean and unit variance in every channel, and back.

    The encoder gives a normal distribution (Kingma & Welling 2013), of which latents are the mean.

    Attributes:
        config: its shape.
        mean, std: of the encoder's means over the data that it was trained on, by channel.

    Example:
        >>> autoencoder = Autoencoder(AutoencoderConfig()).eval()
        >>> latents = autoencoder.encode(torch.zeros(3, 1, 28, 28))
        >>> latents.shape, autoencoder.decode(latents).shape
        (torch.Size([3, 4, 7, 7]), torch.Size([3, 1, 28, 28]))
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config = config
        width, groups, folded = config.width, config.groups, 4 * config.channels
        self.encoder = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(folded, width, 3, padding=1),
            _Residual(width, groups),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1),
            _Residual(2 * width, groups),
            *_end(2 * width, groups, 2 * config.latent_channels),
        )
        self.decoder = nn.Sequential(
            nn.Conv2d(config.latent_channels, 2 * width, 3, padding=1),
            _Residual(2 * width, groups),
            _Residual(2 * width, groups),
            nn.Conv2d(2 * width, 4 * width, 1),
            nn.PixelShuffle(2),
            _Residual(width, groups),
            *_end(width, groups, folded),
            nn.PixelShuffle(2),
        )
        self.register_buffer("mean", torch.zeros(config.latent_channels, 1, 1))
        self.register_buffer("std", torch.ones(config.latent_channels, 1, 1))
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def distribution(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the encoder for images (B, C, H, W) in [-1, 1], not normalised.

        Raises:
            ValueError: images of another shape.
        """
        if images.shape[1:] != (shape := self.config.shape):
            raise ValueError(f"images must be (B, {', '.join(map(str, shape))}), got {tuple(images.shape)}")
        mean, log_variance = self.encoder(images.to(self.mean.dtype)).chunk(2, dim=1)
        return mean, log_variance.clamp(-30, 20)

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(images that come back, mean, log variance), as it is trained; noise are standard normals like latents."""
        mean, log_variance = self.distribution(images)
        return self.decoder(mean + noise * (0.5 * log_variance).exp()), mean, log_variance

    def encode(self, images: Tensor) -> Tensor:
        """Latents (B, latent_channels, H / 4, W / 4) of images (B, C, H, W) in [-1, 1].

        Raises:
            ValueError: images of another shape.
        """
        return (self.distribution(images)[0] - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, C, H, W), in about [-1, 1], of latents (B, latent_channels, H / 4, W / 4).

        Raises:
            ValueError: latents of another shape.
        """
        if latents.shape[1:] != (shape := self.config.latent_shape):
            raise ValueError(f"latents must be (B, {', '.join(map(str, shape))}), got {tuple(latents.shape)}")
        images: Tensor = self.decoder(latents.to(self.mean.dtype) * self.std + self.mean)
        return images.contiguous()


class _Residual(nn.Module):
    """Two 3x3 convolutions around a residual."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.norm_in, self.norm_out = nn.GroupNorm(groups, channels), nn.GroupNorm(groups, channels)
        self.conv_in = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_out = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(functional.silu(self.norm_in(x)))
        return x + self.conv_out(functional.silu(self.norm_out(h)))


def _end(width: int, groups: int, channels: int) -> tuple[nn.Module, ...]:
    return nn.GroupNorm(groups, width), nn.SiLU(), nn.Conv2d(width, channels, 3, padding=1)
