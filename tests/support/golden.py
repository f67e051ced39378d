"""Arrays that the published code computed, kept in tests/golden/."""

from __future__ import annotations

import numpy as np

from support.paths import GOLDEN


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as data:
        return dict(data)
