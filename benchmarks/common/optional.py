"""Packages that a comparison needs and a machine may lack."""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any


# Cached for the note, which is to be read once, not for every case.
@cache
def optional(package: str, what: str) -> Any:
    """The package; where it cannot be imported None, and one note that `what` is left out."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        print(f"{what} is left out, {package} cannot be imported: {error}")
        return None
