"""Files of others are read only where they are regular ones, and unpacked only where they stay small."""

from __future__ import annotations

import os
import stat
from typing import BinaryIO

# What a small file may unpack to: up to _FREE bytes whatever its size, and up to _RATIO times its size.
_FREE, _RATIO = 64 << 20, 200


def regular_size(path: str | os.PathLike[str], what: str = "file") -> int:
    """The bytes of a regular file.

    Raises:
        FileNotFoundError: there is no such path. ValueError: it is a folder, a FIFO, a device, or cannot be looked at.
    """
    try:
        status = os.stat(path)
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"no {what} at {path}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    _check_regular(status, path)
    return status.st_size


def open_regular(path: str | os.PathLike[str], what: str = "file") -> BinaryIO:
    """Opens a regular file to read its bytes; never waits, as a FIFO's reader would.

    Raises:
        FileNotFoundError, ValueError: as regular_size.
    """
    regular_size(path, what)
    # The path may hold something else by now: it is opened without waiting, and what was opened is checked again.
    waitless = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        file = os.fdopen(os.open(path, os.O_RDONLY | waitless), "rb")
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    try:
        _check_regular(os.fstat(file.fileno()), path)
    except BaseException:
        file.close()
        raise
    return file


def check_expansion(size: int, stored: int, name: object) -> None:
    """Raises ValueError where `stored` bytes of a file would unpack to far more than such data do.

    Example:
        >>> check_expansion(10 << 30, 10 << 20, "a.npz")
        Traceback (most recent call last):
        ValueError: a.npz would unpack from 10485760 to 10737418240 bytes, more than 200 times as many
    """
    if size > max(_FREE, _RATIO * stored):
        raise ValueError(f"{name} would unpack from {stored} to {size} bytes, more than {_RATIO} times as many")


def kind_of(mode: int) -> str:
    """What lies at a path that is neither a regular file nor a link, in words."""
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a FIFO" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"


def _check_regular(status: os.stat_result, path: str | os.PathLike[str]) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is {kind_of(status.st_mode)}, not a regular file")
