"""A step that can be timed: applied to the same x for ever, it neither grows nor fades."""

from __future__ import annotations

import numpy as np

from fastsample import Table
from fastsample.samplers.ddim import ddim_table


def settling_table() -> Table:
    """One row of DDIM that halves x and adds part of m, so that x settles at 1.2 m.

    A sampler's own rows multiply x by more than 1 and would carry it to infinity; a smaller factor alone would carry it
    to denormals, which are slow. This row goes the other way, towards noise, from alpha 0.8 to 0.4, at the same cost.
    """
    alpha = np.array([0.8, 0.4])
    return ddim_table(np.array([500]), alpha, np.sqrt(1 - alpha**2))
