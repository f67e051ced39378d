"""How packed adapters lie in memory for kernels.py; without Triton, for those who write it."""

from __future__ import annotations

RANK_STEP = 16
"""Ranks are padded to multiples of this: a product on tensor cores sums over at least as many."""


def padded(rank: int) -> int:
    """The rank that there is memory for."""
    return -(-rank // RANK_STEP) * RANK_STEP
