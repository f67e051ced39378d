"""What subcommands run on: threads and a device, refused before work starts."""

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


def usable_device(name: str) -> torch.device:
    """The device. Raises ValueError where nothing can be computed there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).partition(chr(10))[0]}") from None
    if device.type == "meta":
        raise ValueError("device 'meta' cannot be used: nothing is computed there")
    return device
