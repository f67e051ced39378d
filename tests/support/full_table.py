"""A table that uses every column, and what columns are that a table leaves out."""

from __future__ import annotations

import math
from typing import Any

DEFAULTS = {
    **dict.fromkeys(("p", "q", "a", "b", "c1", "c2", "c3", "d", "s", "g0", "g1"), 0.0),
    "limit": math.inf,
    "quantile": 0.0,
    "hx": 0.0,
    "h0": 1.0,
    "e": 1.0,
}
COLUMNS = tuple(DEFAULTS)
TIMES = [9, 5, 2, 0]
FULL: dict[str, Any] = {
    "p": [2.0, 1.0, 0.5, 0.25],
    "q": -0.25,
    "a": [0.1, 0.2, 0.3, 0.4],
    "b": 0.75,
    "c1": [0.0, 0.5, -0.5, 0.0],
    "c2": [0.0, 0.0, 0.25, 0.5],
    "c3": [0.0, 0.0, 0.0, -0.75],
    "d": [1.5, 0.0, -1.5, 0.5],
    "s": [0.5, 0.25, 0.0, 1.0],
    "g0": [-1.0, 0.5, 0.0, 0.25],
    "g1": [0.0, 2.0, 1.0, 0.5],
    "limit": [math.inf, 2.0, 1.0, math.inf],
    "quantile": [0.0, 0.995, 0.0, 1.0],
    "hx": [0.7, 0.6, 0.5, 0.4],
    "h0": -0.3,
    "e": [0.5, 0.25, 4.0, 2.0],
}
LEVELS: dict[str, Any] = {
    "alpha": [0.1, 0.4, 0.6, 0.8, 1.0],
    "sigma": [0.9, 0.6, 0.4, 0.2, 0.0],
    "init_noise_sigma": 14.6,
}
