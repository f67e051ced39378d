"""Runs that stop as with Ctrl-C."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def stopped_at(kind: Any, at: int) -> Iterator[None]:
    """Within it a run of this class is interrupted at the beginning of a step, and one must be."""
    step = kind.step

    def until(run: Any, i: int) -> None:
        if i == at:
            raise KeyboardInterrupt
        step(run, i)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "step", until)
        yield
