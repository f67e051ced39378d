"""Paths of a teacher from noise to a sample, made once and kept in a folder, so that training reads them from disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fastsample.storage.writing import remove_parts, replacing
from fastsample.train.processes import Processes

FOLDER = "paths"


class Paths:
    """So many paths, in files of a few each; one that is there whole is not made again.

    Args:
        out: the folder of the run.
        count: of paths.
        chunk: how many of them a file holds, and are made at once.
        make: of the places of paths, an int64 tensor (B,), makes their states, (N, B, ...) float32.
    """

    def __init__(self, out: Path, count: int, chunk: int, make: Callable[[Tensor], Tensor]) -> None:
        self.count, self.chunk = count, chunk
        self._folder, self._make = out / FOLDER, make
        self._open: dict[int, np.ndarray] = {}

    def make(self, processes: Processes, progress: bool) -> None:
        """Makes those that are missing; several processes share the work."""
        self._folder.mkdir(parents=True, exist_ok=True)
        if processes.first:
            remove_parts(self._folder, (self._file(first).name for first in range(0, self.count, self.chunk)))
        processes.wait()  # a part of another process's must not be taken for one that a kill left
        firsts = range(processes.rank * self.chunk, self.count, processes.count * self.chunk)
        with tqdm(total=self.count, disable=not progress, mininterval=5, desc="paths of the teacher") as bar:
            for first in firsts:
                last = min(first + self.chunk, self.count)
                if not self._file(first).is_file():
                    states = self._make(torch.arange(first, last)).transpose(0, 1).contiguous()
                    with replacing(self._file(first)) as file:
                        np.save(file, states.cpu().numpy())
                bar.update((last - first) * processes.count)
        processes.wait()

    def at(self, places: Tensor) -> Tensor:
        """The states of these paths, (N, B, ...) float32 on the CPU."""
        rows = [self._chunk_of(place)[place % self.chunk] for place in places.tolist()]
        return torch.from_numpy(np.stack(rows, axis=1))

    def remove(self) -> None:
        """Removes the files, which a finished run needs no more."""
        self._open.clear()
        for first in range(0, self.count, self.chunk):
            self._file(first).unlink(missing_ok=True)
        if self._folder.is_dir() and not any(self._folder.iterdir()):
            self._folder.rmdir()

    def _file(self, first: int) -> Path:
        return self._folder / f"{first:08d}.npy"

    def _chunk_of(self, place: int) -> np.ndarray:
        first = place // self.chunk * self.chunk
        if first not in self._open:
            self._open[first] = np.load(self._file(first), mmap_mode="r")
        return self._open[first]
