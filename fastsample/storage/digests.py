"""Hashes that tell teachers, students and conditions apart."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


def digest_of(module: nn.Module) -> str:
    """SHA-256 of a module's names and weights."""
    sha = hashlib.sha256()
    for name, value in module.state_dict().items():
        sha.update(name.encode())
        if isinstance(value, Tensor):
            sha.update(bytes_of(value))
    return sha.hexdigest()


def bytes_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor's elements in their order, whatever its dtype."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
