"""Where tests run: the GPU if torch finds one, else the CPU with Triton's kernels interpreted."""

from __future__ import annotations

import os
from typing import NamedTuple

import torch

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_GPU else "cpu")
if not HAS_GPU:
    # Triton reads it when kernels are imported.
    os.environ.setdefault("TRITON_INTERPRET", "1")


class Target(NamedTuple):
    """A backend, and the device whose tensors it takes here."""

    backend: str
    device: str
