"""The folder of a run: whether it may be used, and that one run uses it at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

from fastsample.checks import usable_device
from fastsample.storage.writing import check_replaceable, check_writable, remove_parts, sole_writer
from fastsample.train.processes import Processes


def check_place(
    out: Path, files: Sequence[str], checkpoints: Sequence[str], device: str | torch.device, save_every: int
) -> None:
    """Raises what a run would raise for these arguments, before data are read or a folder is made.

    Args:
        out: the folder.
        files: the names of all that a run writes there.
        checkpoints: those of the files without which the others are somebody's own.
        device, save_every: of the run.

    Raises:
        ValueError, OSError: the folder or the device cannot be used, or save_every is less than 1.
    """
    if save_every < 1:
        raise ValueError(f"save_every must be at least 1, got {save_every}")
    usable_device(device)
    check_writable(out)
    for name in files:
        check_replaceable(out / name)
    if any((out / name).exists() for name in checkpoints):
        return
    for name in files:
        # Links are replaced; a file without a checkpoint beside it is somebody's own.
        if (out / name).is_file() and not (out / name).is_symlink():
            raise ValueError(f"{out} holds {name} but no {checkpoints[0]} of a run: use another folder")


@contextmanager
def in_use(out: Path, files: Sequence[str], processes: Processes) -> Iterator[None]:
    """The folder is made, cleaned of what killed runs left, and this run's alone; only the first process does so.

    Raises:
        RuntimeError: another run uses it. OSError: it cannot be made.
    """
    if processes.first:
        out.mkdir(parents=True, exist_ok=True)
    with sole_writer(out) if processes.first else nullcontext():
        if processes.first:
            remove_parts(out, files)
        yield
