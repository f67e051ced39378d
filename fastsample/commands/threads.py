"""The threads that subcommands run on."""

from __future__ import annotations

import torch

_MOST_THREADS = 4096


def use_threads(threads: int | None) -> None:
    """Lets torch, and so fastsample, have this many CPU threads. Raises ValueError for a number that makes no sense."""
    if threads is None:
        return
    if not 1 <= threads <= _MOST_THREADS:
        raise ValueError(f"--threads must be from 1 to {_MOST_THREADS}, got {threads}")
    torch.set_num_threads(threads)
