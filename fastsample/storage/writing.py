"""Own files are written whole or not at all, and a folder by one process at a time."""

from __future__ import annotations

import errno
import glob
import os
import secrets
import stat
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from fastsample.storage.reading import kind_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

PART = ".part"


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file to write that takes the place of `path`, on disk, when the block ends; never where the block raises.

    Until then the file has a name of its own, so that two writers do not meet, and a process that is killed leaves
    `path` as it was. A symbolic link at `path` is replaced, not followed. The new file has the rights of one that it
    replaces.

    Raises:
        ValueError: path is a folder, a device or the like. OSError: path cannot be written; nothing has changed then.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "a.txt")) as file:
        ...         _ = file.write(b"whole")
        ...     print(os.listdir(folder))
        ['a.txt']
    """
    path = Path(path)
    check_replaceable(path)
    part = path.with_name(f"{_beginning(path.name)}{secrets.token_hex(8)}{PART}")
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
    try:
        with os.fdopen(os.open(part, flags, 0o666), "w+b") as file:
            _keep_mode(file, path)
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with suppress(OSError):
            part.unlink()
        # The disk's errors name no file, and the part is not the caller's.
        if isinstance(error, OSError) and error.errno is not None and error.filename in (None, str(part)):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    sync(path.parent)


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes text as UTF-8; see replacing."""
    with replacing(path) as file:
        file.write(text.encode())


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raises ValueError unless a file can be put at path: nothing, a regular file or a link is there."""
    with suppress(FileNotFoundError):
        mode = os.lstat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
            raise ValueError(f"{path} is {kind_of(mode)}, and a file is to be written there")


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Raises OSError or ValueError unless files can be made in the folder, or in the one that would be made there."""
    place = Path(folder).absolute()
    while not os.path.lexists(place) and place != place.parent:
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
    # Root may do all, and a disk that is mounted for reading still refuses: trying is the test.
    trial = place / f".{secrets.token_hex(8)}{PART}"
    try:
        os.close(os.open(trial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError as error:
        raise OSError(error.errno, f"no file can be made here: {error.strerror}", str(place)) from error
    trial.unlink()


@contextmanager
def sole_writer(folder: Path) -> Iterator[None]:
    """Keeps other sole writers, in any process or thread, out of a folder, as far as its file system can.

    Raises:
        RuntimeError: another writer uses the folder.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RuntimeError(f"{folder} is in use by another run: wait for its end or name another folder") from None
        except OSError:  # a file system without locks; the files themselves are still written whole
            pass
        yield
    finally:
        os.close(descriptor)


def remove_parts(folder: Path, names: Iterable[str]) -> None:
    """Removes the parts that killed writers of these files left. No writer may be at work."""
    for path in (folder / name for name in names):
        for part in path.parent.glob(f"{glob.escape(_beginning(path.name))}*{PART}"):
            if part.is_symlink() or part.is_file():
                part.unlink(missing_ok=True)


def _beginning(name: str) -> str:
    """What the names of a file's parts begin with: at most 102 bytes, of the 255 that systems allow."""
    return f".{os.fsencode(name)[:100].decode(sys.getfilesystemencoding(), 'ignore')}."


def _keep_mode(file: BinaryIO, path: Path) -> None:
    """Gives the file the rights of the one at `path`, where there is one and the system lets it."""
    with suppress(OSError):
        mode = os.lstat(path).st_mode
        if stat.S_ISREG(mode) and hasattr(os, "fchmod"):
            os.fchmod(file.fileno(), stat.S_IMODE(mode) & 0o777)


def sync(folder: Path) -> None:
    """Brings a folder's names to disk, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
