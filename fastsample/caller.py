"""The line of the caller's own that a warning is about."""

from __future__ import annotations

import sys
import warnings


def warn(message: str) -> None:
    """A UserWarning at the first line, seen from here, that is not the package's own."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "fastsample":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)
