"""Reads a model's file: its tensors, and what its metadata say of it."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from fastsample.storage.reading import regular_size


def read(path: Path, kind: str, key: str, command: str) -> tuple[str, dict[str, Tensor]]:
    """(the text under this key of the metadata, the tensors) of a safetensors file.

    Args:
        path: of the file.
        kind, command: what it holds and what makes such files, as texts name them.
        key: of the metadata.

    Raises:
        FileNotFoundError: there is no such file. ValueError: it is of another kind.
    """
    if path.is_dir():
        raise FileNotFoundError(f"no {kind} at {path}: name the .safetensors file in it")
    regular_size(path, kind)
    try:
        with safe_open(path, framework="pt") as file:
            about = (file.metadata() or {}).get(key)
        tensors = safetensors.torch.load_file(path)
    except Exception as error:  # a dtype that torch does not have raises what its reader trips over
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if about is None:
        raise ValueError(f"{path} was not made by {command}: its metadata lacks {key!r}")
    return about, tensors
