"""The processes that make one set: they share a folder and a counter, and nothing else.

A process group and its collectives are left out on purpose. Chunks do not depend on each other, so that nobody has to
wait for the slowest, and the store by which torchrun's processes find each other hands out numbers.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, Store

_PLAN, _NEXT, _DONE, _LEFT = "plan", "next", "done", "left"
_PATIENCE = timedelta(days=7)  # of a process that waits for the first one's plan
_PAUSE = 0.05


class Alone:
    """One process, which makes every chunk."""

    rank, count, first = 0, 1, True

    def __init__(self) -> None:
        self._done = 0

    def plan(self, chunks: Sequence[int] | None) -> Sequence[int]:
        """The chunks that are to be made, which the first process says and the others, with None, learn."""
        assert chunks is not None
        return chunks

    def handed_out(self, chunks: Sequence[int]) -> Iterator[int]:
        """The chunks that this process is to make, as it asks for them."""
        yield from chunks

    def report(self, samples: int) -> int:
        """Adds samples that are on disk; returns how many all processes have added."""
        self._done += samples
        return self._done

    def leave(self, watch: Callable[[int], object]) -> None:
        """Ends this process's part; the first one waits for the others, and tells `watch` how far they are."""


class Crew:
    """Several processes, as `torchrun` starts them on one machine or more.

    Args:
        store: what they share, and no processes before them.
        rank, count: of this one, and how many there are.
    """

    def __init__(self, store: Store, rank: int, count: int) -> None:
        self._store = PrefixStore("fastsample.generate", store)
        self._store.set_timeout(_PATIENCE)
        self.rank, self.count, self.first = rank, count, rank == 0

    def plan(self, chunks: Sequence[int] | None) -> Sequence[int]:
        """As Alone.plan."""
        if self.first:
            self._store.set(_PLAN, json.dumps(chunks))
        planned: list[int] = json.loads(self._store.get(_PLAN))
        return planned

    def handed_out(self, chunks: Sequence[int]) -> Iterator[int]:
        """As Alone.handed_out: whoever is done with one gets the next."""
        while (place := self._store.add(_NEXT, 1) - 1) < len(chunks):
            yield chunks[place]

    def report(self, samples: int) -> int:
        """As Alone.report."""
        total: int = self._store.add(_DONE, samples)
        return total

    def leave(self, watch: Callable[[int], object]) -> None:
        """As Alone.leave: the first process may be the one that keeps the store."""
        left = self._store.add(_LEFT, 1)
        while self.first and left < self.count:
            time.sleep(_PAUSE)
            watch(self.report(0))
            left = self._store.add(_LEFT, 0)


def crew_of_this_run() -> Alone | Crew:
    """The processes that torchrun has started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Alone()
    from torch.distributed.rendezvous import rendezvous

    found: Any = next(iter(rendezvous("env://")))
    store, rank, count = found
    # torchrun keeps its store when it starts processes anew: after a death it counts that, and else there are more.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return Crew(PrefixStore(f"attempt {attempt} of {count}", store), rank, count)
