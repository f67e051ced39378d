"""Which chunks a process makes, of several that share a folder and a counter, and nothing else.

A process group and its collectives are left out on purpose: chunks do not depend on each other, so nobody has to wait
for the slowest. The counter only keeps processes from making the same chunk; what is there is told by the folder. So it
may be an old one, of processes that have died, or be lost: then the second pass makes what the first left out.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.distributed import PrefixStore, Store

_NEXT = "next"


class Crew:
    """The processes of a run, and this one's place among them.

    Args:
        rank, count: of this process, and how many there are.
        store: what they share; None for one process.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: Store | None = None) -> None:
        self.rank, self.count, self._store = rank, count, store

    @property
    def first(self) -> bool:
        """Whether this is the process that begins and ends the set."""
        return self.rank == 0

    def chunks(self, name: str, missing: Callable[[], Sequence[int]]) -> Iterator[int]:
        """The chunks that this process is to make, as it asks for them; when they end, the set is whole.

        Args:
            name: of the set, by which its counter is told from others.
            missing: the chunks that are not there yet, in ascending order.
        """
        first = missing()
        if self._store is None:
            yield from first
            return
        wanted, place, store = set(first), -1, PrefixStore(f"fastsample.generate {name}", self._store)
        while first and place < first[-1]:
            try:
                place = store.add(_NEXT, 1) - 1
            except RuntimeError:  # whoever kept the store has ended
                break
            if place in wanted:
                yield place
        # What dead processes were about to make, and what others are at: begun at different ends it is soon done.
        while left := missing():
            yield left[len(left) * self.rank // self.count]

    def check(self) -> None:
        """Raises RuntimeError where the first process kept the store, as it does without torchrun, and has ended."""
        try:
            if self._store is not None:
                self._store.check([_NEXT])
        except RuntimeError as error:
            raise RuntimeError("the first process has ended before it began the set") from error


def crew_of_this_run() -> Crew:
    """The processes that torchrun has started, or this one alone."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Crew()
    from torch.distributed.rendezvous import rendezvous

    store, rank, count = next(iter(rendezvous("env://")))
    found: Any = store
    return Crew(rank, count, found)
