"""Samples as pictures."""

from __future__ import annotations

import io
import math
import os
import struct
import zlib
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastsample.checks import check_floating, check_has_values, integer, real
from fastsample.hints import hinting
from fastsample.storage.writing import replacing

PICTURES = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
_MOST = 2**31 - 1  # pixels along an axis of a PNG file
_WHITE = 255


def to_uint8(x: Tensor) -> Tensor:
    """Images in [-1, 1] as bytes: (x + 1) 127.5, clamped to [0, 255] and rounded to the nearest, halves up.

    NaN becomes 0. Computed in float32 (float64 for a float64 x), so that values within 1e-5 of a half may go either
    way.

    Args:
        x: (B, C, H, W), floating point, of any strides. Never modified.

    Returns:
        uint8 (B, H, W, C), contiguous: what matplotlib and video writers take, and Pillow for C = 3; where C = 1 Pillow
        wants the axis gone, Image.fromarray(images[0, ..., 0].numpy()).

    Raises:
        TypeError: for what is no floating-point tensor. ValueError: for one that is not 4-D.

    Example:
        >>> to_uint8(torch.tensor([-1.0, 0.0, 0.5, 7.0]).reshape(1, 1, 2, 2)).flatten().tolist()
        [0, 128, 191, 255]
    """
    check_floating("x", x)
    if x.ndim != 4:
        raise ValueError(f"x must be (B, C, H, W), got shape {tuple(x.shape)}")
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    # The conversion truncates: 127.5 and a half to round with.
    levels = x.detach().to(dtype).mul(127.5).add_(128).nan_to_num_(0).clamp_(0, 255)
    return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@hinting()
def save_grid(
    samples: Tensor,
    path: str | os.PathLike[str],
    *,
    columns: int | None = None,
    padding: int = 2,
    value_range: Sequence[float] = (-1.0, 1.0),
) -> None:
    """Writes a batch of images as one picture: row by row, the first one at the upper left.

    A value v becomes the byte 255 (v - low) / (high - low), rounded and clamped as by `to_uint8`; NaN becomes black.
    The file appears whole or not at all, in place of one that is there.

    Args:
        samples: (B, C, H, W), floating point, C = 1 or 3, of any strides and on any device. Never modified.
        path: of the file; its end says the format. .png needs nothing, .jpg, .jpeg and .webp need Pillow.
        columns: images in a row; default the least number whose square is at least B.
        padding: white pixels between two images.
        value_range: (low, high), the values of black and of white.

    Raises:
        TypeError: for what is no floating-point tensor, no path or no number. ValueError: for another shape or other
            channels, such as those of latents, a range that is none, or another format. ImportError: Pillow is needed
            and missing. OSError: the file cannot be written. Nothing is written then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_grid(torch.zeros(10, 3, 32, 32), f"{folder}/grid.png", columns=5)
        ...     print(os.listdir(folder))
        ['grid.png']
    """
    form = picture_format(path)
    pixels = _grid(_bytes(samples, value_range), columns, integer("padding", padding, 0))
    data = _png(pixels) if form == "PNG" else _by_pillow(pixels, form)
    with replacing(path) as file:
        file.write(data)


def picture_format(path: str | os.PathLike[str]) -> str:
    """The format that the end of a path says, once it is known that it can be written.

    Raises:
        TypeError, ValueError, ImportError: as save_grid.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    suffix = Path(path).suffix.lower()
    if suffix not in PICTURES:
        raise ValueError(f"path must end in one of {', '.join(PICTURES)}, got {str(path)!r}")
    if suffix != ".png" and find_spec("PIL") is None:
        raise ImportError(f"{suffix} needs Pillow: pip install pillow; .png needs nothing")
    return PICTURES[suffix]


def _bytes(samples: Tensor, value_range: Sequence[float]) -> NDArray[np.uint8]:
    """The samples as uint8 (B, H, W, C)."""
    check_floating("samples", samples)
    check_has_values("samples", samples)
    if samples.ndim != 4 or samples.numel() == 0:
        raise ValueError(f"samples must be (B, C, H, W) with nothing zero, got shape {tuple(samples.shape)}")
    if samples.shape[1] not in (1, 3):
        raise ValueError(f"samples must have 1 or 3 channels, got {samples.shape[1]}; latents are to be decoded first")
    low, high = _limits(value_range)
    if (low, high) != (-1, 1):
        wide = samples.detach().to(torch.float64 if samples.dtype == torch.float64 else torch.float32)
        samples = (wide - low) * (2 / (high - low)) - 1
    return to_uint8(samples).cpu().numpy()


def _limits(value_range: Sequence[float]) -> tuple[float, float]:
    if isinstance(value_range, str) or not hasattr(value_range, "__len__") or len(value_range) != 2:
        raise ValueError(f"value_range must be (low, high), got {value_range!r}")
    low, high = (real("value_range", value) for value in value_range)
    if not (math.isfinite(low) and math.isfinite(high - low) and low < high):
        raise ValueError(f"value_range must be two finite numbers, the first one less, got {value_range!r}")
    return low, high


def _grid(images: NDArray[np.uint8], columns: int | None, padding: int) -> NDArray[np.uint8]:
    """(B, H, W, C) side by side: (height, width, C)."""
    batch, height, width, channels = images.shape
    across = math.isqrt(batch - 1) + 1 if columns is None else min(integer("columns", columns, 1), batch)
    down = -(-batch // across)
    if max(down * (height + padding), across * (width + padding)) > _MOST:
        raise ValueError(f"padding of {padding} makes the picture more than {_MOST} pixels wide or high")
    cells = np.full((down * across, height + padding, width + padding, channels), _WHITE, np.uint8)
    cells[:batch, :height, :width] = images
    rows = cells.reshape(down, across, *cells.shape[1:]).transpose(0, 2, 1, 3, 4)
    whole = rows.reshape(down * (height + padding), across * (width + padding), channels)
    return whole[: len(whole) - padding, : whole.shape[1] - padding]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """A PNG file (RFC 2083) of (height, width, 1 or 3)."""
    height, width, channels = pixels.shape

    def part(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    # 8 bits a channel, grey or RGB, compressed by deflate, not interlaced.
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    lines = np.zeros((height, 1 + width * channels), np.uint8)  # each begins with its filter, 0 for none
    lines[:, 1:] = pixels.reshape(height, -1)
    parts = part(b"IHDR", header), part(b"IDAT", zlib.compress(lines.tobytes())), part(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def _by_pillow(pixels: NDArray[np.uint8], form: str) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, format=form)
    return file.getvalue()
