"""Samples at the ends of what floats hold, for every kernel of dynamic thresholding."""

from __future__ import annotations

import math

import pytest

INF, NAN = math.inf, math.nan
# Four values each.
VALUES_AT_THE_ENDS = [
    pytest.param([INF, 1.0, -2.0, 3.0], id="one-infinity"),
    pytest.param([INF, -INF, 1.0, 2.0], id="two-infinities"),
    pytest.param([INF] * 4, id="all-infinite"),
    pytest.param([NAN, 1.0, 2.0, 3.0], id="nan"),
    pytest.param([-NAN, INF, 2.0, 3.0], id="nan-and-infinity"),
    pytest.param([0.0] * 4, id="zeros"),
    pytest.param([1e-45, -1e-45, 0.0, 1e-40], id="subnormal"),
    pytest.param([3e38, -3e38, 3e38, 1.0], id="huge"),
]
