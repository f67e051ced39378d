"""Workspaces of a thread that wait for its next run of the same kind."""

from __future__ import annotations

import threading
from collections import OrderedDict

from fastsample.loop.workspace import Kind, Workspace
from fastsample.tables import Table

_KEPT = 8  # workspaces of a thread that wait for the next run
# Bytes of a state, and of the times of all rows, that are worth keeping: for more, making the memory is a small part of
# a run.
_LARGEST = 64 << 10

_pool = threading.local()


def taken(kind: Kind) -> Workspace | None:
    """A workspace that this thread has left, and nobody else has."""
    waiting: OrderedDict[Kind, Workspace] | None = getattr(_pool, "waiting", None)
    return None if waiting is None else waiting.pop(kind, None)


def leave(workspace: Workspace) -> None:
    """Lets a later run of this thread take the workspace."""
    waiting = _pool.__dict__.setdefault("waiting", OrderedDict())
    waiting[workspace.kind] = workspace
    if len(waiting) > _KEPT:
        waiting.popitem(last=False)


def worth_sharing(kind: Kind, table: Table) -> bool:
    """Whether a later run is to take over such a workspace: small ones on the CPU.

    On a GPU another stream could still be reading it, and the allocator keeps memory anyway.
    """
    if kind.device.type != "cpu" or kind.shape.numel() * kind.dtype.itemsize > _LARGEST:
        return False
    batch = 2 * kind.shape[0] if kind.guided else kind.shape[0]
    return batch * table.t.nbytes <= _LARGEST
