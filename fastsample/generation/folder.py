"""A generated set on disk: its settings, its chunks, and a list of these.

    settings.json                         what decides the set, written first
    chunk-000000-0123456789abcdef.npz     a chunk; its name ends in the beginning of its checksum
    manifest.json                         the settings and every chunk with its whole checksum, written last

A chunk appears whole, under its final name, or not at all. The names say all that the manifest does: it can be made
again from them.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

from fastsample.generation.chunk import Chunk
from fastsample.generation.formats import FORMATS, Files
from fastsample.generation.recipe import Recipe
from fastsample.storage.writing import PART, check_writable, remove_parts, replace_text, replacing, sole_writer, sync

SETTINGS, MANIFEST = "settings.json", "manifest.json"
_DAMAGED = "{} is damaged: the same `fastsample generate` makes it anew"
_NAME = re.compile(r"chunk-(\d{6,})-([0-9a-f]{16})(\.[a-z]+)?")


class Stored(NamedTuple):
    """A chunk on disk.

    Attributes:
        number: which chunk of the set it is.
        path: of its file or folder.
        named: the beginning of its checksum, as its name has it.
    """

    number: int
    path: Path
    named: str


class Folder:
    """A generated set on disk.

    Args:
        path: of the folder.
        settings: what decides the set, as JSON.

    Attributes:
        recipe: the part of the settings that the caller chose.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path, self.settings = path, dict(settings)
        try:
            self.recipe = Recipe(**self.settings["recipe"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path / SETTINGS} holds no settings of fastsample generate: {error}") from error

    @property
    def digest(self) -> str:
        """SHA-256 of the settings."""
        return hashlib.sha256(_text(self.settings).encode()).hexdigest()

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Folder:
        """A set that is there.

        Raises:
            FileNotFoundError: the folder or its settings are missing. ValueError: these are none.
        """
        path = Path(path)
        try:
            settings = json.loads((path / SETTINGS).read_text())
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"no {SETTINGS} in {path}: it is no folder of fastsample generate") from None
        except (OSError, ValueError) as error:
            raise ValueError(f"{path / SETTINGS} cannot be read: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"{path / SETTINGS} holds no settings of fastsample generate")
        return cls(path, settings)

    def check(self) -> None:
        """Raises where this set cannot go into its folder, before anything is written.

        Raises:
            ValueError: the folder is of other settings, or holds something else. OSError: it cannot be written.
        """
        if self.begun():
            _check_same(Folder.open(self.path).settings, self.settings, self.path)
        elif self.path.is_dir() and any(not entry.name.endswith(PART) for entry in self.path.iterdir()):
            raise ValueError(f"{self.path} holds other files and no {SETTINGS}: name a new or empty folder")
        check_writable(self.path)

    @contextmanager
    def written(self) -> Iterator[None]:
        """Makes the folder, or takes it up without what a killed run left unfinished, and keeps other runs out.

        Raises:
            RuntimeError: another run writes into it. Else as check.
        """
        self.check()
        self.path.mkdir(parents=True, exist_ok=True)
        with sole_writer(self.path):
            self.check()  # another run may have begun in between
            if not self.begun():
                replace_text(self.path / SETTINGS, _text(self.settings))
            remove_parts(self.path, (SETTINGS, MANIFEST))
            for part in self.path.glob(f".chunk-*{PART}"):
                _remove(part)
            yield

    def stored(self) -> Iterator[Stored]:
        """The chunks that are there, in order; their bytes are not looked at."""
        for name in sorted(os.listdir(self.path)):
            found = _NAME.fullmatch(name)
            if found and (found[3] or "") == FORMATS[self.recipe.format].suffix:
                yield Stored(int(found[1]), self.path / name, found[2])

    def checksum(self, stored: Stored) -> str | None:
        """SHA-256 of a chunk, its number and the settings; None where it is not what was written."""
        try:
            checksum = self._checksum(stored.number, _files_of(stored.path))
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            return None  # any other error is the disk's, and says nothing of the chunk
        return checksum if checksum.startswith(stored.named) and stored.number < self.recipe.chunks else None

    def begun(self) -> bool:
        """Whether the set has its settings on disk."""
        return (self.path / SETTINGS).exists()

    def missing(self) -> list[int]:
        """The chunks that are still to be made, by their names."""
        there = self._numbers()
        return [number for number in range(self.recipe.chunks) if number not in there]

    def samples(self) -> int:
        """How many samples are there, by the names of their chunks."""
        return sum(len(self.recipe.places(number)) for number in self._numbers() if number < self.recipe.chunks)

    def remove_damaged(self) -> dict[int, tuple[Stored, str]]:
        """Removes chunks that are torn, doubled or beyond the set; all others by number, with their checksums."""
        whole: dict[int, tuple[Stored, str]] = {}
        for chunk in list(self.stored()):
            checksum = None if chunk.number in whole else self.checksum(chunk)
            if checksum is None:
                _remove(chunk.path)
            else:
                whole[chunk.number] = chunk, checksum
        return whole

    def _numbers(self) -> set[int]:
        return {stored.number for stored in self.stored()} if self.path.is_dir() else set()

    def put(self, number: int, chunk: Chunk) -> None:
        """Writes a chunk: whole, on disk, or not at all. It may be there already: the same bytes have the same name."""
        form = FORMATS[self.recipe.format]
        files = form.encode(chunk)
        path = self.path / f"chunk-{number:06d}-{self._checksum(number, files)[:16]}{form.suffix}"
        if form.suffix:
            with replacing(path) as file:
                file.write(files[""])
            return
        part = self.path / f".{path.name}.{secrets.token_hex(8)}{PART}"
        part.mkdir()
        try:
            for name, data in files.items():
                _write(part / name, data)
            sync(part)
            with suppress(FileExistsError):  # another process was faster, with the same name and so the same bytes
                _rename(part, path)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        sync(self.path)

    def get(self, stored: Stored) -> Chunk:
        """Reads a chunk.

        Raises:
            ValueError: it is not what was written.
        """
        if self.checksum(stored) is None:
            raise ValueError(_DAMAGED.format(stored.path))
        images, labels = FORMATS[self.recipe.format].decode(stored.path)
        places = self.recipe.places(stored.number)
        if len(images) != len(places) or (labels is not None and len(labels) != len(places)):
            raise ValueError(f"{stored.path} has {len(images)} samples in place of {len(places)}")
        return Chunk(places.start, images, labels)

    def chunks(self) -> Iterator[Chunk]:
        """All chunks in order, one at a time in memory.

        Raises:
            ValueError: one is missing or damaged.
        """
        for stored in self.complete():
            yield self.get(stored)

    def complete(self) -> list[Stored]:
        """Every chunk of the set.

        Raises:
            ValueError: some are missing.
        """
        found = {stored.number: stored for stored in self.stored() if stored.number < self.recipe.chunks}
        self._check_complete(found.keys())
        return [found[number] for number in range(self.recipe.chunks)]

    def _checksum(self, number: int, files: Files) -> str:
        sha = hashlib.sha256(_text([self.settings, number]).encode())
        for name in sorted(files):
            sha.update(f"{name}\0{len(files[name])}\0".encode())
            sha.update(files[name])
        return sha.hexdigest()

    def manifest(self) -> list[dict[str, Any]]:
        """The chunks that the manifest lists; none where there is no manifest, or a damaged one."""
        try:
            entries = json.loads((self.path / MANIFEST).read_text())["chunks"]
            return [{"file": str(entry["file"]), "sha256": str(entry["sha256"])} for entry in entries]
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def finish(self) -> None:
        """Removes what is damaged or doubled, and writes the manifest of the complete set.

        Raises:
            ValueError: chunks are missing.
        """
        self._list(self.remove_damaged())

    def rebuild(self) -> None:
        """Writes the manifest anew, and leaves all else as it is.

        Raises:
            ValueError: chunks are missing, damaged or doubled.
        """
        whole: dict[int, tuple[Stored, str]] = {}
        for chunk in self.stored():
            checksum = self.checksum(chunk)
            if checksum is None or chunk.number in whole:
                raise ValueError(_DAMAGED.format(chunk.path))
            whole[chunk.number] = chunk, checksum
        self._list(whole)

    def _list(self, whole: Mapping[int, tuple[Stored, str]]) -> None:
        self._check_complete(whole.keys())
        chunks = []
        for number in range(self.recipe.chunks):
            (stored, checksum), places = whole[number], self.recipe.places(number)
            chunks.append({"file": stored.path.name, "first": places.start, "count": len(places), "sha256": checksum})
        replace_text(self.path / MANIFEST, _text({"settings": self.settings, "chunks": chunks}))

    def _check_complete(self, numbers: Collection[int]) -> None:
        if lost := self.recipe.chunks - len(numbers):
            raise ValueError(
                f"{self.path} lacks {lost} of {self.recipe.chunks} chunks: the same `fastsample generate` makes them"
            )


def _check_same(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Raises ValueError, with the differences, unless two settings are the same."""
    flat = [
        {**each["recipe"], **{name: value for name, value in each.items() if name != "recipe"}} for each in (old, new)
    ]
    names = sorted(flat[0].keys() | flat[1].keys())
    pairs = {name: (flat[0].get(name), flat[1].get(name)) for name in names}
    differences = [f"{name} {was!r} and not {now!r}" for name, (was, now) in pairs.items() if was != now]
    if differences:
        raise ValueError(f"{path} was begun with {', '.join(differences)}: name another folder")


def _files_of(path: Path) -> Files:
    if not path.is_dir():
        return {"": path.read_bytes()}
    return {entry.name: entry.read_bytes() for entry in path.iterdir() if not entry.name.startswith(".")}


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _rename(part: Path, path: Path) -> None:
    """Raises FileExistsError where there is such a folder, with something in it."""
    try:
        os.rename(part, path)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise FileExistsError(*error.args) from error
        raise


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _text(values: object) -> str:
    return json.dumps(values, indent=1) + "\n"
