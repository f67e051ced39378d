"""Samples that are drawn, written and handed out as a whole."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Chunk(NamedTuple):
    """Samples of consecutive places.

    Attributes:
        first: the place of the first one.
        images: uint8 (N, H, W, C).
        labels: int64 (N,), or None without classes.
    """

    first: int
    images: NDArray[np.uint8]
    labels: NDArray[np.int64] | None
