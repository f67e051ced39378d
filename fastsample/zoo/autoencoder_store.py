"""Autoencoders on disk: a safetensors file whose metadata holds the shape."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from fastsample.storage.writing import replacing
from fastsample.zoo.autoencoder import Autoencoder, AutoencoderConfig
from fastsample.zoo.reading import read

_KEY = "fastsample_autoencoder"


def save_autoencoder(autoencoder: Autoencoder, path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes an autoencoder, replacing the file at once.

    Args:
        autoencoder: what is written.
        path: of the file, by custom .safetensors.
        dtype: of its weights in the file, such as torch.float16 for half the size; None as they are.

    Raises:
        OSError: it cannot be written. ValueError: there is a folder or a device. What was there stays.
    """
    tensors = tensors_of(autoencoder, dtype)
    with replacing(path) as file:
        file.write(safetensors.torch.save(tensors, metadata={_KEY: json.dumps(asdict(autoencoder.config))}))


def load_autoencoder(path: str | Path) -> Autoencoder:
    """The autoencoder that save_autoencoder wrote, or `fastsample autoencoder`, on the CPU and in float32.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds no autoencoder.
    """
    path = Path(path)
    about, tensors = read(path, "autoencoder", _KEY, "fastsample autoencoder")
    try:
        return autoencoder_of(json.loads(about), tensors)
    except (ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"{path} holds no autoencoder as its {_KEY!r} says: {type(error).__name__}: {reason}"
        ) from error


def tensors_of(autoencoder: Autoencoder, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Its tensors for a file, the weights in this dtype; mean and std stay as they are."""
    return {
        name: (value if dtype is None or name in ("mean", "std") else value.to(dtype)).contiguous().clone()
        for name, value in autoencoder.state_dict().items()
    }


def autoencoder_of(fields: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Autoencoder:
    """The autoencoder of a file's config and tensors, in float32 and eval mode.

    Raises:
        TypeError, ValueError, LookupError, RuntimeError: they do not belong together.
    """
    config = AutoencoderConfig(**fields)
    # Before memory is taken for what the header says: every size follows from these.
    wanted = {
        "encoder.1.weight": (config.width, 4 * config.channels, 3, 3),
        "decoder.0.weight": (2 * config.width, config.latent_channels, 3, 3),
    }
    for name, shape in wanted.items():
        if (actual := tuple(tensors[name].shape)) != shape:
            raise ValueError(f"{name} has shape {actual}, not {shape}")
    with torch.random.fork_rng(devices=[]):
        autoencoder = Autoencoder(config)
    autoencoder.load_state_dict(tensors)
    return autoencoder.eval().requires_grad_(False)
