"""The file that a command is to write, looked at before anything is computed for it."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from fastsample.storage.writing import check_replaceable, check_writable


def check_out(path: Path, suffixes: Collection[str]) -> None:
    """Raises ValueError or OSError unless a file of one of these suffixes can be written to the path of --out."""
    if path.suffix.lower() not in suffixes:
        one_of = "one of " if len(suffixes) > 1 else ""
        raise ValueError(f"--out must end in {one_of}{', '.join(suffixes)}, got {str(path)!r}")
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ValueError(f"--out: no such folder: {folder}")
    check_replaceable(path)
    check_writable(folder)
