"""A generated set as one .npz file, and whether it is whole."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastsample.generation.folder import Folder
from fastsample.generation.formats import write_arrays
from fastsample.storage.writing import check_replaceable, replacing


class Report(NamedTuple):
    """What there is of a set, in chunks.

    Attributes:
        chunks: of the whole set.
        whole, damaged, missing: of these.
        doubled: that are there more than once.
        listed: whether the manifest lists what is there.
    """

    chunks: int
    whole: int
    damaged: int
    missing: int
    doubled: int
    listed: bool

    @property
    def complete(self) -> bool:
        """Whether nothing is missing, damaged or doubled, and the manifest says so."""
        return self.whole == self.chunks and not self.damaged and not self.doubled and self.listed


def verify(folder: str | os.PathLike[str]) -> Report:
    """Reads every chunk of a generated set and compares its checksum with its name and the manifest.

    Raises:
        FileNotFoundError, ValueError: it is no folder of fastsample generate.
    """
    found = Folder.open(folder)
    stored = list(found.stored())
    sums = {one: found.checksum(one) for one in stored}
    whole = Counter(one.number for one, checksum in sums.items() if checksum is not None)
    damaged = len(stored) - whole.total()
    missing = len(set(range(found.recipe.chunks)) - {one.number for one in stored})
    doubled = sum(count > 1 for count in whole.values())
    listed = {entry["file"]: entry["sha256"] for entry in found.manifest()}
    fits = listed == {one.path.name: checksum for one, checksum in sums.items()}
    return Report(found.recipe.chunks, len(whole), damaged, missing, doubled, fits)


def merge(folder: str | os.PathLike[str], out: str | os.PathLike[str]) -> int:
    """Writes a generated set as one file: arr_0 uint8 (N, H, W, C) and, with classes, arr_1 int64 (N,).

    That is what guided-diffusion's evaluator and other tools for FID read. Chunks pass through memory one at a time.

    Args:
        folder: of the set.
        out: the file, replaced when the new one is whole.

    Returns:
        N.

    Raises:
        FileNotFoundError, ValueError: the folder is none of fastsample generate, or its set is not whole.
        OSError: the file cannot be written; nothing has changed then.
    """
    found, out = Folder.open(folder), Path(out)
    if out.suffix != ".npz":
        raise ValueError(f"out must end in .npz, got {out}")
    check_replaceable(out)
    if found.path.resolve() in out.resolve().parents:
        raise ValueError(f"out must lie outside the folder {found.path}, got {out}")
    stored = found.complete()
    first = found.get(stored[0])

    def images(member: Any) -> None:
        _write_header(member, np.dtype(np.uint8), (found.recipe.num, *first.images.shape[1:]))
        for chunk in found.chunks():
            if chunk.images.shape[1:] != first.images.shape[1:]:
                raise ValueError(f"chunks differ in shape: {first.images.shape[1:]} and {chunk.images.shape[1:]}")
            member.write(_bytes(chunk.images))

    def labels(member: Any) -> None:
        _write_header(member, np.dtype(np.int64), (found.recipe.num,))
        for chunk in found.chunks():
            assert chunk.labels is not None
            member.write(_bytes(chunk.labels))

    arrays = {"arr_0": images} if first.labels is None else {"arr_0": images, "arr_1": labels}
    with replacing(out) as file:
        write_arrays(file, arrays)
    return found.recipe.num


def _write_header(member: Any, dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(member, header)


def _bytes(array: NDArray[Any]) -> memoryview:
    return np.ascontiguousarray(array).data.cast("B")
