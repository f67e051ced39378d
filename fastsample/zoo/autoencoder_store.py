"""Autoencoders on disk: a safetensors file whose metadata holds the shape."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import safetensors.torch
import torch
from safetensors import safe_open

from fastsample.storage.reading import regular_size
from fastsample.storage.writing import replacing
from fastsample.zoo.autoencoder import Autoencoder, AutoencoderConfig

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
    tensors = {
        name: (value if dtype is None or name in ("mean", "std") else value.to(dtype)).contiguous()
        for name, value in autoencoder.state_dict().items()
    }
    with replacing(path) as file:
        file.write(safetensors.torch.save(tensors, metadata={_KEY: json.dumps(asdict(autoencoder.config))}))


def load_autoencoder(path: str | Path) -> Autoencoder:
    """The autoencoder that save_autoencoder wrote, or `fastsample autoencoder`, on the CPU and in float32.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it holds no autoencoder.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"no autoencoder at {path}: name the .safetensors file in it")
    regular_size(path, "autoencoder")
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(_KEY)
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # a dtype that torch does not have raises what its reader trips over
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if about is None:
        raise ValueError(f"{path} was not made by fastsample autoencoder: its metadata lacks {_KEY!r}")
    try:
        config = AutoencoderConfig(**json.loads(about))
        expected = (config.width, 4 * config.channels, 3, 3)
        if tuple(tensors["encoder.1.weight"].shape) != expected:  # before memory is taken for what the header says
            raise ValueError(f"encoder.1.weight is not {expected}")
        with torch.random.fork_rng(devices=[]):
            autoencoder = Autoencoder(config)
        autoencoder.load_state_dict(tensors)
    except (ArithmeticError, LookupError, RecursionError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())[:500]
        raise ValueError(
            f"{path} holds no autoencoder as its {_KEY!r} says: {type(error).__name__}: {reason}"
        ) from error
    return autoencoder.eval().requires_grad_(False)
